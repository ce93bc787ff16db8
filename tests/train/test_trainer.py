"""The trainer: what trains in each stage, the order of samples, evaluation, checkpoints and resuming."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from llava_fast import LlavaForConditionalGeneration, LlavaProcessor
from llava_fast.train.__main__ import main
from llava_fast.train.data import LlavaDataset
from llava_fast.train.recipe import RecipeError, load_recipe
from llava_fast.train.sampler import PackedCollator
from llava_fast.train.trainer import LlavaTrainer, load_data, load_processor, run

PARTS = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head.")


class Probe(TrainerCallback):
    """Looks into a run: the model it trains, and logits of one batch whenever a checkpoint is written."""

    def __init__(self, batch: dict | None = None) -> None:
        self.batch = batch
        self.logits = {}
        self.seen = SimpleNamespace()

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.seen = SimpleNamespace(
            model=model,
            groups=[(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups],
            peaks=[group["initial_lr"] for group in optimizer.param_groups],
            trainable={name for name, p in model.named_parameters() if p.requires_grad},
            dtypes={name: p.dtype for name, p in model.named_parameters()},
        )

    def on_step_end(self, args, state, control, model, **kwargs):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.seen.tower_trains = any(module.training for module in base.model.vision_tower.modules())

    def on_save(self, args, state, control, model, **kwargs):
        if self.batch is not None:
            was_training = model.training
            model.eval()
            with torch.no_grad():
                self.logits[state.global_step] = model(**self.batch).logits
            model.train(was_training)


def pack_of(recipe, n: int = 5) -> dict[str, torch.Tensor]:
    processor = load_processor(recipe)
    dataset = LlavaDataset(recipe.data, recipe.data.parent, processor, recipe.template, recipe.max_length)
    batch = PackedCollator(processor)([dataset[i] for i in range(n)])
    batch.pop("labels")
    return batch


def losses(result) -> list[float]:
    return [entry["loss"] for entry in result["log_history"] if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    """Names (as on disk) of the weights that are not the same to the bit."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


# What trains


@pytest.mark.parametrize("stage", ["projector", "full", "lora"])
def test_each_stage_trains_its_parameters_and_nothing_else(stage, recipe_for, tiny):
    probe = Probe()
    recipe = recipe_for(stage=stage, weight_decay=0.1)
    run(recipe, [probe])
    seen = probe.seen
    if stage == "lora":
        assert all("lora_" in name or "multi_modal_projector.modules_to_save" in name for name in seen.trainable)
        assert not any("vision_tower" in name or "lm_head" in name for name in seen.trainable)
    else:
        parts = PARTS[1:] if stage == "full" else PARTS[1:2]
        everything = {name for name, _ in seen.model.named_parameters()}
        assert seen.trainable == {name for name in everything if name.startswith(parts)}
    assert not seen.tower_trains
    moved = changed(tiny.base, recipe.output_dir)
    on_disk = {"projector": ("multi_modal_projector.",), "full": ("multi_modal_projector.", "language_model.")}
    linears = {f"language_model.model.{name}.weight" for name in language_linears(tiny)}
    expected = {
        name
        for name in weights(tiny.base)
        if (name.startswith(on_disk[stage]) if stage != "lora" else name in linears or "projector" in name)
    }
    assert moved == expected


def language_linears(tiny) -> set[str]:
    """The linear layers of the language model, from transformers' own class."""
    model = transformers.LlamaForCausalLM.from_pretrained(tiny.text)
    return {name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}


