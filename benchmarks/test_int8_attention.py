"""Decoding over an int8 cache: one new query per batch row, a static cache [B, G, S, d] that is three quarters full.

The floor counts only the filled slots, with a byte per element and a scale per token and head. `torch` dequantises the
cache before attention; `decode_attention` has the times of a float cache. Shapes are [B, filled, H, G, d].
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Case, Tensors, benchmark_of, report
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.ops.attention import KeyRanges
from llava_fast.ops.attention.int8 import int8_attention, int8_attention_reference


def cases(gpu: bool) -> list[Case]:
    """LLaVA-1.5-7B's heads and one turn with an image (bf16) on a GPU, smaller cases on a CPU."""
    slots, filled, heads, dim = (1024, 768, 32, 128) if gpu else (256, 192, 8, 64)
    dtype = torch.bfloat16 if gpu else torch.float32
    return [
        int8_case(batch, slots, filled, heads, key_heads, dim, dtype)
        for key_heads in (heads, heads // 4)
        for batch in ((1, 8, 32) if gpu else (1,))
    ]


def int8_case(batch: int, slots: int, filled: int, heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> Case:
    def inputs() -> Tensors:
        cache = batch, key_heads, slots
        k, v = (torch.randint(-127, 128, (*cache, dim), device=DEVICE, dtype=torch.int8) for _ in range(2))
        start = torch.zeros(batch, 1, device=DEVICE, dtype=torch.int32)
        return {
            "q": torch.randn(batch, 1, heads, dim, device=DEVICE).to(dtype),
            "k": k.transpose(1, 2),
            "v": v.transpose(1, 2),
            "k_scale": torch.rand(cache, device=DEVICE) / 64,
            "v_scale": torch.rand(cache, device=DEVICE) / 64,
            "start": start,
            "end": start + filled,
        }

    return Case(
        op="int8_attention",
        shape=(batch, filled, heads, key_heads, dim),
        dtype=dtype,
        backward=False,
        inputs=inputs,
        reference=lambda q, k, v, k_scale, v_scale, start, end: (
            int8_attention_reference(q, k, v, k_scale, v_scale, KeyRanges(start, end), dim**-0.5),
        ),
        providers=providers(),
        # Keys, values and their scales of the filled slots, the query and the output.
        bytes_moved=2 * batch * (filled * key_heads * (dim + 4) + heads * dim * dtype.itemsize),
        flops=4 * batch * filled * heads * dim,
    )


def providers() -> dict[str, Callable[[Tensors], Callable]]:
    found = {"torch": partial(_with, "reference")}
    if torch.cuda.is_available() and not backend.unavailable("triton"):
        found["triton"] = partial(_with, "triton")
    return found


def _with(name: str, inputs: Tensors) -> Callable:
    *tensors, start, end = inputs.values()
    ranges = KeyRanges(start, end)

    def call() -> tuple[torch.Tensor]:
        with backend.use_backend(name, "int8_attention"):
            return (int8_attention(*tensors, ranges),)

    return call


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_int8_attention(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
