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
from llava_fast.ops._triton import inlined, jit, takes, tl

MAX_HEAD_DIM = 256


def rotary_reference(
    q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_BTd.unsqueeze(-2), sin_BTd.unsqueeze(-2)
    return _RotaryReference.apply(q_BTHd, cos, sin), _RotaryReference.apply(k_BTGd, cos, sin)


class _RotaryReference(torch.autograd.Function):
    """Half the passes of products, negation, concatenation and sum, and autograd keeps the angles alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        (low, high), (sin_low, sin_high) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        out = x * cos
        out_low, out_high = out.chunk(2, dim=-1)
        # Products rounded by themselves, as transformers' are.
        out_low.sub_(high * sin_low)
        out_high.add_(low * sin_high)
        return out

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # The transposed rotation: the other sign, and each half takes the other's sine.
        cos, sin = ctx.saved_tensors
        return _RotaryReference.apply(dy, cos, -sin.roll(sin.shape[-1] // 2, dims=-1)), None, None


@inlined
def _angles(cos_ptr, sin_ptr, half, BLOCK_D: tl.constexpr):
    """Cosines and sines of the lower and of the upper half, [1, BLOCK_D] each."""
    i = tl.arange(0, BLOCK_D)
    cos_low = tl.load(cos_ptr + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos_ptr + i + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin_ptr + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin_ptr + i + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    return cos_low, cos_high, sin_low, sin_high


@inlined
def _rotated(low, high, cos_low, cos_high, sin_low, sin_high, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        new_low = low * cos_low + high * sin_high
        new_high = high * cos_high - low * sin_low
    else:
        new_low = low * cos_low - high * sin_low
        new_high = high * cos_high + low * sin_high
    return new_low, new_high


@inlined
def _load_halves(ptr, head, heads, stride, half, BLOCK_D: tl.constexpr):
    """Both halves of some heads of a token, [BLOCK_H, BLOCK_D] in float32."""
    i = tl.arange(0, BLOCK_D)
    at, inside = ptr + (head * stride)[:, None] + i[None, :], (head < heads)[:, None] & (i < half)[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return low, tl.load(at + half, mask=inside, other=0.0).to(tl.float32)


@inlined
def _store_halves(ptr, low, high, head, heads, stride, half, BLOCK_D: tl.constexpr):
    i = tl.arange(0, BLOCK_D)
    at, inside = ptr + (head * stride)[:, None] + i[None, :], (head < heads)[:, None] & (i < half)[None, :]
    tl.store(at, low.to(ptr.dtype.element_ty), mask=inside)
    tl.store(at + half, high.to(ptr.dtype.element_ty), mask=inside)


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
    cos_low, cos_high, sin_low, sin_high = _angles(cos_ptr + angle, sin_ptr + angle, half, BLOCK_D)
    query_blocks = tl.cdiv(query_heads, BLOCK_H)
    block = tl.program_id(1)
    if block < query_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        low, high = _load_halves(q_ptr + batch * q_batch + token * q_stride, head, query_heads, q_head, half, BLOCK_D)
        low, high = _rotated(low, high, cos_low, cos_high, sin_low, sin_high, TRANSPOSED)
        _store_halves(q_out_ptr + row * query_heads * (2 * half), low, high, head, query_heads, 2 * half, half, BLOCK_D)
    else:
        head = (block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        low, high = _load_halves(k_ptr + batch * k_batch + token * k_stride, head, key_heads, k_head, half, BLOCK_D)
        low, high = _rotated(low, high, cos_low, cos_high, sin_low, sin_high, TRANSPOSED)
        _store_halves(k_out_ptr + row * key_heads * (2 * half), low, high, head, key_heads, 2 * half, half, BLOCK_D)


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
        ValueError: for an odd head dimension, or angles of another one, or that want a gradient: there is none.
    """
    if q_BTHd.shape[-1] % 2 or cos_BTd.shape[-1] != q_BTHd.shape[-1]:
        raise ValueError(
            f"rotary: the head dimension {q_BTHd.shape[-1]} must be even and that of the angles ({cos_BTd.shape[-1]})"
        )
    if torch.is_grad_enabled() and (cos_BTd.requires_grad or sin_BTd.requires_grad):
        raise ValueError("rotary: the angles require a gradient, which there is not")
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
