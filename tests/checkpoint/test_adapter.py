"""LoRA in the original code's directories and in peft's, of any version, against a merge done by hand."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llava_fast.checkpoint.layouts import classic_name, original_name
from llava_fast.convert import convert
from llava_fast.drop_in import LlavaForConditionalGeneration
from tests.checkpoint.files import LAYOUTS, ROWS, assert_same, write

R, ALPHA = 4, 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROJECTOR = "model.multi_modal_projector."


def lora(model: torch.nn.Module, linears: tuple[str, ...] = LINEARS) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B for linear layers of the language model, by our names of the layers."""
    generator = torch.Generator().manual_seed(5)
    pairs = {}
    for name, module in model.named_modules():
        if "language_model" in name and name.endswith(linears):
            a = torch.randn(R, module.in_features, generator=generator)
            pairs[name] = (a, 0.05 * torch.randn(module.out_features, R, generator=generator))
    return pairs


def merged(
    model: torch.nn.Module, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], trained: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """W + alpha / r · B A in float64, and what was trained in full."""
    weights = {name: weight.clone() for name, weight in model.state_dict().items()} | trained
    for name, (a, b) in pairs.items():
        change = ALPHA / R * (b.double() @ a.double())
        weights[f"{name}.weight"] = (weights[f"{name}.weight"].double() + change).float()
    return weights


def save_adapter(folder: Path, pairs: dict, rename: Any, base: Path, binary: bool = False, **settings: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"base_model.model.{rename(name + '.')}lora_{letter}.weight": tensor
        for name, pair in pairs.items()
        for letter, tensor in zip("AB", pair)
    }
    if binary:
        torch.save(weights, folder / "adapter_model.bin")
    else:
        save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": R,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": list(LINEARS),
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def language_model_alone(model: torch.nn.Module, folder: Path) -> Path:
    """Vicuna's place: no projector, no tower."""
    model.config.text_config.save_pretrained(folder)
    weights = {
        original_name(name): weight.clone()
        for name, weight in model.state_dict().items()
        if "language_model" in name or name == "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def original_lora(tiny: SimpleNamespace, tmp_path: Path, binary: bool = False) -> tuple[Any, Path, dict]:
    """A directory as the original code's LoRA stage leaves it; the model before, and the weights after."""
    model = tiny.ours(tiny.config({"num_key_value_heads": 2}))
    clip = tiny.save_clip(model, tmp_path / "clip")
    base = language_model_alone(model, tmp_path / "vicuna")
    folder = tmp_path / "llava-lora"
    tiny.as_released(model, folder, str(clip))
    (folder / "model.safetensors").unlink()
    pairs = lora(model)
    save_adapter(folder, pairs, original_name, base, binary)
    projector = {
        name: torch.randn_like(weight) for name, weight in model.state_dict().items() if name.startswith(PROJECTOR)
    }
    trained = {f"base_model.model.{original_name(name)}": weight for name, weight in projector.items()}
    torch.save(trained, folder / "non_lora_trainables.bin")
    return model, folder, merged(model, pairs, projector)


def assert_merged(tiny: SimpleNamespace, model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    ours = model.state_dict()
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        found = ours[name][: len(weight)] if name in ("lm_head.weight", EMBEDDINGS) else ours[name]
        tiny.assert_near(found, weight, 1e-6, name)


EMBEDDINGS = "model.language_model.embed_tokens.weight"


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_lora_of_the_original_code(tiny: SimpleNamespace, tmp_path: Path, binary: bool) -> None:
    plain, folder, expected = original_lora(tiny, tmp_path, binary)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    assert type(model) is LlavaForConditionalGeneration
    assert_merged(tiny, model, expected)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in plain.named_parameters() if not parameter.requires_grad}
    assert model.config.image_token_index == 101

    kept = LlavaForConditionalGeneration.from_pretrained(folder, merge_adapter=False)
    assert type(kept).__name__.startswith("PeftModel")
    assert not kept.training
    inputs = tiny.batch(plain.config, ROWS)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, 101)
    tiny.assert_near(kept(**inputs).logits, model(**inputs).logits)
    kept.save_pretrained(tmp_path / "again")  # as peft's own, on a full base

    convert(folder, tmp_path / "hf", layout="hf")
    assert_merged(tiny, LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf"), expected)


def test_pieces_of_an_original_lora_that_are_elsewhere(tiny: SimpleNamespace, tmp_path: Path) -> None:
    _, folder, expected = original_lora(tiny, tmp_path)
    (tmp_path / "vicuna").rename(tmp_path / "base")
    (tmp_path / "clip").rename(tmp_path / "tower")
    for given, message in (
        ({}, r"adapter_config.json: base_model_name_or_path: no directory .*vicuna; or pass base_model="),
        (
            {"base_model": tmp_path / "base"},
            r"config.json: mm_vision_tower: no directory .*; or pass vision_tower=",
        ),
    ):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            LlavaForConditionalGeneration.from_pretrained(folder, **given)
        assert "\n" not in str(caught.value)
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, base_model=tmp_path / "base", vision_tower=tmp_path / "tower", dtype=torch.float32
    )
    assert_merged(tiny, model, expected)


