"""What is written: the classic HF layout, the original's, and the projector alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llava_fast.checkpoint.layouts import classic_name
from llava_fast.drop_in import LlavaForConditionalGeneration
from tests.checkpoint.files import KINDS, LAYOUTS, ROWS, assert_same, make, write


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_was_read_the_classic_layout_is_written(tiny: SimpleNamespace, tmp_path: Path, layout: str) -> None:
    model = tiny.ours(tiny.config())
    write(model, tmp_path / "in", LAYOUTS[layout])
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == {classic_name(name) for name in model.state_dict()}
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path / "out"), model)


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


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_saved_where_it_was_read(tiny: SimpleNamespace, tmp_path: Path, layout: str) -> None:
    model = make(tiny)
    model.save_pretrained(tmp_path, layout=layout, **({} if layout == "hf" else {"mm_vision_tower": "nobody/clip"}))
    LlavaForConditionalGeneration.from_pretrained(tmp_path).save_pretrained(tmp_path, layout=layout)
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path), model)


def test_a_projector_of_another_ending_is_not_written(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mm_projector.pt ends in '.pt'; expected .bin or .safetensors"):
        make(tiny).save_projector(tmp_path / "mm_projector.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_the_original_layout(tiny: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    model = make(tiny, kind)
    clip = tiny.save_clip(model, tmp_path / "clip")
    model.save_pretrained(tmp_path / "with", layout="original", mm_vision_tower="nobody/has-this-clip")
    model.save_pretrained(tmp_path / "without", layout="original", mm_vision_tower=str(clip), with_tower=False)
    inside = load_file(tmp_path / "with" / "model.safetensors").keys()
    outside = load_file(tmp_path / "without" / "model.safetensors").keys()
    assert {name for name in inside if "vision" in name} == inside - outside
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias" in inside
    settings = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("with", "without")]
    assert [flat["unfreeze_mm_vision_tower"] for flat in settings] == [True, False]
    inputs = tiny.batch(model.config, ROWS)
    for name in ("with", "without"):
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path / name)
        assert_same(again, model)
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        assert again.config.image_token_index == tiny.IMAGE


@pytest.mark.parametrize("file", ["mm_projector.bin", "mm_projector.safetensors"])
def test_a_projector_half_written_is_not_left(tiny: SimpleNamespace, tmp_path: Path, file: str) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = tiny.ours(tiny.config())
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=rf"{file}.partial'$"):
            model.save_projector(tmp_path / file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_arguments_by_position_as_in_transformers(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """is_main_process and state_dict; who is not the main process writes no config."""
    model, other = tiny.ours(tiny.config(), 0), tiny.ours(tiny.config(), 1)
    for layout in ("hf", "original"):
        options = {"layout": layout} | ({"mm_vision_tower": "nobody/clip"} if layout == "original" else {})
        model.save_pretrained(tmp_path / layout, True, other.state_dict(), **options)
        assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path / layout), other)
        model.save_pretrained(tmp_path / f"{layout}-beside", False, **options)
        assert not (tmp_path / f"{layout}-beside" / "config.json").exists()
