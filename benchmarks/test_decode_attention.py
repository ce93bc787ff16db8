"""Decoding: one new query per batch row over a static cache [B, G, S, d] that is three quarters full.

The floor counts only the filled slots. `torch` is SDPA over the whole cache with a mask, as transformers runs it on a
static cache; the mask is not timed, as it is made once per step for all layers. Shapes are [B, filled, H, d],
with GQA [B, filled, H, G, d].
"""

from __future__ import annotations

import torch

from benchmarks.attention_providers import providers
from benchmarks.harness import Case, Tensors, benchmark_of, report
from benchmarks.records import DEVICE
from llava_fast.ops.attention import KeyRanges, attention_reference


def cases(gpu: bool) -> list[Case]:
    """LLaVA-1.5-7B's heads and one turn with an image (bf16) on a GPU, smaller cases on a CPU."""
    if gpu:
        slots, filled, heads, groups, dim, dtype = 1024, 768, 32, 8, 128, torch.bfloat16
    else:
        slots, filled, heads, groups, dim, dtype = 256, 192, 8, 2, 64, torch.float32
    return [
        decode_case(batch, slots, filled, heads, key_heads, dim, dtype)
        for key_heads in (heads, groups)
        for batch in ((1, 8, 32) if gpu else (1, 8))
    ]


def decode_case(batch: int, slots: int, filled: int, heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> Case:
    def inputs() -> Tensors:
        q = torch.randn(batch, 1, heads, dim, device=DEVICE).to(dtype)
        k, v = (torch.randn(batch, key_heads, slots, dim, device=DEVICE).to(dtype).transpose(1, 2) for _ in range(2))
        start = torch.zeros(batch, 1, device=DEVICE, dtype=torch.int32)
        return {"q": q, "k": k, "v": v, "start": start, "end": start + filled}

    return Case(
        op="decode_attention" if key_heads == heads else "decode_attention_gqa",
        shape=(batch, filled, heads, dim) if key_heads == heads else (batch, filled, heads, key_heads, dim),
        dtype=dtype,
        backward=False,
        inputs=inputs,
        reference=lambda q, k, v, start, end: (attention_reference(q, k, v, KeyRanges(start, end), dim**-0.5),),
        providers=providers(),
        # Keys and values of the filled slots, the query and the output.
        bytes_moved=2 * batch * dim * (filled * key_heads + heads) * dtype.itemsize,
        # Two products of 2 · d operations per key and query head.
        flops=4 * batch * filled * heads * dim,
    )


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_decode_attention(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
