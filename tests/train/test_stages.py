"""What each stage trains, with the vision tower at a rate of its own; `test_trainer.py` has the stages without it."""

import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from llava_fast import LlavaForConditionalGeneration
from llava_fast.train.data import LlavaDataset
from llava_fast.train.sampler import PackedCollator
from llava_fast.train.trainer import load_processor, run

UNREAD = ("encoder.layers.2.", "post_layernorm.")  # of a tower of three layers, hidden state -2 is read
LORA = {"stage": "lora", "lora": {"r": 4, "alpha": 8, "dropout": 0.1}}


class Seen(TrainerCallback):
    """What is trained, at which rates, and whether the tower is in training mode."""

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        tower = base.model.vision_tower
        self.tower = {
            name.replace("modules_to_save.default.", "") for name, p in tower.named_parameters() if p.requires_grad
        }
        parameters = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.rates = {
            names[id(parameter)]: group["initial_lr"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self.dtypes = {name: parameter.dtype for name, parameter in parameters.items()}

    def on_step_end(self, args, state, control, model, **kwargs):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.training = base.model.vision_tower.training


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("stage", [{"stage": "full"}, LORA], ids=["full", "lora"])
def test_the_tower_trains_at_its_own_rate(stage, layers, recipe_for, tiny):
    seen = Seen()
    rates = {"learning_rate": 1e-3, "projector_learning_rate": 5e-4, "vision_learning_rate": 1e-4}
    recipe = recipe_for(**stage, **rates, vision_layers=layers, dtype="bf16", max_steps=3)
    result = run(recipe, [seen])
    everything = {name.removeprefix("vision_model.") for name in load_file(tiny.tower / "model.safetensors")}
    read = {name for name in everything if not name.startswith(UNREAD) and "position_ids" not in name}
    expected = read if layers is None else {name for name in read if name.startswith("encoder.layers.1.")}
    assert seen.tower == expected and seen.training
    for name, rate in seen.rates.items():
        assert rate == (1e-4 if ".vision_tower." in name else 5e-4 if "projector" in name else 1e-3), name
        assert seen.dtypes[name] == torch.float32
    for entry in result["log_history"]:
        if "learning_rate" in entry:
            assert entry["vision_learning_rate"] == pytest.approx(entry["learning_rate"] / 10)
    old, new = load_file(tiny.base / "model.safetensors"), load_file(recipe.output_dir / "model.safetensors")
    prefix = "vision_tower.vision_model."
    moved = {
        name.removeprefix(prefix)
        for name in old
        if prefix in name and not torch.equal(old[name].to(torch.bfloat16), new[name])
    }
    # The gradient of a key's bias is zero in exact arithmetic, and bf16 may round a small step away.
    assert moved <= expected
    assert {name for name in expected if name.endswith("proj.weight")} <= moved


def test_an_adapter_keeps_the_tower_and_transformers_loads_it(recipe_for, tiny):
    recipe = recipe_for(**LORA, vision_learning_rate=1e-2, max_steps=3, save_steps=2)
    run(recipe)
    saved = load_file(recipe.output_dir / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.vision_tower.encoder.layers.1.mlp.fc1.weight" in saved
    dataset = LlavaDataset(recipe.data, recipe.data.parent, processor := load_processor(recipe), "v1", 512)
    batch = PackedCollator(processor)([dataset[0]])
    ours = LlavaForConditionalGeneration.from_pretrained(recipe.output_dir).eval()
    base = LlavaForConditionalGeneration.from_pretrained(tiny.base).eval()
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tiny.base)
    theirs = PeftModel.from_pretrained(theirs, recipe.output_dir / "adapter").eval()
    inputs = {key: batch[key] for key in ("input_ids", "pixel_values")}
    pixels = torch.from_numpy(processor.normalize(batch["pixel_values"].numpy()))
    with torch.no_grad():
        found = ours(**inputs).logits
        wanted = theirs(input_ids=inputs["input_ids"], pixel_values=pixels).logits
        features = [m.get_image_features(batch["pixel_values"]).last_hidden_state for m in (ours, base)]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 0.01


def test_resuming_with_a_trained_tower(recipe_for, tmp_path):
    settings = {**LORA, "vision_learning_rate": 1e-3, "vision_layers": 2, "max_steps": 8, "save_steps": 4}
    run(recipe_for(output_dir=tmp_path / "whole", **settings))
    path = tmp_path / "whole" / "checkpoint-4"
    run(recipe_for(output_dir=tmp_path / "parts", resume=path, **settings))
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_text_only_batches_give_the_tower_zero_gradients(recipe_for, tiny):
    """Zero and not None: with None the optimiser's moments would depend on how samples are spread over devices."""
    model = LlavaForConditionalGeneration.from_pretrained(tiny.base).train()
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    read = {n: p for n, p in model.model.vision_tower.named_parameters() if p.requires_grad}
    assert read and all(p.grad is not None and not p.grad.any() for p in read.values())


def test_the_adapters_config_names_the_trained_layers(recipe_for):
    recipe = recipe_for(**LORA, vision_learning_rate=1e-3, vision_layers=1, max_steps=1)
    run(recipe)
    config = json.loads((recipe.output_dir / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["multi_modal_projector", "vision_tower.encoder.layers.1"]