# Names of layers in other versions of transformers, and how peft was told which to take.
def before_4_52(name: str) -> str:
    return classic_name(name)


def memory_4_57(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("rename", [before_4_52, memory_4_57, str], ids=["before-4.52", "4.57", "since-5.6"])
@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], r".*language_model\.(?:.*\.)?(?:q_proj|v_proj)"],
    ids=["list", "expression"],
)
def test_adapters_of_every_version(tiny: SimpleNamespace, tmp_path: Path, rename: Any, targets: Any) -> None:
    model = tiny.ours(tiny.config())
    model.save_pretrained(tmp_path / "base")
    pairs = lora(model, ("q_proj", "v_proj"))
    if isinstance(targets, list):  # hits the tower as well
        generator = torch.Generator().manual_seed(6)
        for name, _ in model.named_modules():
            if "vision_tower" in name and name.endswith(("q_proj", "v_proj")):
                a, b = (torch.randn(shape, generator=generator) for shape in ((R, 24), (24, R)))
                pairs[name] = (a, 0.05 * b)
    save_adapter(tmp_path / "adapter", pairs, rename, tmp_path / "base", target_modules=targets)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    assert_merged(tiny, again, merged(model, pairs, {}))
    kept = LlavaForConditionalGeneration.from_pretrained(tmp_path / "adapter", merge_adapter=False)
    inputs = tiny.batch(model.config, ROWS)
    tiny.assert_near(kept(**inputs).logits, again(**inputs).logits)


def test_a_projector_trained_beside_an_old_adapter(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model, other = tiny.ours(tiny.config()), tiny.ours(tiny.config(), 1)
    model.save_pretrained(tmp_path / "base")
    pairs = lora(model, ("q_proj",))
    settings = {"target_modules": r"language_model\..*q_proj", "modules_to_save": ["multi_modal_projector"]}
    save_adapter(tmp_path / "adapter", pairs, before_4_52, tmp_path / "base", **settings)
    trained = {name: weight for name, weight in other.state_dict().items() if name.startswith(PROJECTOR)}
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    extra = {f"base_model.model.{classic_name(name)}": weight.clone() for name, weight in trained.items()}
    save_file(load_file(file) | extra, file)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    assert_merged(tiny, again, merged(model, pairs, trained))


def test_a_factor_of_its_own_under_an_old_name(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.ours(tiny.config())
    model.save_pretrained(tmp_path / "base")
    pairs = lora(model, ("q_proj",))
    pattern = {"language_model.model.layers.1.self_attn.q_proj": 2 * ALPHA}
    settings = {"target_modules": ["language_model.model.layers.0.self_attn.q_proj"], "alpha_pattern": pattern}
    settings["target_modules"] += list(pattern)
    save_adapter(tmp_path / "adapter", pairs, before_4_52, tmp_path / "base", **settings)
    doubled = "model.language_model.layers.1.self_attn.q_proj"
    pairs[doubled] = (pairs[doubled][0], 2 * pairs[doubled][1])
    assert_merged(tiny, LlavaForConditionalGeneration.from_pretrained(tmp_path / "adapter"), merged(model, pairs, {}))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def wider_base(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.ours(tiny.config({"hidden_size": 40, "num_key_value_heads": 2}))
    (tmp_path / "vicuna" / "model.safetensors").unlink()
    language_model_alone(model, tmp_path / "vicuna")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda f, t: wider_base(t, f.parent), r"vicuna: .*has shape \[\d+, 40\], expected"),
        (lambda f, t: edit(f / "adapter_config.json", target_modules=["qkv"]), "target_modules fit no layer"),
        (lambda f, t: edit(f / "adapter_config.json", target_modules=["q_proj"]), r"unexpected .*lora_A.weight"),
        (lambda f, t: edit(f / "adapter_config.json", r=8), r"has shape \[4, 32\], expected \[8, 32\]"),
        (lambda f, t: edit(f / "adapter_config.json", base_model_name_or_path=None), "names no base model"),
        (lambda f, t: edit(f / "config.json", vocab_size=120), r"has 101 rows, but config.json says vocab_size 120"),
        (lambda f, t: (f / "config.json").unlink(), r"llava-lora/config.json is missing"),
        (lambda f, t: cut(f / "adapter_model.safetensors"), r"adapter_model.safetensors is not a whole safetensors"),
        (lambda f, t: (f / "adapter_model.safetensors").unlink(), r"llava-lora has no weights .adapter_model"),
        (lambda f, t: cut(f / "non_lora_trainables.bin"), r"non_lora_trainables.bin is not a"),
        (lambda f, t: (f / "non_lora_trainables.bin").unlink(), r"missing model.multi_modal_projector"),
        (
            lambda f, t: torch.save(
                {"base_model.model.model.odd.weight": torch.ones(1)}, f / "non_lora_trainables.bin"
            ),
            r"unexpected model.odd.weight",
        ),
    ],
)
def test_adapters_that_do_not_fit(tiny: SimpleNamespace, tmp_path: Path, mistake: Any, message: str) -> None:
    _, folder, _ = original_lora(tiny, tmp_path)
    mistake(folder, tiny)
    before = sorted(tmp_path.rglob("*"))
    for attempt in (
        lambda: LlavaForConditionalGeneration.from_pretrained(folder),
        lambda: convert(folder, tmp_path / "out", layout="hf"),
    ):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


