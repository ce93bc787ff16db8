"""Loss curves of the three stages against the same training written as a plain loop on transformers' own model.

The loop knows nothing of ours but the order of samples: transformers' class from the same folder, right-padded
batches with an attention mask, float pixels, PyTorch's AdamW, one whole batch per step. Ours accumulates two packs.
Both are fp32, so curves may differ by rounding alone: 5e-6 relative at each of 20 steps.
"""

import math

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from llava_fast.train.trainer import GroupedSampler, load_data, load_processor, run

STEPS, BATCH, SEED = 20, 8, 3
TOLERANCE = 5e-6  # relative, of each step's loss
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def padded(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """transformers' inputs of some samples: right-padded, pixels normalised on the host."""
    pad = nn.utils.rnn.pad_sequence
    pixels = np.concatenate([sample["pixel_values"].numpy() for sample in samples])
    normal = (pixels / 255 - CLIP_MEAN) / CLIP_STD
    return {
        "input_ids": pad([sample["input_ids"] for sample in samples], batch_first=True),
        "labels": pad([sample["labels"] for sample in samples], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(sample["input_ids"]) for sample in samples], batch_first=True),
        "pixel_values": torch.tensor(normal.transpose(0, 3, 1, 2), dtype=torch.float32),
    }


def plain_loop(model: nn.Module, batches: list[dict], rates: dict[str, float]) -> list[float]:
    """AdamW with a warm-up of 10 % and a cosine; parameters whose name contains a key of `rates` have its rate."""
    base = rates.pop("")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next((rate for key, rate in rates.items() if key in name), base)
            groups.setdefault(rate, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": rate, "peak": rate} for rate, params in groups.items()], weight_decay=0.0
    )
    warmup = math.ceil(0.1 * STEPS)
    losses = []
    for step, batch in enumerate(batches):
        progress = (step - warmup) / (STEPS - warmup)
        factor = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for params in groups.values() for p in params], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def reference(stage: str, recipe) -> tuple[nn.Module, list[float]]:
    """The plain loop's model and losses for a recipe of ours."""
    processor = load_processor(recipe)
    dataset, _ = load_data(recipe, processor)
    order = list(GroupedSampler(dataset, recipe.group_by, recipe.per_device_batch_size, BATCH, SEED))
    sampler = GroupedSampler(dataset, recipe.group_by, recipe.per_device_batch_size, BATCH, SEED)
    sampler.epoch = 1
    order += list(sampler)
    batches = [padded([dataset[i] for i in order[s * BATCH : (s + 1) * BATCH]]) for s in range(STEPS)]
    model = transformers.LlavaForConditionalGeneration.from_pretrained(recipe.model).train()
    rates = {"": recipe.learning_rate}
    for name, parameter in model.named_parameters():
        trains = {"projector": "projector" in name, "full": "vision_tower" not in name, "lora": False}
        parameter.requires_grad = trains[stage]
    if stage == "lora":
        rates["multi_modal_projector"] = recipe.projector_learning_rate
        torch.manual_seed(SEED)
        targets = [
            name for name, _ in model.named_modules() if "language_model" in name and name.rpartition(".")[2] in LINEARS
        ]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=["multi_modal_projector"])
        model = get_peft_model(model, config)
    return model, plain_loop(model, batches, rates)


@pytest.mark.parametrize("stage", ["projector", "full", "lora"])
def test_loss_curve_equals_a_plain_loop_on_transformers(stage, recipe_for, tiny):
    settings = {
        "stage": stage,
        "max_steps": STEPS,
        "seed": SEED,
        "warmup_ratio": 0.1,
        "global_batch_size": BATCH,
        "per_device_batch_size": BATCH // 2,
        "learning_rate": 1e-3,
    }
    if stage == "projector":
        settings |= {"data": tiny.captions, "template": "plain", "image_aspect": "crop"}
    if stage == "lora":
        settings |= {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}, "projector_learning_rate": 1e-4}
    recipe = recipe_for(**settings)
    result = run(recipe)
    ours = [entry["loss"] for entry in result["log_history"] if "loss" in entry]
    model, theirs = reference(stage, recipe)
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    print(f"{stage}: {theirs[0]:.4f} -> {theirs[-1]:.4f}, worst relative difference {worst:.1e}")
    assert len(ours) == STEPS and worst < TOLERANCE
    assert sum(theirs[-5:]) / 5 < 0.95 * theirs[0]  # a curve that goes nowhere would prove little

    # And they arrive at the same weights.
    if stage == "lora":
        model = model.merge_and_unload()
    saved = load_file(recipe.output_dir / "model.safetensors")
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "language_model.model.", 1)
        name = name.replace("lm_head.", "language_model.lm_head.", 1)
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.", 1)
        name = name.replace("model.multi_modal_projector.", "multi_modal_projector.", 1)
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=2e-5)
