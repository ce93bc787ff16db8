"""Checkpoints of the original code, whole and in pieces: read without a model, and into one."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from llava_fast.checkpoint.weights import open_weights
from llava_fast.drop_in import LlavaForConditionalGeneration
from tests.checkpoint.files import KINDS, assert_grown, assert_same, make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", [False, True], ids=["tower-apart", "tower-inside"])
def test_an_original_checkpoint_is_read(tiny: SimpleNamespace, tmp_path: Path, kind: str, tower: bool) -> None:
    model = make(tiny, kind)
    clip = tiny.save_clip(model, tmp_path / "clip")
    folder = tiny.as_released(model, tmp_path / "original", str(clip), tower=tower)
    again = LlavaForConditionalGeneration.from_pretrained(folder)
    assert_grown(again, model, tiny)
    assert not again.training
    assert again.name_or_path == str(folder)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is (kind == "tied")
    assert again.config.image_aspect_ratio == "pad"


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_original_files_of_every_format(tiny: SimpleNamespace, tmp_path: Path, binary: bool, shards: int) -> None:
    model = make(tiny)
    clip = tiny.save_clip(model, tmp_path / "original" / "tower", prefix="")  # named relative to the checkpoint
    shutil.move(tmp_path / "original", tmp_path / "aside")
    folder = tiny.as_released(model, tmp_path / "original", "tower", binary=binary, shards=shards)
    shutil.move(tmp_path / "aside" / "tower", clip)
    assert_grown(LlavaForConditionalGeneration.from_pretrained(folder), model, tiny)
    again = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_a_model_outlives_its_files(tiny: SimpleNamespace, tmp_path: Path, binary: bool) -> None:
    """Files are mapped into memory; saving over them must not change a model that was read from them."""
    model = make(tiny)
    clip = tiny.save_clip(model, tmp_path / "clip")
    folder = tiny.as_released(model, tmp_path / "original", str(clip), binary=binary)
    again = LlavaForConditionalGeneration.from_pretrained(folder)
    for file in (*folder.iterdir(), clip / "model.safetensors"):
        size = file.stat().st_size
        with open(file, "r+b") as opened:
            opened.write(bytes(size))
    assert_grown(again, model, tiny)


def test_names_of_the_hub_are_found_in_the_cache(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(tiny)

    def cached(name: str) -> Path:
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots").mkdir()
        return folder / "snapshots" / ("0" * 40)

    tiny.save_clip(model, cached("openai/clip"))
    snapshot = tiny.as_released(model, cached("liuhaotian/llava"), "openai/clip")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_grown(LlavaForConditionalGeneration.from_pretrained("liuhaotian/llava"), model, tiny)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no weights are in .*, the copy of liuhaotian/llava, and .* HF_HUB_OFFLINE"
    ):
        LlavaForConditionalGeneration.from_pretrained("liuhaotian/llava")


def test_the_tower_that_is_passed_comes_first(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model, other = make(tiny), tiny.ours(tiny.config(), 1)
    clip = tiny.save_clip(other, tmp_path / "other")
    folder = tiny.as_released(model, tmp_path / "original", str(tiny.save_clip(model, tmp_path / "clip")), tower=True)
    model.save_pretrained(tmp_path / "hf")
    for path in (folder, tmp_path / "hf"):
        again = LlavaForConditionalGeneration.from_pretrained(path, vision_tower=clip)
        assert_same(again.model.vision_tower, other.model.vision_tower)
        assert_same(again.model.multi_modal_projector, model.model.multi_modal_projector)


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_projector_of_stage_1(tiny: SimpleNamespace, tmp_path: Path, ending: str) -> None:
    model, other = make(tiny), tiny.ours(tiny.config(), 1)
    file = tmp_path / f"mm_projector.{ending}"
    other.save_projector(file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert open_weights(file).keys() == {f"model.mm_projector.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    model.save_pretrained(tmp_path / "hf")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", mm_projector=file)
    assert_same(again.model.multi_modal_projector, other.model.multi_modal_projector)
    assert_same(again.model.language_model, model.model.language_model)

    # On a bare language model, as the original code starts stage 2.
    base = tmp_path / "text"
    text = {k: v.clone() for k, v in model.model.language_model.state_dict().items()}
    weights = {f"model.{name}": weight for name, weight in text.items()} | {"lm_head.weight": model.lm_head.weight}
    model.config.text_config.save_pretrained(base)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, base / "model.safetensors")
    clip = tiny.save_clip(model, tmp_path / "clip")
    again = LlavaForConditionalGeneration.from_pretrained(base, mm_projector=file, vision_tower=clip)
    model.model.multi_modal_projector.load_state_dict(other.model.multi_modal_projector.state_dict())
    assert_grown(again, model, tiny)

    # The config that stage 1 leaves beside its projector says which feature layer it was trained on.
    config = json.loads((tiny.as_released(model, tmp_path / "stage1", str(clip)) / "config.json").read_text())
    (tmp_path / "stage1" / "config.json").write_text(json.dumps({**config, "mm_vision_select_layer": -1}))
    shutil.copy(file, tmp_path / "stage1")
    again = LlavaForConditionalGeneration.from_pretrained(base, mm_projector=tmp_path / "stage1" / file.name)
    assert again.config.vision_feature_layer == -1


def test_projector_without_a_projector(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.ours(tiny.config()).save_pretrained(tmp_path / "hf")
    save_file({"model.norm.weight": torch.zeros(3)}, tmp_path / "mm_projector.safetensors")
    with pytest.raises(ValueError, match=r"mm_projector.safetensors has no key with 'mm_projector.' in it"):
        LlavaForConditionalGeneration.from_pretrained(
            tmp_path / "hf", mm_projector=tmp_path / "mm_projector.safetensors"
        )
    save_file({"model.mm_projector.0.weight": torch.zeros(3)}, tmp_path / "mm_projector.safetensors")
    with pytest.raises(ValueError, match=r"missing model.multi_modal_projector.linear_1.bias"):
        LlavaForConditionalGeneration.from_pretrained(
            tmp_path / "hf", mm_projector=tmp_path / "mm_projector.safetensors"
        )


def test_a_language_model_alone(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.config().text_config.save_pretrained(tmp_path)
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model_type is 'llama', a language model alone; pass mm_projector=FILE"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)
