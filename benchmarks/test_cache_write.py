"""New keys and values into a static cache: a decoding step and one prefill (640 tokens).

`torch` is rotary followed by copies, as in the reference. The angles are inputs and not timed: a model makes them once
for all layers. The cache is allocated before the measurement; cache and rotated queries are the results.
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Case, Tensors, benchmark_of, report
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.ops.cache_write import write_cache, write_cache_reference

SLOTS = 1024


def cases(gpu: bool) -> list[Case]:
    """The cases on a GPU (LLaVA-1.5-7B's shapes, bf16), and smaller ones on a CPU."""
    dtype = torch.bfloat16 if gpu else torch.float32
    return [write_case(*shape, dtype) for shape in ([(1, 32, 128), (640, 32, 128)] if gpu else [(64, 8, 64)])]


def write_case(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Case:
    def inputs() -> Tensors:
        q, k, v = torch.randn(3, 1, tokens, heads, dim, device=DEVICE).to(dtype)
        cos, sin = torch.randn(2, 1, tokens, dim, device=DEVICE).to(dtype)
        return {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}

    elements = tokens * heads * dim
    return Case(
        op="cache_write",
        shape=(tokens, heads, dim),
        dtype=dtype,
        backward=False,
        inputs=inputs,
        reference=lambda **inputs: _torch(inputs)(),
        providers=providers(),
        # Queries, keys and values, read and written.
        bytes_moved=6 * elements * dtype.itemsize,
        flops=6 * elements,
    )


def providers() -> dict[str, Callable[[Tensors], Callable]]:
    found = {"torch": _torch}
    if torch.cuda.is_available() and not backend.unavailable("triton"):
        found["triton"] = _triton
    return found


def _arguments(inputs: Tensors) -> tuple[torch.Tensor, ...]:
    k = inputs["k"]
    keys, values = torch.zeros(2, 1, k.shape[2], SLOTS, k.shape[3], device=k.device, dtype=k.dtype)
    return *inputs.values(), torch.zeros((), device=k.device, dtype=torch.int64), keys, values


def _torch(inputs: Tensors) -> Callable:
    def call(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return write_cache_reference(*arguments, None, None), *arguments[-2:]

    return partial(call, *_arguments(inputs))


def _triton(inputs: Tensors) -> Callable:
    def call(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with backend.use_backend("triton", "cache_write"):
            return write_cache(*arguments), *arguments[-2:]

    return partial(call, *_arguments(inputs))


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_cache_write(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
