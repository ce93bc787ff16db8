"""Decoded images of several sizes to the tower's square: shorter side to 336, centre crop, for 1, 8 and 32 images.

Images start on the host, after decoding, and results are on the device: copies are timed. The harness compares floating
results, so every provider ends with a conversion of the uint8 result to float32.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from transformers import LlavaImageProcessorPil

from benchmarks.harness import Case, Tensors, benchmark_of, function, report
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.ops.resize import preprocess

SIZES = ((480, 640), (640, 480), (427, 640), (500, 375))  # height, width: photographs as datasets keep them


def cases(gpu: bool) -> list[Case]:
    """The cases on a GPU, and smaller ones on a CPU."""
    if gpu:
        return [resize_case([SIZES[i % 4] for i in range(images)], 336) for images in (1, 8, 32)]
    return [resize_case([(height // 4, width // 4) for height, width in SIZES[:images]], 56) for images in (1, 4)]


def resize_case(sizes: list[tuple[int, int]], side: int) -> Case:
    def inputs() -> Tensors:
        return {
            f"image{i}": torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
            for i, (height, width) in enumerate(sizes)
        }

    # Images are read and results written; each pass of the resize takes about four times the scale, and no less than
    # four, multiplications and additions for a value.
    values = 3 * side**2 * len(sizes)
    taps = sum(4 * max(min(shape) / side, 1) for shape in sizes) / len(sizes)
    rows = sum(height / min(height, width) for height, width in sizes) / len(sizes)
    return Case(
        op="resize",
        shape=(len(sizes), side),
        dtype=torch.float32,
        backward=False,
        inputs=inputs,
        reference=_with_backend("reference", side),
        providers=providers(side),
        bytes_moved=sum(3 * height * width for height, width in sizes) + values,
        flops=int(2 * values * taps * (1 + rows)),
    )


def providers(side: int) -> dict[str, Callable[[Tensors], Callable]]:
    """The providers. `hf` is transformers' image processor, `pil` Pillow alone, which it calls."""
    found = {"hf": _hf(side), "pil": function(_pil(side))}
    if not torch.cuda.is_available():
        return {**found, "reference": function(_with_backend("reference", side))}
    if not backend.unavailable("cuda"):
        found["cuda"] = function(_with_backend("cuda", side))
    return found


def _with_backend(name: str, side: int) -> Callable:
    def call(**images):
        with backend.use_backend(name, "resize"):
            return (preprocess(list(images.values()), size=side, device=DEVICE).float(),)

    return call


def _hf(side: int) -> Callable[[Tensors], Callable]:
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_rescale=False,
        do_normalize=False,
    )

    def provider(inputs: Tensors) -> Callable:
        images = [image.numpy() for image in inputs.values()]

        def call():
            pixels_BCHW = processor(images, return_tensors="np")["pixel_values"]
            return (torch.from_numpy(np.asarray(pixels_BCHW)).to(DEVICE).permute(0, 2, 3, 1).float(),)

        return call

    return provider


def pil_squares(images: list[torch.Tensor], side: int) -> torch.Tensor:
    """uint8 [B, side, side, 3] on the host, by Pillow."""

    def square(image: torch.Tensor) -> np.ndarray:
        pil = Image.fromarray(image.numpy())
        scaled = int(side * max(pil.size) / min(pil.size))
        shape = (side, scaled) if pil.width <= pil.height else (scaled, side)
        pil = pil.resize(shape, Image.Resampling.BICUBIC)
        left, top = (pil.width - side) // 2, (pil.height - side) // 2
        return np.asarray(pil.crop((left, top, left + side, top + side)))

    return torch.from_numpy(np.stack([square(image) for image in images]))


def _pil(side: int) -> Callable:
    return lambda **images: (pil_squares(list(images.values()), side).to(DEVICE).float(),)


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_resize(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