# Adapters of this version's peft, on our model and on transformers'

TARGETS = r"model\.language_model\..*\.(q_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def adapter(model: torch.nn.Module, folder: Path, **settings: object) -> torch.nn.Module:
    """A LoRA with weights of its own, saved by peft; returns peft's own merge of it."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}
    wrapped = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


@pytest.mark.parametrize("trained_by", ["ours", "transformers"])
@pytest.mark.parametrize(
    "settings", [{}, {"modules_to_save": ["multi_modal_projector"]}], ids=["lora", "projector-too"]
)
@pytest.mark.parametrize("layout", ["classic", "memory-5"])
def test_adapters_are_merged(
    tiny: SimpleNamespace, tmp_path: Path, trained_by: str, settings: dict, layout: str
) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    plain = tiny.ours(tiny.config())
    write(plain, base, LAYOUTS[layout])
    cls = LlavaForConditionalGeneration if trained_by == "ours" else transformers.LlavaForConditionalGeneration
    merged = adapter(cls.from_pretrained(base), folder, **settings)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    assert type(model) is LlavaForConditionalGeneration
    assert not model.training
    for name, weight in merged.state_dict().items():
        tiny.assert_near(model.state_dict()[name], weight, 1e-6, name)
    changed = {name for name, weight in plain.state_dict().items() if not torch.equal(weight, model.state_dict()[name])}
    assert len([name for name in changed if "language_model" in name]) == 12
    assert any("projector" in name for name in changed) == bool(settings)

    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in plain.named_parameters() if p.requires_grad
    }

    # What was merged is an ordinary checkpoint, for transformers as well.
    model.save_pretrained(tmp_path / "merged")
    assert_same(transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged"), model)
    inputs = tiny.batch(tiny.config(), ROWS)
    tiny.assert_near(model(**inputs).loss, merged(**inputs).loss)


def test_adapter_beside_its_base_and_in_another_dtype(tiny: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    model = tiny.ours(tiny.config())
    model.save_pretrained(tmp_path / "base")
    adapter(LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"), folder)
    shutil.move(tmp_path / "base", folder / "base")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "base"}))
    again = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_adapter_on_the_head(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.ours(tiny.config()).save_pretrained(tmp_path / "base")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    merged = adapter(base, tmp_path / "adapter", target_modules=["lm_head", "gate_proj"])
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    for name, weight in merged.state_dict().items():
        tiny.assert_near(again.state_dict()[name], weight, 1e-6, name)


def test_adapter_without_a_base(tiny: SimpleNamespace, tmp_path: Path) -> None:
    adapter(tiny.ours(tiny.config()), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"adapter_config.json names no base model"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_adapter_that_does_not_fit_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Adapter weights that find no place, or are not there, are errors, as they are for the base."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny.ours(tiny.config()).save_pretrained(base)
    adapter(LlavaForConditionalGeneration.from_pretrained(base), folder)
    weights = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            LlavaForConditionalGeneration.from_pretrained(folder)
        assert "\n" not in str(caught.value)

    save_file({key: weight for key, weight in weights.items() if key != name}, folder / "adapter_model.safetensors")
    refused(r"missing .*layers.0.self_attn.q_proj.lora_A")
    misshaped = {**weights, name: weights[name][:, 1:].contiguous()}
    save_file(misshaped, folder / "adapter_model.safetensors")
    refused(rf"{name} has shape \[4, 31\], expected \[4, 32\]")
    stray = name.replace("layers.0", "layers.7")
    save_file({**weights, stray: weights[name].clone()}, folder / "adapter_model.safetensors")
    refused(r"unexpected .*layers.7.self_attn.q_proj.lora_A")