def test_lora_adapts_exactly_the_language_models_linears(recipe_for, tiny, monkeypatch):
    monkeypatch.chdir(tiny.folder)
    probe = Probe()
    recipe = recipe_for(stage="lora", model="base", lora={"r": 4, "alpha": 8, "dropout": 0.1}, max_steps=1)
    run(recipe, [probe])
    prefix, suffix = "base_model.model.model.language_model.", ".lora_A.default.weight"
    adapted = {name for name in probe.seen.trainable if name.endswith(suffix)}
    assert adapted == {f"{prefix}{name}{suffix}" for name in language_linears(tiny)}
    saved = load_file(recipe.output_dir / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 48)
    config = json.loads((recipe.output_dir / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["base_model_name_or_path"] == str(tiny.base)  # found from anywhere


def test_the_projector_has_its_own_learning_rate(recipe_for):
    probe = Probe()
    rates = {"learning_rate": 2e-4, "projector_learning_rate": 2e-5, "warmup_ratio": 0.5}
    result = run(recipe_for(stage="lora", weight_decay=0.1, **rates), [probe])
    # LoRA has no biases or norms; the projector has two weights and two biases.
    assert probe.seen.peaks == [2e-4, 2e-5, 2e-5]
    n_lora = len(probe.seen.trainable) - 4
    assert [(decay, n) for _, decay, n in probe.seen.groups] == [(0.1, n_lora), (0.1, 2), (0.0, 2)]
    logged = [entry for entry in result["log_history"] if "learning_rate" in entry]
    assert [entry["learning_rate"] for entry in logged][:4] == pytest.approx([0, 2e-4 / 3, 4e-4 / 3, 2e-4])
    for entry in logged:
        assert entry["projector_learning_rate"] == pytest.approx(entry["learning_rate"] / 10)


def test_weight_decay_spares_biases_and_norms(recipe_for):
    probe = Probe()
    run(recipe_for(weight_decay=0.1, max_steps=1), [probe])
    spared = {name for name in probe.seen.trainable if name.endswith("bias") or "norm" in name}
    assert [(decay, n) for _, decay, n in probe.seen.groups] == [
        (0.1, len(probe.seen.trainable) - len(spared)),
        (0.0, len(spared)),
    ]
    assert len(spared) == 2 + 5  # projector biases; two norms per layer and the last


def test_bf16_keeps_fp32_where_it_trains(recipe_for):
    probe = Probe()
    recipe = recipe_for(stage="projector", dtype="bf16", save_steps=3)
    result = run(recipe, [probe])
    assert {dtype for name, dtype in probe.seen.dtypes.items() if "projector" in name} == {torch.float32}
    assert {dtype for name, dtype in probe.seen.dtypes.items() if "projector" not in name} == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(recipe.output_dir).values()} == {torch.bfloat16}
    assert json.loads((recipe.output_dir / "config.json").read_text())["dtype"] == "bfloat16"
    checkpoint = weights(recipe.output_dir / "checkpoint-3")
    assert checkpoint["multi_modal_projector.linear_1.weight"].dtype == torch.float32
    assert all(loss < 10 for loss in losses(result))


# Order and accumulation


def test_every_epoch_has_its_own_order(recipe_for):
    """Seen through the losses of a model that hardly moves: 96 samples are 12 steps."""
    result = run(recipe_for(max_steps=None, epochs=2, learning_rate=1e-12))
    assert result["steps"] == 24
    first, second = losses(result)[:12], losses(result)[12:]
    assert sum(a == pytest.approx(b, rel=1e-5) for a, b in zip(first, second, strict=True)) < 3
    assert sum(first) == pytest.approx(sum(second), rel=0.02)


def test_accumulation_equals_one_batch(recipe_for, tmp_path):
    """Packs of unequal numbers of labels, text-only ones among them, add up to the mean over the whole step."""
    whole = run(recipe_for(output_dir=tmp_path / "whole", per_device_batch_size=8))
    parts = run(recipe_for(output_dir=tmp_path / "parts", per_device_batch_size=2))
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-6)
    norms = [[e["grad_norm"] for e in result["log_history"] if "grad_norm" in e] for result in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-5)
    assert whole["tokens"] == parts["tokens"] > 0


def test_gradient_checkpointing_changes_nothing(recipe_for, tmp_path):
    plain = run(recipe_for(output_dir=tmp_path / "plain"))
    checkpointed = run(recipe_for(output_dir=tmp_path / "checkpointed", gradient_checkpointing=True))
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.parametrize("stage", ["projector", "full", "lora"])
def test_text_only_batches_train(stage, recipe_for, tiny, tmp_path):
    rows = [row for row in json.loads(tiny.chat.read_text()) if "image" not in row]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    recipe = recipe_for(stage=stage, data=tmp_path / "text.json", max_steps=2, per_device_batch_size=4)
    result = run(recipe)
    assert result["counts"]["with_images"] == 0
    moved = changed(tiny.base, recipe.output_dir)
    assert not any("projector" in name or "vision" in name for name in moved)  # gradients of exactly zero
    assert bool(moved) == (stage != "projector")
    assert all(0 < loss < 10 for loss in losses(result))


# Evaluation and counts


def test_validation_loss_is_the_mean_over_tokens(recipe_for, tiny):
    recipe = recipe_for(validation=0.2, eval_steps=4, per_device_batch_size=4, max_steps=6)
    result = run(recipe)
    evaluations = {e["step"]: e["eval_loss"] for e in result["log_history"] if "eval_loss" in e}
    assert list(evaluations) == [4, 6]  # every four steps and at the end
    assert result["eval_loss"] == evaluations[6]
    processor = load_processor(recipe)
    train, validation = load_data(recipe, processor)
    assert len(train) == 96 - len(validation) and 15 <= len(validation) <= 23
    model = transformers.LlavaForConditionalGeneration.from_pretrained(recipe.output_dir)
    total, n_tokens = 0.0, 0
    for i in range(len(validation)):
        sample = validation[i]
        pixels = torch.from_numpy(processor.normalize(sample["pixel_values"].numpy()))
        with torch.no_grad():
            logits = model(input_ids=sample["input_ids"][None], pixel_values=pixels if len(pixels) else None).logits[
                0, :-1
            ]
        labels = sample["labels"][1:]
        total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        n_tokens += int((labels != -100).sum())
    assert result["eval_loss"] == pytest.approx(total / n_tokens, rel=1e-5)


