"""Tiny models and batches, and how near two tensors must be. Tests get this module as the fixture `tiny`."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, MistralConfig

from llava_fast.checkpoint.layouts import original_name
from llava_fast.drop_in import LlavaForConditionalGeneration

PAD, FIRST_TEXT_TOKEN, IMAGE, VOCABULARY = 0, 3, 99, 101
SUPPRESSED = [IMAGE, PAD]  # never generated


def config(
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    *,
    kind: str = "llama",
    **llava: Any,
) -> LlavaConfig:
    """A LLaVA of two text layers and three tower layers; the arguments change single fields."""
    text_settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,  # so that greedy decoding runs its full length
        **(text or {}),
    }
    vision_settings = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 4,
        **(vision or {}),
    }
    vision_config = CLIPVisionConfig(**vision_settings)
    patches = (vision_config.image_size // vision_config.patch_size) ** 2
    full = llava.get("vision_feature_select_strategy") == "full"
    return LlavaConfig(
        vision_config=vision_config,
        text_config={"llama": LlamaConfig, "mistral": MistralConfig}[kind](**text_settings),
        **{"image_token_index": IMAGE, "image_seq_length": patches + full, **llava},
    )


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights that matter: matrices that keep the scale of what goes through them, biases and norm weights off their
    defaults."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() <= 1:
            parameter.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
        elif "embed_tokens" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(1.5 * noise * parameter[0].numel() ** -0.5)


def stock(config: LlavaConfig, seed: int = 0, **kwargs: Any) -> transformers.LlavaForConditionalGeneration:
    """transformers' own model, in evaluation mode, with random weights."""
    model = transformers.LlavaForConditionalGeneration._from_config(copy.deepcopy(config), **kwargs)
    randomize(model, seed)
    return model.eval()


def ours(config: LlavaConfig, seed: int = 0) -> LlavaForConditionalGeneration:
    """Our model, in evaluation mode, with the same random weights."""
    model = LlavaForConditionalGeneration(copy.deepcopy(config))
    randomize(model, seed)
    return model.eval()


def pair(
    config: LlavaConfig, seed: int = 0, **kwargs: Any
) -> tuple[LlavaForConditionalGeneration, transformers.LlavaForConditionalGeneration]:
    """Our model and transformers', with the same weights."""
    theirs = stock(config, seed, **kwargs)
    model = LlavaForConditionalGeneration(copy.deepcopy(config)).eval()
    model.load_state_dict(theirs.state_dict())
    return model, theirs


def image_tokens(config: LlavaConfig) -> int:
    """Tokens of one image."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy == "full")


def batch(
    config: LlavaConfig, rows: Sequence[Sequence[int | str]], side: str = "right", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs with labels. A row is a list of text lengths and "image"s, as in `[3, "image", 5]`.

    Padding is on the named side. Half the text tokens carry a label, never the first of a row.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, labels, images = [], [], 0
    for row in rows:
        pieces = []
        for part in row:
            if part == "image":
                pieces.append(torch.full((image_tokens(config),), IMAGE))
                images += 1
            else:
                pieces.append(torch.randint(FIRST_TEXT_TOKEN, IMAGE, (part,), generator=generator))
        ids.append(torch.cat(pieces))
        label = ids[-1].clone()
        label[(ids[-1] == IMAGE) | (torch.rand(len(label), generator=generator) < 0.5)] = -100
        label[-1] = ids[-1][-1]
        label[0] = -100
        labels.append(label)
    mask = [torch.ones_like(row) for row in ids]

    def stack(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    inputs = {"input_ids": stack(ids, PAD), "attention_mask": stack(mask, 0), "labels": stack(labels, -100)}
    if images:
        size = config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(images, 3, size, size, generator=generator)
    return inputs


def single(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch by itself, without its padding and with its own images."""
    real = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask", "labels")}
    if "pixel_values" in inputs:
        tokens = (inputs["input_ids"] == IMAGE).sum(1)
        per_image = int(tokens.sum()) // len(inputs["pixel_values"])
        first, count = int(tokens[:row].sum()) // per_image, int(tokens[row]) // per_image
        if count:
            alone["pixel_values"] = inputs["pixel_values"][first : first + count]
    return alone


def prompt(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs without labels, as `generate` wants them."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def greedy(**changes: Any) -> GenerationConfig:
    """Greedy decoding that neither stops early nor writes an image or padding token; arguments change single fields."""
    settings = {
        "max_new_tokens": 32,
        "do_sample": False,
        "pad_token_id": PAD,
        "suppress_tokens": SUPPRESSED,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return GenerationConfig(**{**settings, **changes})


def assert_near(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5, what: str = "tensors") -> None:
    """The largest difference is at most `relative` times the largest expected value."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error, scale = float((actual - expected).detach().abs().max()), float(expected.detach().abs().max())
    assert error <= relative * scale, f"{what}: off by {error:.3g}, {error / max(scale, 1e-30):.3g} of {scale:.3g}"


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter name; a parameter that no gradient reached counts as zeros."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_gradients_near(actual: nn.Module, expected: nn.Module, relative: float = 1e-4) -> None:
    """Every gradient to `relative` of its own largest value.

    The tower's key biases have none: they shift all scores of a query alike. Theirs is rounding, in either model.
    """
    ours, theirs = gradients(actual), gradients(expected)
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert largest > 0
    for name, gradient in theirs.items():
        error, scale = float((ours[name] - gradient).abs().max()), float(gradient.abs().max())
        if "vision_tower" in name and name.endswith("k_proj.bias"):
            assert max(error, scale) <= 1e-6 * largest, f"{name}: {scale:.3g} is not a rounded zero"
        else:
            assert error <= relative * scale, f"{name}: off by {error:.3g} of {scale:.3g}"


def save_clip(model: torch.nn.Module, folder: Path, prefix: str = "vision_model.") -> Path:
    """The model's tower as a CLIP directory."""
    weights = {prefix + name: weight.clone() for name, weight in model.model.vision_tower.state_dict().items()} | {
        "text_model.final_layer_norm.bias": torch.zeros(3)
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    config = {"model_type": "clip", "vision_config": model.config.vision_config.to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_released(
    model: torch.nn.Module, folder: Path, clip: str, *, tower: bool = False, binary: bool = False, shards: int = 1
) -> Path:
    """As the original code writes: no image token, and by hand, so that reading is tested against it."""
    config, text = model.config, model.config.text_config
    kind = getattr(config, "mm_projector_type", "mlp2x_gelu")
    flat = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": clip,
        "mm_projector_type": kind,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": {"default": "patch", "full": "cls_patch"}[config.vision_feature_select_strategy],
        "image_aspect_ratio": "pad",
        "rope_theta": text.rope_parameters["rope_theta"],
        "tie_word_embeddings": text.tie_word_embeddings,
        "torch_dtype": "float32",
    }
    flat |= {
        key: getattr(text, key)
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        )
    }
    weights = {
        original_name(name, kind): weight.clone()
        for name, weight in model.state_dict().items()
        if (tower or "vision_tower" not in name) and not (text.tie_word_embeddings and name == "lm_head.weight")
    }
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # as released files have
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(flat))
    stem, end = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    save = torch.save if binary else save_file
    if shards == 1:
        save(weights, folder / f"{stem}.{end}")
        return folder
    names = sorted(weights)
    place = {name: f"{stem}-{i % shards + 1:05d}-of-{shards:05d}.{end}" for i, name in enumerate(names)}
    for file in set(place.values()):
        save({name: weights[name] for name in names if place[name] == file}, folder / file)
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder
