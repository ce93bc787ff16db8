"""Decoded photographs to rows of the language model: resize, normalise, tower, projector; 1, 8 and 32 images.

The end-to-end latency, with host work and copies, so no CUDA graph can be used. `hf` is transformers' image processor
and model; `triton` resizes with Pillow on the host, `triton-device` on the device.
"""

from collections.abc import Callable

import torch
from transformers import LlavaImageProcessorPil

from benchmarks.harness import Call, Case, Tensors, benchmark_of, report
from benchmarks.records import DEVICE
from benchmarks.test_resize import SIZES, pil_squares
from benchmarks.test_tower import OPERATIONS, config, model, work
from llava_fast import backend
from llava_fast.ops.patch_embed import CLIP_MEAN, CLIP_STD
from llava_fast.ops.resize import preprocess


def cases(gpu: bool) -> list[Case]:
    dtype = torch.bfloat16 if gpu else torch.float32
    return [rows_case(images, dtype, large=gpu) for images in ((1, 8, 32) if gpu else (1, 4))]


def rows_case(images: int, dtype: torch.dtype, *, large: bool) -> Case:
    sizes = [SIZES[i % 4] for i in range(images)]
    side = config(large).vision_config.image_size

    def inputs() -> Tensors:
        photographs = {
            f"image{i}": torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
            for i, (height, width) in enumerate(sizes)
        }
        # `like` carries the model's dtype, since the harness verifies and measures in different dtypes.
        return {**photographs, "like": torch.zeros(1, device=DEVICE, dtype=dtype)}

    flops, weights, results = work(images, large)
    return Case(
        op="image_rows",
        shape=(images, side),
        dtype=dtype,
        backward=False,
        inputs=inputs,
        reference=lambda like, **images: _hf(large)({"like": like, **images})(),
        providers=providers(large),
        bytes_moved=sum(3 * height * width for height, width in sizes) + (weights + results) * dtype.itemsize,
        flops=flops,
        capturable=False,
    )


def providers(large: bool) -> dict[str, Callable[[Tensors], Call]]:
    found = {"hf": _hf(large)}
    if not torch.cuda.is_available():
        return {**found, "reference": _ours("reference", large, on_device=False)}
    if not backend.unavailable("triton"):
        found["triton"] = _ours("triton", large, on_device=False)
        if not backend.unavailable("cuda"):
            found["triton-device"] = _ours("triton", large, on_device=True)
    return found


def _hf(large: bool) -> Callable[[Tensors], Call]:
    side = config(large).vision_config.image_size
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )

    def provider(inputs: Tensors) -> Call:
        like, images = inputs["like"], [t.numpy() for name, t in inputs.items() if name != "like"]
        stock = model(large, like.dtype, stock=True)

        def call():
            pixels = processor(images, return_tensors="pt")["pixel_values"].to(like)
            return (torch.cat(list(stock.get_image_features(pixels).pooler_output)),)

        return call

    return provider


def _ours(name: str, large: bool, *, on_device: bool) -> Callable[[Tensors], Call]:
    side = config(large).vision_config.image_size

    def provider(inputs: Tensors) -> Call:
        like, images = inputs["like"], [t for name, t in inputs.items() if name != "like"]

        def call():
            if on_device:
                pixels = preprocess(images, size=side, device=DEVICE)
            else:
                pixels = pil_squares(images, side).to(DEVICE)
            with backend.use_backend(name, *OPERATIONS):
                return (torch.cat(model(large, like.dtype).get_image_features(pixels).pooler_output),)

        return call

    return provider


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_image_rows(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
