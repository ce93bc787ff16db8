"""Attention over a pack of samples: by key range, and PyTorch's SDPA with the dense mask that says the same.

The mask is made once, outside of what is timed, as a model makes it once for all its layers. Rows are the tokens of a
pack of samples of about the length of a LLaVA turn with its image.
"""

import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Tensors, benchmark_of, function, report
from benchmarks.records import DEVICE
from llava_fast.ops.attention import attention, attention_reference
from llava_fast.sequence import pack

# Scaled down to what a CPU does in time; on a GPU 832 tokens are 576 of an image and 256 of text.
LENGTHS = {False: (160, 97, 144, 201, 33, 150, 128, 111), True: (832, 704, 832, 641, 832, 255)}


def cases(gpu: bool) -> list[Case]:
    heads, dim = (32, 128) if gpu else (8, 64)
    dtype = torch.bfloat16 if gpu else torch.float32
    return [packed_causal_case(LENGTHS[gpu], heads, dim, dtype, backward) for backward in (False, True)]


def packed_causal_case(lengths: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype, backward: bool) -> Case:
    tokens = sum(lengths)

    def inputs() -> Tensors:
        q, k, v = (torch.randn(1, tokens, heads, dim, device=DEVICE).to(dtype) for _ in range(3))
        packed = pack(lengths)
        return {"q": q, "k": k, "v": v, "start": packed.key_start.to(DEVICE), "end": packed.key_end.to(DEVICE)}

    # Forward reads q, k, v and writes the output; backward reads those and the output's gradient, writes three.
    passes = 4 + 8 * backward
    # Two products forward and five backward, each 2 · d operations for every visible pair of tokens.
    products = 2 + 5 * backward
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return Case(
        op="attention",
        shape=(1, tokens, heads, dim),
        dtype=dtype,
        backward=backward,
        inputs=inputs,
        reference=lambda q, k, v, start, end: (attention_reference(q, k, v, start, end, dim**-0.5),),
        providers={"torch": _masked_sdpa, "reference": function(_by_range)},
        bytes_moved=passes * tokens * heads * dim * dtype.itemsize,
        flops=products * 2 * dim * heads * pairs,
    )


def _by_range(q, k, v, start, end):
    return (attention(q, k, v, start, end),)


def _masked_sdpa(inputs: Tensors):
    q, k, v, start, end = (inputs[name] for name in ("q", "k", "v", "start", "end"))
    key = torch.arange(k.shape[1], device=k.device)
    mask = (key >= start[..., None]) & (key < end[..., None])  # [1, T, T]

    def call():
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return (F.scaled_dot_product_attention(*heads_first, attn_mask=mask[:, None]).transpose(1, 2),)

    return call


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_attention(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
