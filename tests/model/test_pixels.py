"""uint8 pixels are normalised as the image processor beside the weights says, or refused in one line."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from llava_fast.model.pixels import keep_normalisation, read_normalisation
from llava_fast.model.vision import pixel_normalisation
from llava_fast.ops.patch_embed import CLIP_MEAN, CLIP_STD, Normalisation, folded

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)


def by_transformers(**options: Any) -> np.ndarray:
    """Float pixels [N, H, W, 3] as transformers makes them of PIXELS."""
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, **options)
    return processor(list(PIXELS), return_tensors="np", input_data_format="channels_last")["pixel_values"].transpose(
        0, 2, 3, 1
    )


NUMBERS = st.floats(-2, 2, allow_subnormal=False)
DEVIATIONS = st.floats(0.05, 3)


@settings(max_examples=60, deadline=None)
@given(
    image_mean=st.lists(NUMBERS, min_size=3, max_size=3),
    image_std=st.lists(DEVIATIONS, min_size=3, max_size=3),
    rescale_factor=st.sampled_from([1 / 255, 1 / 127.5, 0.01, 1.0, -0.5]),
    do_rescale=st.booleans(),
    do_normalize=st.booleans(),
)
def test_settings_are_folded_into_mean_and_deviation(**options: Any) -> None:
    mean, std = folded(options)
    ours = (PIXELS / 255 - np.array(mean)) / np.array(std)
    theirs = by_transformers(**options)
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max())


def test_settings_that_say_nothing_are_clips() -> None:
    assert folded({}) == folded({"image_mean": None, "do_rescale": None}) == Normalisation(CLIP_MEAN, CLIP_STD)
    assert folded(CLIPImageProcessorPil().to_dict()) == Normalisation()
    assert folded({"image_mean": 0.5, "image_std": [0.5, 0.25, 1]}) == ((0.5,) * 3, (0.5, 0.25, 1.0))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rescale_factor": 0}, "rescale_factor is 0, which cannot be 0"),
    ({"rescale_factor": "1/255"}, "rescale_factor is '1/255', expected a number"),
    ({"rescale_factor": [1, 2]}, r"rescale_factor is \[1, 2\], expected a number"),
    ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\], expected three numbers"),
    ({"image_mean": {"r": 1}}, r"image_mean is {'r': 1}, expected three numbers"),
    ({"image_mean": [0.5, True, 0.5]}, r"image_mean is \[0.5, True, 0.5\], expected three numbers"),
    ({"image_std": [1, float("nan"), 1]}, r"image_std is \[1, nan, 1\], expected three numbers"),
    ({"image_std": [0.5, 0, 0.5]}, r"image_std is \[0.5, 0, 0.5\], which cannot be 0"),
    ({"do_rescale": "no"}, "do_rescale is 'no', expected true or false"),
    ({"do_normalize": 1}, "do_normalize is 1, expected true or false"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_settings_that_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        folded(options)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(options))
    with pytest.raises(ValueError, match=f"^{file}: {message}$"):
        read_normalisation(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "[" * 10**5, "\xff"])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_files_that_are_damaged(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=f"^{tmp_path / name}: ") as caught:
        read_normalisation(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_file_that_transformers_takes_is_read(tmp_path: Path) -> None:
    assert read_normalisation(tmp_path) is None
    assert read_normalisation("nobody/has-this") is None
    old, nested = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    nested.write_text('{"patch_size": 14}')
    assert read_normalisation(tmp_path) is None
    for mean, write in (
        (0.25, lambda options: old.write_text(json.dumps(options))),
        (0.75, lambda options: nested.write_text(json.dumps({"image_processor": options}))),
    ):
        write(LlavaImageProcessorPil(image_mean=[mean] * 3).to_dict())
        found = read_normalisation(tmp_path)
        assert found is not None
        assert found[0].mean == tuple(LlavaImageProcessorPil.from_pretrained(tmp_path).image_mean) == (mean,) * 3
        assert found[1] == (old if mean == 0.25 else nested)


def test_a_config_keeps_what_was_found_and_contradicts_what_is_not_its_own(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    assert pixel_normalisation(config) == Normalisation()
    keep_normalisation(config, None)
    assert not hasattr(config, "image_mean")
    other = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    keep_normalisation(config, (other, Path("clip/preprocessor_config.json")))
    assert (config.image_mean, config.image_std) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    keep_normalisation(config, (other, Path("again.json")))
    keep_normalisation(config, None)
    assert pixel_normalisation(config) == other
    with pytest.raises(ValueError) as caught:
        keep_normalisation(config, (Normalisation(), Path("clip/preprocessor_config.json")))
    assert str(caught.value) == (
        "clip/preprocessor_config.json normalises pixels with mean and deviation (0.4815, 0.4578, 0.4082) and (0.2686, "
        "0.2613, 0.2758), but the model's config (image_mean, image_std) with (0.5, 0.4, 0.3) and (0.2, 0.3, 0.4)"
    )
    config.image_mean = "gray"
    with pytest.raises(ValueError, match="image_mean is 'gray', expected three numbers"):
        keep_normalisation(config, None)


def test_numbers_in_the_config_are_checked_when_the_model_is_made(tiny: SimpleNamespace, tmp_path: Path) -> None:
    assert pixel_normalisation(tiny.ours(tiny.config(image_mean=0.5)).config).mean == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"image_mean is \[0.5, 0.5\], expected three numbers"):
        tiny.ours(tiny.config(image_mean=[0.5, 0.5]))
    model = tiny.ours(tiny.config())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_std": [0, 1, 1]}))
    with pytest.raises(ValueError, match=r"config.json: image_std is \[0, 1, 1\], which cannot be 0"):
        type(model).from_pretrained(tmp_path)
