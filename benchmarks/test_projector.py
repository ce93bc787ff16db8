"""LLaVA-1.5's projector over the patches of 1, 8 and 32 images.

With backward, the gradients of its weights and biases: features come from a frozen tower. `triton` is what the tile
tables choose, the library's GEMM or the fused kernel; `triton-fused` is always the kernel with bias and GELU in its
epilogue. Rows are 576 an image.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Tensors, benchmark_of, function, report
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.ops._launch import forced_tile, tile
from llava_fast.ops.projector import FEW_ROWS, projector, projector_reference

PATCHES = 576


def cases(gpu: bool) -> list[Case]:
    dtype = torch.bfloat16 if gpu else torch.float32
    images = (1, 8, 32) if gpu else (1,)
    widths = (1024, 4096) if gpu else (128, 256)
    return [projector_case(PATCHES * n, *widths, dtype, backward) for n in images for backward in (False, True)]


def projector_case(rows: int, vision: int, width: int, dtype: torch.dtype, backward: bool) -> Case:
    features = torch.randn(rows, vision, device=DEVICE).to(dtype)

    def inputs() -> Tensors:
        def draw(*size: int) -> torch.Tensor:
            return (torch.randn(size, device=DEVICE) * size[-1] ** -0.5).to(dtype)

        return {"w1": draw(width, vision), "b1": draw(width), "w2": draw(width, width), "b2": draw(width)}

    def over_features(fn: Callable) -> Callable:
        # Only tensors in `inputs` get gradients; the features are not among them.
        return lambda w1, b1, w2, b2: (fn(features.to(w1.dtype), [w1, w2], [b1, b2]),)

    # Read the features and the weights, write the rows; backward reads rows' gradients, features and hidden rows, and
    # writes the weights' gradients.
    small, weights = rows * (vision + width), width * (vision + width)
    moved = small + weights + (small + rows * width + 2 * weights) * backward
    # Backward: both weights' gradients, and that of the hidden rows.
    products = rows * width * (vision + width) + (rows * width * (vision + 2 * width)) * backward
    return Case(
        op="projector",
        shape=(rows, vision, width),
        dtype=dtype,
        backward=backward,
        inputs=inputs,
        reference=over_features(projector_reference),
        providers={name: function(over_features(fn)) for name, fn in providers().items()},
        bytes_moved=moved * dtype.itemsize,
        flops=2 * products,
    )


def providers() -> dict[str, Callable]:
    if not torch.cuda.is_available():
        return {"torch": _torch, "reference": projector_reference}
    found = {"torch": _torch, "compile": torch.compile(_torch)}
    if not backend.unavailable("triton"):
        found |= {"triton": _triton, "triton-fused": _triton_fused}
    return found


def _torch(x, weights, biases):
    (w1, w2), (b1, b2) = weights, biases
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def _triton(x, weights, biases):
    with backend.use_backend("triton", "projector"):
        return projector(x, weights, biases)


def _triton_fused(x, weights, biases):
    size = f"{'single' if x.dtype == torch.float32 else 'half'}_{'few' if x.shape[0] <= FEW_ROWS else 'many'}"
    with forced_tile("projector_fwd", {**tile("projector_fwd", size, x.device), "LIBRARY": 0}):
        return _triton(x, weights, biases)


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_projector(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
