"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama.

    rotate(x)[i]       = x[i] * cos[i] - x[i + d/2] * sin[i]            for i < d/2
    rotate(x)[i + d/2] = x[i + d/2] * cos[i + d/2] + x[i] * sin[i + d/2]

One kernel rotates queries and keys in one pass: 4 bytes per element in bf16 (read, write), where PyTorch's products,
negation, concatenation and sum move 20. The gradient is the transposed rotation, so only the angles are saved.

Shapes: B batch, T tokens, H query heads, G key heads, d head dimension; a program rotates BLOCK_H heads of one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from llava_fast.backend import choose, differentiated, observed, register
from llava_fast.ops._launch import Example, launch, tile, tile_table, unwritten
from llava_fast.ops._rotation import angles_per_token, head_dim_key, load_angles, load_halves, rotated, store_halves
from llava_fast.ops._triton import jit, takes, tl

MAX_HEAD_DIM = 256


def rotary(
    q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by the angles of their positions (Su et al. 2021), in Llama's half-split layout.

    Args:
        q_BTHd, k_BTGd: queries and keys of a floating dtype; H and G may differ (GQA), the head dimension is even.
        cos_BTd, sin_BTd: cosines and sines per token, both halves of d filled; B may be 1.

    Returns:
        The rotated queries and keys, new tensors of the same shapes and dtypes.

    Raises:
        ValueError: for an odd head dimension, angles of another head dimension, or angles that require grad.
    """
    if q_BTHd.shape[-1] % 2 or cos_BTd.shape[-1] != q_BTHd.shape[-1]:
        raise ValueError(
            f"rotary: the head dimension {q_BTHd.shape[-1]} must be even and that of the angles ({cos_BTd.shape[-1]})"
        )
    if differentiated(cos_BTd, sin_BTd):
        raise ValueError("rotary: the angles require a gradient, which there is not")
    return choose("rotary", q_BTHd, k_BTGd, cos_BTd, sin_BTd)(q_BTHd, k_BTGd, cos_BTd, sin_BTd)


def rotary_reference(
    q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    sin_low, sin_high = sin_BTd.chunk(2, dim=-1)
    cos, sin = cos_BTd.unsqueeze(-2), torch.cat((-sin_low, sin_high), dim=-1).unsqueeze(-2)
    rotate = _RotaryReference.apply if differentiated(q_BTHd, k_BTGd) else _rotate_reference
    q_BTHd = rotate(q_BTHd, cos, sin) if q_BTHd.shape[2] else q_BTHd
    return q_BTHd, rotate(k_BTGd, cos, sin) if k_BTGd.shape[2] else k_BTGd


def _rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x · cos + swap(x) · sin, where `swap` exchanges the halves, and the lower half of `sin` is negated."""
    # Each product is rounded before the sum, as in transformers; under autocast to float32, the dtype of the angles.
    out = x * cos
    return out.add_(x.roll(x.shape[-1] // 2, -1).to(out.dtype).mul_(sin))


class _RotaryReference(torch.autograd.Function):
    """Half as many passes over memory as products, negation, concatenation and sum; saves only the angles."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_reference(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # The transposed rotation: each half uses the sine of the other half.
        cos, sin = ctx.saved_tensors
        return _RotaryReference.apply(dy, cos, sin.roll(sin.shape[-1] // 2, dims=-1)), None, None


@jit
def _rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr,
    tokens, query_heads, key_heads, half,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, angle_batch, angle_stride,
    TRANSPOSED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    angle = batch * angle_batch + token * angle_stride
    cos_low, cos_high, sin_low, sin_high = load_angles(cos_ptr + angle, sin_ptr + angle, half, BLOCK_D)
    query_blocks = tl.cdiv(query_heads, BLOCK_H)
    block = tl.program_id(1)
    if block < query_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        low, high = load_halves(q_ptr + batch * q_batch + token * q_stride, head, query_heads, q_head, half, BLOCK_D)
        low, high = rotated(low, high, cos_low, cos_high, sin_low, sin_high, TRANSPOSED)
        store_halves(q_out_ptr + row * query_heads * (2 * half), low, high, head, query_heads, 2 * half, half, BLOCK_D)
    else:
        head = (block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        low, high = load_halves(k_ptr + batch * k_batch + token * k_stride, head, key_heads, k_head, half, BLOCK_D)
        low, high = rotated(low, high, cos_low, cos_high, sin_low, sin_high, TRANSPOSED)
        store_halves(k_out_ptr + row * key_heads * (2 * half), low, high, head, key_heads, 2 * half, half, BLOCK_D)


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = unwritten(q), unwritten(k)
    batch, tokens, query_heads, head_dim = q.shape
    if batch * tokens:
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        cos, sin = angles_per_token(cos, sin, q)
        key = head_dim_key(head_dim)
        choice = tile("rotary", key, q.device)
        blocks = sum(-(-heads // choice["BLOCK_H"]) for heads in (query_heads, k.shape[2]))
        launch(
            _rotary_kernel,
            (batch * tokens, blocks),
            *(q, k, q_out, k_out, cos, sin, tokens, query_heads, k.shape[2], head_dim // 2),
            *(*q.stride()[:3], *k.stride()[:3], *cos.stride()[:2]),
            tile=choice,
            TRANSPOSED=transposed,
            BLOCK_D=key // 2,
        )
    return q_out, k_out


@torch.library.custom_op("llava_fast::rotary", mutates_args=())
def _rotary_op(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _rotate(q, k, cos, sin, transposed)


@_rotary_op.register_fake
def _rotary_fake(q, k, cos, sin, transposed):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _autograd(ctx, dq, dk):
    return *torch.ops.llava_fast.rotary(dq, dk, *ctx.saved_tensors, not ctx.transposed), None, None, None


_rotary_op.register_autograd(_autograd, setup_context=_setup_context)


def _supports(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool | str:
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {q.shape[-1]} is over {MAX_HEAD_DIM}"
    return takes(q, k, cos, sin)


def _rotary_triton(q, k, cos, sin):
    rotate = torch.ops.llava_fast.rotary if observed(q, k, cos, sin) else _rotate
    return rotate(q, k, cos, sin, False)


register("rotary", "reference", rotary_reference)
register("rotary", "triton", _rotary_triton, _supports)


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """A sample of LLaVA-1.5's, with a quarter of the key heads too."""
    tokens, heads = (832, 32) if device.type != "cpu" else (3, 4)
    for key in map(int, tile_table("rotary")["sm_80"]["tiles"]):
        q, k = torch.randn(2, 1, tokens, heads, key, device=device).to(dtype)
        cos, sin = torch.randn(2, 1, tokens, key, device=device).to(dtype)
        tiles = [
            {"BLOCK_H": block, "num_warps": warps, "num_stages": 1}
            for block in (2, 4, 8, 16, 32)
            for warps in (1, 2, 4, 8)
            if 4 <= block * key // (32 * warps) <= 64  # elements per thread
        ]
        yield Example("rotary", key, partial(_rotate, q, k, cos, sin, False), tiles)
        few = k[:, :, : heads // 4]
        for transposed in (False, True):
            yield Example("rotary", key, partial(_rotate, q, few, cos, sin, transposed))