def test_a_validation_file(recipe_for, tiny):
    result = run(recipe_for(validation=tiny.captions, max_steps=2))
    assert result["counts"]["validation_samples"] == 96
    assert result["counts"]["samples"] == 96
    assert result["eval_loss"] > 0


def test_lost_samples_are_counted_in_the_log_and_the_result(recipe_for, tiny, tmp_path):
    rows = json.loads(tiny.chat.read_text())
    rows[0]["image"] = "nowhere.png"  # dropped
    rows[1]["conversations"][1]["value"] = ""  # nothing to learn
    rows[2]["image"] = "broken.png"
    (tiny.folder / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = recipe_for(data=tmp_path / "rows.json", image_folder=tiny.folder, max_steps=None, epochs=1)
    result = run(recipe)
    counts = result["counts"]
    assert (counts["rows"], counts["samples"]) == (96, 94)
    assert (counts["dropped_image_missing"], counts["dropped_fully_masked"]) == (1, 1)
    assert counts["unreadable"] == 1
    assert result["steps"] == 12  # 94 samples in steps of 8
    logged = result["log_history"][0]
    assert (logged["samples"], logged["dropped_fully_masked"]) == (94, 1)
    state = json.loads((recipe.output_dir / "trainer_state.json").read_text())
    assert state["log_history"] == result["log_history"]


# Checkpoints


def test_full_checkpoints_load_everywhere(recipe_for):
    recipe = recipe_for(save_steps=2, save_total_limit=2)
    probe = Probe(pack_of(recipe))
    run(recipe, [probe])
    kept = sorted(path.name for path in recipe.output_dir.glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]
    folder = recipe.output_dir / "checkpoint-4"
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        ours = model(**probe.batch).logits
    assert torch.equal(ours, probe.logits[4])
    assert not torch.equal(probe.logits[4], probe.logits[6])
    stock, info = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_as_stock(stock, probe.batch, ours, recipe)
    processor = LlavaProcessor.from_pretrained(folder)
    assert processor.pad_to_square and processor.num_image_tokens() == 4
    assert "use_cache" not in json.loads((folder / "config.json").read_text())


def assert_same_as_stock(stock, batch, logits_1TV, recipe) -> None:
    """Samples of a pack, one by one through transformers' class."""
    processor = load_processor(recipe)
    pixels = torch.from_numpy(processor.normalize(batch["pixel_values"].numpy()))
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    image = 0
    for start, end in pairwise(starts):
        ids = batch["input_ids"][:, start:end]
        n_images = int((ids == processor.image_token_id).sum()) // 4
        with torch.no_grad():
            theirs = stock(input_ids=ids, pixel_values=pixels[image : image + n_images] if n_images else None).logits
        image += n_images
        torch.testing.assert_close(theirs, logits_1TV[:, start:end], rtol=1e-4, atol=1e-5)
    assert image == len(pixels)


def test_lora_checkpoints_load_everywhere(recipe_for, tiny):
    recipe = recipe_for(stage="lora", save_steps=2, projector_learning_rate=5e-4)
    probe = Probe(pack_of(recipe))
    run(recipe, [probe])
    folder = recipe.output_dir / "checkpoint-4"
    merged = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        ours = merged(**probe.batch).logits
    torch.testing.assert_close(ours, probe.logits[4], rtol=1e-4, atol=2e-5)  # merging rounds
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(tiny.base)
    assert_same_as_stock(PeftModel.from_pretrained(stock, folder), probe.batch, ours, recipe)
    assert LlavaProcessor.from_pretrained(folder).num_image_tokens() == 4
    # The result is a whole model for stock transformers, and its adapter lies beside it.
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(recipe.output_dir)
    assert_same_as_stock(stock, probe.batch, probe.logits[6], recipe)
    again = LlavaForConditionalGeneration.from_pretrained(recipe.output_dir / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(**probe.batch).logits, probe.logits[6], rtol=1e-4, atol=2e-5)
    assert LlavaProcessor.from_pretrained(recipe.output_dir).pad_to_square


@pytest.mark.parametrize("stage", ["projector", "full", "lora"])
def test_resuming_equals_not_stopping(stage, recipe_for, tmp_path):
    """Two epochs, stopped inside the second; dropout, shuffling and both rates go on where they were."""
    settings = {
        "stage": stage,
        "max_steps": 20,
        "group_by": "modality",
        "per_device_batch_size": 4,
        "save_steps": 15,
    }
    if stage == "lora":
        settings |= {"lora": {"r": 4, "dropout": 0.2}, "projector_learning_rate": 5e-4}
    whole = run(recipe_for(output_dir=tmp_path / "whole", **settings))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 15

    run(recipe_for(output_dir=tmp_path / "parts", **settings), [Stop()])
    result = run(recipe_for(output_dir=tmp_path / "parts", resume=True, **settings))
    assert result["steps"] == 20
    assert losses(result) == losses(whole) and len(losses(whole)) == 20
    assert changed(tmp_path / "whole", tmp_path / "parts") == set()


def test_resuming_at_the_end_of_an_epoch(recipe_for, tmp_path):
    settings = {"max_steps": 16, "save_steps": 12}  # 96 samples are 12 steps
    whole = run(recipe_for(output_dir=tmp_path / "whole", **settings))
    path = tmp_path / "whole" / "checkpoint-12"
    result = run(recipe_for(output_dir=tmp_path / "parts", resume=path, **settings))
    assert losses(result) == losses(whole)
    assert changed(tmp_path / "whole", tmp_path / "parts") == set()


# The door


def test_stage_1_from_parts_then_lora_by_the_command_line(tiny, tmp_path, capsys):
    """Two stages as a user runs them, with worker processes and from YAML files."""
    stage1 = tmp_path / "stage1.yaml"
    stage1.write_text(
        f"stage: projector\nvision_tower: {tiny.tower}\nlanguage_model: {tiny.text}\ndata: {tiny.captions}\n"
        "output_dir: aligned\ntemplate: plain\nimage_aspect: crop\ndtype: fp32\nepochs: 1\nworkers: 2\n"
        "global_batch_size: 16\nper_device_batch_size: 8\nlearning_rate: 1e-3\n"
    )
    assert main([str(stage1)]) == 0
    assert "6 steps" in capsys.readouterr().out
    moved = weights(tmp_path / "aligned")
    language = load_file(tiny.text / "model.safetensors")
    n_vocab = language["lm_head.weight"].shape[0]
    for name, tensor in language.items():
        theirs = moved[f"language_model.{name}"]
        assert torch.equal(theirs[:n_vocab] if "embed" in name or "lm_head" in name else theirs, tensor)
    for name, tensor in load_file(tiny.tower / "model.safetensors").items():
        assert torch.equal(moved[f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"], tensor)
    stage2 = tmp_path / "stage2.yaml"
    stage2.write_text(
        f"stage: lora\nmodel: aligned\ndata: {tiny.chat}\noutput_dir: tuned\ndtype: fp32\nmax_steps: 2\n"
        "global_batch_size: 8\nper_device_batch_size: 4\nworkers: 0\ngroup_by: modality\n"
    )
    assert main([str(stage2), "lora.r=4"]) == 0
    recipe = load_recipe(tmp_path / "tuned" / "recipe.yaml")
    assert recipe.lora.r == 4 and recipe.model == tmp_path / "aligned"
    processor = LlavaProcessor.from_pretrained(tmp_path / "tuned")
    prompt = processor.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert prompt.endswith("USER: Hello ASSISTANT:")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "v3"}, "unknown template 'v3'"),
        ({"data": [{"id": 1, "conversations": [{"from": "gpt"}]}]}, "turn 0 has no text 'value'"),
        ({"data": []}, "none of 0 rows can be used"),
        ({"model": "empty"}, "empty"),
        ({"validation": 0.999}, "leaves one part empty"),
        ({"report_to": "nobody"}, "report_to: 'nobody' is not one of"),
        (
            {"stage": "full", "vision_learning_rate": 1e-5, "vision_layers": 3},
            "vision_layers: 3 is more than the 2 layers",
        ),
    ],
)
def test_what_cannot_start_is_one_line_and_writes_nothing(changes, message, recipe_for, tmp_path):
    if "data" in changes:
        (tmp_path / "bad.json").write_text(json.dumps(changes["data"]))
        changes = {"data": tmp_path / "bad.json"}
    if "model" in changes:
        (tmp_path / "empty").mkdir()
        changes = {"model": tmp_path / "empty"}
    recipe = recipe_for(**changes)
    with pytest.raises(RecipeError) as error:
        run(recipe)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not recipe.output_dir.exists()


def test_fp16_needs_a_gpu(recipe_for, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = recipe_for(dtype="fp16")
    with pytest.raises(RecipeError, match="dtype: fp16 needs a GPU"):
        run(recipe)
    assert not recipe.output_dir.exists()


def test_the_trainer_is_transformers_own():
    assert issubclass(LlavaTrainer, transformers.Trainer)
