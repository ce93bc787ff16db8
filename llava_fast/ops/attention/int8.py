"""Decode attention over a cache of int8 keys and values, with one scale per token and head.

    out = Σ_s p_s · v_scale_s · v_s,   p = softmax_s(scale · k_scale_s · q · k_s)        over each query's range of keys

The kernel is that of `decode.py`. It casts keys and values to the queries' dtype in registers, which is exact, and
applies the scales to scores and probabilities: no dequantised tensor is written to memory, and a step reads d + 4 bytes
per key or value, where bf16 has 2 · d (132 for 256 at d = 128). For more queries than `decode_attention` takes, keys
and values are dequantised once, and `attention` runs on them.

Forward only. Shapes: B batch, T queries, S keys, H query heads, G key heads, d head dimension.
"""

from __future__ import annotations

import torch

from llava_fast.backend import choose, differentiated, observed, register
from llava_fast.ops._triton import takes
from llava_fast.ops.attention import KeyRanges, attention_reference, range_attention
from llava_fast.ops.attention.decode import finished_of, launch_decode, splits_of, takes_decode
from llava_fast.ops.attention.tiles import MAX_HEAD_DIM
from llava_fast.ops.cache_write import dequantise


def int8_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    ranges: KeyRanges,
    scale: float,
) -> torch.Tensor:
    k, v = (dequantise(x, s.transpose(1, 2), q.dtype) for x, s in ((k, k_scale), (v, v_scale)))
    return attention_reference(q, k, v, ranges, scale)


def _int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return launch_decode(q, k, v, start, end, scale, splits_of(q, k), k_scale, v_scale)[0]


_int8_attention_op = torch.library.custom_op("llava_fast::int8_attention", _int8_attention, mutates_args=())


@_int8_attention_op.register_fake
def _int8_attention_fake(q, k, v, k_scale, v_scale, start, end, scale):
    return q.new_empty(q.shape)


def _int8_attention_triton(q, k, v, k_scale, v_scale, ranges, scale):
    if observed(q, k, v):
        return torch.ops.llava_fast.int8_attention(q, k, v, k_scale, v_scale, ranges.start, ranges.end, scale)
    splits = splits_of(q, k)
    finished = finished_of(ranges, k, splits)
    return launch_decode(q, k, v, ranges.start, ranges.end, scale, splits, k_scale, v_scale, finished)[0]


def _supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_scale, v_scale) -> bool | str:
    if differentiated(q):
        return "the kernel has no backward"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {q.shape[-1]} is over {MAX_HEAD_DIM}"
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, k, v)):
        return "the last dimension is not contiguous"
    if not (k_scale.is_contiguous() and v_scale.is_contiguous()):
        return "the scales are not contiguous"
    return takes(q)


register("int8_attention", "reference", int8_attention_reference)
register("int8_attention", "triton", _int8_attention_triton, _supports)


def int8_attention(
    q_BTHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    k_scale_BGS: torch.Tensor,
    v_scale_BGS: torch.Tensor,
    ranges: KeyRanges,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention to an int8 cache, as `write_cache` fills it.

    Args:
        q_BTHd: queries, of a floating dtype.
        k_BSGd, v_BSGd: int8; the last dimension contiguous, other strides free.
        k_scale_BGS, v_scale_BGS: float32.
        ranges: [B, T], the keys each query sees.
        scale: of the scores; 1/sqrt(d) by default.

    Returns:
        [B, T, H, d] in the dtype of the queries.

    Raises:
        ValueError: for keys or values that are not int8, or scales that do not fit them.
    """
    for x, of_x in ((k_BSGd, k_scale_BGS), (v_BSGd, v_scale_BGS)):
        if x.dtype != torch.int8 or of_x.shape != (x.shape[0], x.shape[2], x.shape[1]):
            raise ValueError(
                f"int8_attention: keys or values {x.dtype} {tuple(x.shape)} with scales {tuple(of_x.shape)}; "
                "expected int8 [B, S, G, d] with [B, G, S]"
            )
    scale = q_BTHd.shape[3] ** -0.5 if scale is None else scale
    if not takes_decode(q_BTHd, k_BSGd):
        k, v = (
            dequantise(x, s.transpose(1, 2), q_BTHd.dtype) for x, s in ((k_BSGd, k_scale_BGS), (v_BSGd, v_scale_BGS))
        )
        return range_attention(q_BTHd, k, v, ranges, scale=scale)
    tensors = q_BTHd, k_BSGd, v_BSGd, k_scale_BGS, v_scale_BGS
    return choose("int8_attention", *tensors)(*tensors, ranges, scale)
