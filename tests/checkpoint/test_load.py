"""Every HF layout in, the classic one out, nothing missing or left over without an error that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llava_fast.checkpoint.layouts import classic_name
from llava_fast.drop_in import LlavaForConditionalGeneration

ROWS = [[4, "image", 6], [9], [2, "image", 3, "image", 7]]
Rename = Callable[[str], str]

# From our parameter names, which are those of transformers ≥ 5.6 in memory, to each layout.
LAYOUTS: dict[str, Rename] = {
    "classic": classic_name,
    "classic-without-vision-model": lambda name: classic_name(name).replace("vision_model.", ""),
    "memory-5": lambda name: name,
    "memory-4.57": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "classic-text-and-memory-vision": lambda name: name if "vision" in name else classic_name(name),
}


def write(model: torch.nn.Module, folder: Path, rename: Rename, *, binary: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint of one file in some layout; tied heads are left out, as transformers does."""
    tied = model.config.tie_word_embeddings
    weights = {
        rename(name): weight.detach().clone()
        for name, weight in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    store(weights, folder, binary=binary)
    return weights


def store(weights: dict[str, torch.Tensor], folder: Path, *, binary: bool = False) -> None:
    if binary:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_names_on_disk() -> None:
    assert classic_name("lm_head.weight") == "language_model.lm_head.weight"
    assert classic_name("model.language_model.norm.weight") == "language_model.model.norm.weight"
    assert classic_name("model.multi_modal_projector.linear_1.bias") == "multi_modal_projector.linear_1.bias"
    assert classic_name("model.vision_tower.pre_layrnorm.bias") == "vision_tower.vision_model.pre_layrnorm.bias"
    with pytest.raises(ValueError, match=r"'model.norm.weight' is not the name of a parameter"):
        classic_name("model.norm.weight")


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tiny: SimpleNamespace, tmp_path: Path, layout: str, tied: bool, binary: bool) -> None:
    model = tiny.ours(tiny.config({"tie_word_embeddings": tied}))
    write(model, tmp_path, LAYOUTS[layout], binary=binary)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(again, model)
    assert not again.training
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_was_read_the_classic_layout_is_written(tiny: SimpleNamespace, tmp_path: Path, layout: str) -> None:
    model = tiny.ours(tiny.config())
    write(model, tmp_path / "in", LAYOUTS[layout])
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == {classic_name(name) for name in model.state_dict()}
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path / "out"), model)


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_writes_is_read(tiny: SimpleNamespace, tmp_path: Path, tied: bool) -> None:
    theirs = tiny.stock(tiny.config({"tie_word_embeddings": tied}))
    theirs.save_pretrained(tmp_path / "fresh")
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path / "fresh"), theirs)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "fresh")
    loaded.save_pretrained(tmp_path / "again")
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path / "again"), theirs)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "sharded"])
def test_what_we_write_is_read_by_us_and_by_transformers(
    tiny: SimpleNamespace, tmp_path: Path, tied: bool, shards: bool
) -> None:
    config = tiny.config({"tie_word_embeddings": tied})
    model = tiny.ours(config)
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if shards else {}))
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) is shards
    assert (tmp_path / "model.safetensors.index.json").exists() is shards
    names = {name for file in files for name in load_file(file)}
    assert names == {classic_name(n) for n in model.state_dict() if not (tied and n == "lm_head.weight")}
    if shards:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == names
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]

    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(again, model)
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(theirs, model)
    for m in (again, theirs):
        assert (m.lm_head.weight is m.get_input_embeddings().weight) is tied
    inputs = tiny.batch(config, ROWS)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_saved_twice_is_the_same_file(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.ours(tiny.config()).save_pretrained(tmp_path / "one")
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_state_dict_from_elsewhere_is_written(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Trainers gather sharded weights and hand them to save_pretrained."""
    model, other = tiny.ours(tiny.config(), 0), tiny.ours(tiny.config(), 1)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path), other)


def test_a_tied_head_gathered_apart_is_not_written(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Gathered weights are copies, so nothing in them says any more that two of them were one."""
    model = tiny.ours(tiny.config({"tie_word_embeddings": True}))
    gathered = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(again, model)
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_from_config_and_state_dict(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config())
    for rename in LAYOUTS.values():
        weights = {rename(name): weight for name, weight in model.state_dict().items()}
        again = LlavaForConditionalGeneration.from_pretrained(None, config=tiny.config(), state_dict=weights)
        assert_same(again, model)
    del weights["lm_head.weight" if "lm_head.weight" in weights else "language_model.lm_head.weight"]
    with pytest.raises(ValueError, match=r"state_dict: .* missing lm_head.weight"):
        LlavaForConditionalGeneration.from_pretrained(None, config=tiny.config(), state_dict=weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto"])
def test_dtype(tiny: SimpleNamespace, tmp_path: Path, dtype: torch.dtype | str) -> None:
    model = tiny.ours(tiny.config())
    if dtype == "auto":
        model = model.bfloat16()
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    expected = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert {parameter.dtype for parameter in again.parameters()} == {expected}
    assert_same(again, model.to(expected))
    # Rotary frequencies stay exact in whatever dtype the weights are.
    assert again.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors")["language_model.lm_head.weight"].dtype == expected


def test_frozen_tower_layers_stay_frozen_and_are_saved(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.ours(tiny.config())
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    frozen = {name for name, parameter in again.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert "model.vision_tower.post_layernorm.weight" in frozen
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(
        written["vision_tower.vision_model.post_layernorm.weight"], model.model.vision_tower.post_layernorm.weight
    )


def test_derived_buffers_of_old_files_are_passed_over(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.ours(tiny.config())
    weights = write(model, tmp_path, classic_name)
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    store(weights, tmp_path)
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path), model)


def test_attn_implementation_is_accepted(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.ours(tiny.config())
    model.save_pretrained(tmp_path)
    for implementation in ("eager", "sdpa", "flash_attention_2"):
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
        assert_same(again, model)


def test_loading_information(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.ours(tiny.config()).save_pretrained(tmp_path)
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("layout", ["classic", "memory-4.57"])
@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.1.mlp.up_proj.weight",
        "model.multi_modal_projector.linear_2.bias",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "model.vision_tower.encoder.layers.2.mlp.fc1.weight",  # never read, and still a part of the checkpoint
    ],
)
def test_missing_misshaped_and_unexpected_keys(tiny: SimpleNamespace, tmp_path: Path, layout: str, name: str) -> None:
    rename = LAYOUTS[layout]
    model = tiny.ours(tiny.config())
    weights = write(model, tmp_path, rename)
    full = weights.pop(rename(name))

    def refused() -> str:
        store(weights, tmp_path)
        with pytest.raises(ValueError) as caught:
            LlavaForConditionalGeneration.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        return str(caught.value)

    assert f"missing {name}" in refused()
    weights[rename(name)] = full[1:].contiguous()
    assert f"{name} has shape {list(full[1:].shape)}, expected {list(full.shape)}" in refused()
    weights[rename(name)] = full
    extra = rename(name).replace("weight", "scale").replace("bias", "scale")
    weights[extra] = full.clone()
    assert "unexpected" in refused()
    assert extra.rsplit(".", 2)[-2] + ".scale" in refused()


def test_many_missing_keys_are_one_line(tiny: SimpleNamespace, tmp_path: Path) -> None:
    weights = write(tiny.ours(tiny.config()), tmp_path, classic_name)
    text = {name: weight for name, weight in weights.items() if name.startswith("language_model")}
    store(text, tmp_path)
    with pytest.raises(ValueError, match=r"missing model.multi_modal_projector.linear_1.bias.* and \d+ more"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_tied_checkpoint_with_a_head_of_its_own(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Some files carry the tied head, too; equal to the embeddings it is no surprise."""
    model = tiny.ours(tiny.config({"tie_word_embeddings": True}))
    weights = write(model, tmp_path, classic_name)
    weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()
    store(weights, tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(again, model)
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_an_untied_checkpoint_without_a_head_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    weights = write(tiny.ours(tiny.config()), tmp_path, classic_name)
    del weights["language_model.lm_head.weight"]
    store(weights, tmp_path)
    with pytest.raises(ValueError, match=r"missing lm_head.weight"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_ignored_mismatches(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """transformers' own switch, for a head of another size: the rest still has to be complete."""
    weights = write(tiny.ours(tiny.config()), tmp_path, classic_name)
    weights["multi_modal_projector.linear_2.bias"] = torch.zeros(7)
    store(weights, tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert model.model.multi_modal_projector.linear_2.bias.shape == (32,)


def test_nothing_there(tmp_path: Path, tiny: SimpleNamespace) -> None:
    with pytest.raises(OSError, match="nowhere"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "nowhere")
    tiny.config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=str(tmp_path)):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_shard_that_is_not_there(tmp_path: Path, tiny: SimpleNamespace) -> None:
    tiny.ours(tiny.config()).save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(OSError, match=r"model-00002-of"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


# Adapters

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
