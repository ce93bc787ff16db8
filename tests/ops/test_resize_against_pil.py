"""Resizing as PIL does it, to the bit: against PIL itself, transformers' image processor and ours."""

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaImageProcessorPil

from llava_fast.ops.resize import preprocess
from llava_fast.processor.processor import LlavaProcessor

GREY = (122, 116, 104)


def picture(height: int, width: int, seed: int = 0, contrast: bool = False) -> torch.Tensor:
    """Noise; with `contrast` black or white only, where rounding and overshoot are largest."""
    draw = np.random.default_rng(seed).integers(0, 2 if contrast else 256, (height, width, 3)) * (
        255 if contrast else 1
    )
    return torch.from_numpy(draw.astype(np.uint8))


def by_pil(image: torch.Tensor, size: int, fill: tuple[int, int, int] | None) -> torch.Tensor:
    """The whole picture resized by PIL, then cropped; or pasted on a square, then resized."""
    pil = Image.fromarray(image.numpy())
    if fill is not None:
        side = max(pil.size)
        square = Image.new("RGB", (side, side), fill)
        square.paste(pil, ((side - pil.width) // 2, (side - pil.height) // 2))
        return torch.from_numpy(np.array(square.resize((size, size), Image.Resampling.BICUBIC)))
    long_edge = int(size * max(pil.size) / min(pil.size))
    shape = (size, long_edge) if pil.width <= pil.height else (long_edge, size)
    pil = pil.resize(shape, Image.Resampling.BICUBIC)
    left, top = (pil.width - size) // 2, (pil.height - size) // 2
    return torch.from_numpy(np.array(pil.crop((left, top, left + size, top + size))))


@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    size=st.integers(1, 60),
    fill=st.sampled_from([None, GREY, (0, 255, 3)]),
    contrast=st.booleans(),
    seed=st.integers(0, 9),
)
@example(height=1, width=1, size=7, fill=None, contrast=False, seed=0)
@example(height=1, width=150, size=5, fill=None, contrast=False, seed=0)
@example(height=150, width=1, size=5, fill=GREY, contrast=True, seed=0)
@example(height=72, width=34, size=27, fill=None, contrast=True, seed=0)  # PIL 13 resizes columns first
@example(height=24, width=24, size=24, fill=None, contrast=False, seed=0)  # and copies what has the size already
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equal_to_pil(height, width, size, fill, contrast, seed):
    assume(max(height, width) / min(height, width) * size < 10_000)
    image = picture(height, width, seed, contrast)
    found = preprocess([image], size=size, fill=fill)
    assert torch.equal(found[0], by_pil(image, size, fill))


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (1031, 517), (1200, 336), (250, 3)])
@pytest.mark.parametrize("fill", [None, GREY])
def test_equal_to_pil_at_full_size(height, width, fill):
    image = picture(height, width)
    assert torch.equal(preprocess([image], size=336, fill=fill)[0], by_pil(image, 336, fill))


@pytest.mark.parametrize("pad", [False, True])
def test_equal_to_the_processor(pad, tiny_checkpoint):
    processor = LlavaProcessor.from_pretrained(tiny_checkpoint)
    processor.pad_to_square = pad
    images = [picture(40, 57), picture(90, 31, 1), picture(28, 28, 2), picture(9, 12, 3), picture(28, 61, 4)]
    fill = tuple(int(255 * mean) for mean in processor.image_processor.image_mean) if pad else None
    expected = np.stack([processor.image_pixels(image.numpy()) for image in images])
    assert torch.equal(preprocess(images, size=28, fill=fill), torch.from_numpy(expected))


def test_equal_to_transformers():
    image = picture(50, 75)
    stock = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = stock(image.numpy(), do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(preprocess([image], size=28)[0].numpy(), expected.transpose(1, 2, 0))
