"""Device functions that rotate heads by their token's angles, for the kernels of `rotary.py` and `cache_write.py`.

A head of d numbers is held as its lower and its upper half, [BLOCK_H, BLOCK_D] each, with BLOCK_D ≥ d / 2.
"""

from __future__ import annotations

from functools import cache

import torch

from llava_fast.ops._triton import inlined, tl


@cache
def head_dim_key(head_dim: int) -> int:
    """The power of two ≥ d, at least 64: the key of the tile table, and twice BLOCK_D."""
    return max(64, 1 << (head_dim - 1).bit_length())


def angles_per_token(cos: torch.Tensor, sin: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, T, d] for queries [B, T, H, d], with equal strides, the last of them 1."""
    if cos.shape[0] != q.shape[0] or cos.shape != sin.shape:
        cos, sin = (x.expand(*q.shape[:2], q.shape[3]) for x in (cos, sin))
    if sin.stride() == cos.stride() and cos.stride(-1) == 1:
        return cos, sin
    return cos.contiguous(), sin.contiguous()


@inlined
def load_angles(cos_ptr, sin_ptr, half, BLOCK_D: tl.constexpr):
    """Cosines and sines of the lower and of the upper half, [1, BLOCK_D] each."""
    i = tl.arange(0, BLOCK_D)
    cos_low = tl.load(cos_ptr + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos_ptr + i + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin_ptr + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin_ptr + i + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    return cos_low, cos_high, sin_low, sin_high


@inlined
def rotated(low, high, cos_low, cos_high, sin_low, sin_high, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        new_low = low * cos_low + high * sin_high
        new_high = high * cos_high - low * sin_low
    else:
        new_low = low * cos_low - high * sin_low
        new_high = high * cos_high + low * sin_high
    return new_low, new_high


@inlined
def load_halves(ptr, head, heads, stride, half, BLOCK_D: tl.constexpr):
    """Both halves of some heads of a token, [BLOCK_H, BLOCK_D] in float32."""
    i = tl.arange(0, BLOCK_D)
    at, inside = ptr + (head * stride)[:, None] + i[None, :], (head < heads)[:, None] & (i < half)[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return low, tl.load(at + half, mask=inside, other=0.0).to(tl.float32)


@inlined
def store_halves(ptr, low, high, head, heads, stride, half, BLOCK_D: tl.constexpr):
    i = tl.arange(0, BLOCK_D)
    at, inside = ptr + (head * stride)[:, None] + i[None, :], (head < heads)[:, None] & (i < half)[None, :]
    tl.store(at, low.to(ptr.dtype.element_ty), mask=inside)
    tl.store(at + half, high.to(ptr.dtype.element_ty), mask=inside)
