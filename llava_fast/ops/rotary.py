"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama.

    rotate(x)[i]       = x[i] * cos[i] - x[i + d/2] * sin[i]            for i < d/2
    rotate(x)[i + d/2] = x[i + d/2] * cos[i + d/2] + x[i] * sin[i + d/2]

Queries and keys are rotated by one kernel in one pass: 4 bytes an element in bf16 (read, write), where PyTorch's
products, negation, concatenation and sum move 20. The gradient is the transposed rotation, so nothing but the angles
is saved.

Shapes: B batch, T tokens, H query heads, G key heads, d head dimension; a program rotates BLOCK_H heads of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from llava_fast.backend import choose, register
from llava_fast.ops._launch import launch, tile, tile_table
from llava_fast.ops._triton import jit, takes, tl

MAX_HEAD_DIM = 256


def rotary_reference(
    q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_BTd.unsqueeze(-2), sin_BTd.unsqueeze(-2)
    return _rotate_reference(q_BTHd, cos, sin), _rotate_reference(k_BTGd, cos, sin)


def _rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


@jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    x_row,
    out_row,
    head,
    heads,
    head_stride,
    half,
    i,
    cos_low,
    cos_high,
    sin_low,
    sin_high,
    TRANSPOSED: tl.constexpr,
):
    inside = (head < heads)[:, None] & (i < half)[None, :]
    source = x_ptr + x_row + (head * head_stride)[:, None] + i[None, :]
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    high = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        new_low = low * cos_low + high * sin_high
        new_high = high * cos_high - low * sin_low
    else:
        new_low = low * cos_low - high * sin_low
        new_high = high * cos_high + low * sin_high
    target = out_ptr + out_row + (head * (2 * half))[:, None] + i[None, :]
    tl.store(target, new_low.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + half, new_high.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    query_heads,
    key_heads,
    half,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    angle_batch_stride,
    angle_token_stride,
    TRANSPOSED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    i = tl.arange(0, BLOCK_D)
    angle = batch * angle_batch_stride + token * angle_token_stride + i
    cos_low = tl.load(cos_ptr + angle, mask=i < half, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos_ptr + angle + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin_ptr + angle, mask=i < half, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin_ptr + angle + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    query_blocks = tl.cdiv(query_heads, BLOCK_H)
    block = tl.program_id(1)
    if block < query_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        _rotate_heads(
            q_ptr,
            q_out_ptr,
            batch * q_batch_stride + token * q_token_stride,
            row * query_heads * (2 * half),
            head,
            query_heads,
            q_head_stride,
            half,
            i,
            cos_low,
            cos_high,
            sin_low,
            sin_high,
            TRANSPOSED,
        )
    else:
        head = (block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        _rotate_heads(
            k_ptr,
            k_out_ptr,
            batch * k_batch_stride + token * k_token_stride,
            row * key_heads * (2 * half),
            head,
            key_heads,
            k_head_stride,
            half,
            i,
            cos_low,
            cos_high,
            sin_low,
            sin_high,
            TRANSPOSED,
        )


def _head_dim_key(head_dim: int) -> int:
    """The power of two ≥ d, at least 64: the key of the tile table, and twice BLOCK_D."""
    return max(64, 1 << (head_dim - 1).bit_length())


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    batch, tokens, query_heads, head_dim = q.shape
    if batch * tokens:
        q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
        cos, sin = cos.expand(batch, tokens, head_dim), sin.expand(batch, tokens, head_dim)
        if sin.stride() != cos.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        key = _head_dim_key(head_dim)
        choice = tile("rotary", key, q.device)
        blocks = sum(-(-heads // choice["BLOCK_H"]) for heads in (query_heads, k.shape[2]))
        launch(
            _rotary_kernel,
            (batch * tokens, blocks),
            *(q, k, *outputs, cos, sin, tokens, query_heads, k.shape[2], head_dim // 2),
            *(*q.stride()[:3], *k.stride()[:3], *cos.stride()[:2]),
            tile=choice,
            TRANSPOSED=transposed,
            BLOCK_D=key // 2,
        )
    return outputs


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
    if cos.requires_grad or sin.requires_grad:
        return "the angles require a gradient"
    return takes(q, k, cos, sin)


def _rotary_triton(q, k, cos, sin):
    return torch.ops.llava_fast.rotary(q, k, cos, sin, False)


register("rotary", "reference", rotary_reference)
register("rotary", "triton", _rotary_triton, _supports)


def rotary(
    q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by the angles of their positions.

    Args:
        q_BTHd, k_BTGd: queries and keys; the number of heads may differ (GQA), the head dimension is even.
        cos_BTd, sin_BTd: cosines and sines per token, both halves of d filled; B may be 1.

    Returns:
        The rotated queries and keys, new tensors of the same shapes and dtypes.

    Raises:
        ValueError: for an odd head dimension, or angles of another one.
    """
    if q_BTHd.shape[-1] % 2 or cos_BTd.shape[-1] != q_BTHd.shape[-1]:
        raise ValueError(
            f"rotary: the head dimension {q_BTHd.shape[-1]} must be even and that of the angles ({cos_BTd.shape[-1]})"
        )
    return choose("rotary", q_BTHd, k_BTGd, cos_BTd, sin_BTd)(q_BTHd, k_BTGd, cos_BTd, sin_BTd)


def compile_examples(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Calls that between them launch the kernel with every shipped tile, for the compile report."""
    for key in tile_table("rotary")["sm_80"]["tiles"]:
        q, k, angles = (torch.empty(2, 32, *shape, int(key), dtype=dtype) for shape in ((32,), (8,), ()))
        for transposed in (False, True):
            yield partial(_rotate, q, k, angles, angles, transposed)


def tune_examples(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, int, Callable[[], Any], list[dict[str, int]]]]:
    """(kernel, key, call, tiles worth trying) for each entry of the tile table, at about LLaVA's sizes on a GPU."""
    tokens, heads = (832, 32) if device.type == "cuda" else (3, 4)
    for key in map(int, tile_table("rotary")["sm_80"]["tiles"]):
        q, k = torch.randn(2, 1, tokens, heads, key, device=device).to(dtype)
        cos, sin = torch.randn(2, 1, tokens, key, device=device).to(dtype)
        tiles = [
            {"BLOCK_H": block, "num_warps": warps, "num_stages": 1}
            for block in (2, 4, 8, 16, 32)
            for warps in (1, 2, 4, 8)
            if 4 <= block * key // (32 * warps) <= 64  # elements per thread
        ]
        yield "rotary", key, partial(_rotate, q, k, cos, sin, False), tiles
