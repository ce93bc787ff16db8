"""`from_pretrained` reads every HF layout, whole and in shards, in any dtype."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llava_fast.checkpoint.layouts import classic_name
from llava_fast.drop_in import LlavaForConditionalGeneration
from tests.checkpoint.files import LAYOUTS, assert_same, store, write


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


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_writes_is_read(tiny: SimpleNamespace, tmp_path: Path, tied: bool) -> None:
    theirs = tiny.stock(tiny.config({"tie_word_embeddings": tied}))
    theirs.save_pretrained(tmp_path / "fresh")
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path / "fresh"), theirs)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "fresh")
    loaded.save_pretrained(tmp_path / "again")
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path / "again"), theirs)


def test_from_config_and_state_dict(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config())
    for rename in LAYOUTS.values():
        weights = {rename(name): weight for name, weight in model.state_dict().items()}
        again = LlavaForConditionalGeneration.from_pretrained(None, config=tiny.config(), state_dict=weights)
        assert_same(again, model)
    del weights["lm_head.weight" if "lm_head.weight" in weights else "language_model.lm_head.weight"]
    with pytest.raises(ValueError, match=r"state_dict: .* missing lm_head.weight"):
        LlavaForConditionalGeneration.from_pretrained(None, config=tiny.config(), state_dict=weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_dict_is_loaded_under_the_names_of_any_layout(tiny: SimpleNamespace, layout: str) -> None:
    model, other = tiny.ours(tiny.config(), 0), tiny.ours(tiny.config(), 1)
    other.load_state_dict({LAYOUTS[layout](name): weight for name, weight in model.state_dict().items()})
    assert_same(other, model)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"another.weight\""):
        other.load_state_dict({**model.state_dict(), "another.weight": torch.zeros(1)})


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


def test_a_tied_checkpoint_with_a_head_of_its_own(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Some files carry the tied head, too; equal to the embeddings it is no surprise."""
    model = tiny.ours(tiny.config({"tie_word_embeddings": True}))
    weights = write(model, tmp_path, classic_name)
    weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()
    store(weights, tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(again, model)
    assert again.lm_head.weight is again.get_input_embeddings().weight


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
