"""Rotary embedding and KV-cache write in one pass: keys are rotated and written directly into their cache slots.

    q' = rotate(q);   keys[at + t] = rotate(k_t);   values[at + t] = v_t                 (rotate: see rotary.py)

q, k and v are read once and written once: 4 bytes per element in bf16. Rotary followed by copies into the cache would
read and write k twice, in three launches instead of one. The first slot, `at`, is read on the device, so a CUDA graph
can be replayed as the cache fills.

For an int8 cache keys and values are quantised in the same pass, with one scale per token and head:

    scale = max|x| / 127;   stored = round(x / scale);   |x - scale · stored| ≤ scale / 2

which takes d + 4 bytes instead of 2 · d (132 instead of 256 at d = 128); a decoding step reads half as much.

Inference only. Shapes: B batch, T new tokens, S slots, H query heads, G key heads, d head dimension; a program
processes BLOCK_H heads of one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from llava_fast.backend import choose, differentiated, observed, register
from llava_fast.ops._launch import Example, launch, tile, tile_table, unwritten
from llava_fast.ops._rotation import angles_per_token, head_dim_key, load_angles, load_halves, rotated, store_halves
from llava_fast.ops._triton import inlined, jit, takes, tl
from llava_fast.ops.rotary import MAX_HEAD_DIM, rotary_reference

LEVELS = 127
TINY = 1e-30  # vectors with a smaller maximum are stored as zeros: 127 / max|x| would overflow


def write_cache(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    v_BTGd: torch.Tensor,
    cos_BTd: torch.Tensor,
    sin_BTd: torch.Tensor,
    at: torch.Tensor,
    keys_BGSd: torch.Tensor,
    values_BGSd: torch.Tensor,
    *,
    key_scales_BGS: torch.Tensor | None = None,
    value_scales_BGS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, and put keys and values into a cache.

    Args:
        q_BTHd, k_BTGd, v_BTGd: new queries, keys and values; H may be 0.
        cos_BTd, sin_BTd: see `rotary`.
        at: integer tensor of one element, the slot of the first token; at + T ≤ S (the kernel drops the rest).
        keys_BGSd, values_BGSd: the cache, written to; float, or int8 with scales.
        key_scales_BGS, value_scales_BGS: float32, contiguous, written to.

    Returns:
        The rotated queries, a new tensor.

    Raises:
        ValueError: for an odd head dimension, or tensors that do not fit together.
    """
    batch, _, key_heads, dim = k_BTGd.shape
    if dim % 2 or cos_BTd.shape[-1] != dim:
        raise ValueError(f"write_cache: the head dimension {dim} must be even and that of the angles")
    for cache, scales in ((keys_BGSd, key_scales_BGS), (values_BGSd, value_scales_BGS)):
        if (*cache.shape[:2], cache.shape[3]) != (batch, key_heads, dim) or v_BTGd.shape != k_BTGd.shape:
            raise ValueError(
                f"write_cache: k {tuple(k_BTGd.shape)} and v {tuple(v_BTGd.shape)} do not fit a cache "
                f"[B, G, S, d] of {tuple(cache.shape)}"
            )
        if k_BTGd.shape[1] > cache.shape[2]:
            raise ValueError(f"write_cache: {k_BTGd.shape[1]} tokens for a cache of {cache.shape[2]} slots")
        if (scales is not None) != (cache.dtype == torch.int8) or (
            scales is not None and (scales.shape != cache.shape[:3] or scales.dtype != torch.float32)
        ):
            raise ValueError("write_cache: an int8 cache, and no other, has float32 scales [B, G, S]")
    arguments = (
        *(q_BTHd, k_BTGd, v_BTGd, cos_BTd, sin_BTd, at, keys_BGSd, values_BGSd),
        *(key_scales_BGS, value_scales_BGS),
    )
    return choose("cache_write", *arguments)(*arguments)


def quantise_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [..., d] and float32 [...], the scale of each vector; that of zeros is 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    peak = wide.abs().amax(-1)
    peak = torch.where(peak > TINY, peak, 0)
    steps = torch.where(peak > 0, LEVELS / peak, 0)
    return torch.floor(wide * steps[..., None] + 0.5).to(torch.int8), (peak / LEVELS).float()


def dequantise(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [..., d] · scale [...], in `dtype`."""
    return (x * scale[..., None]).to(dtype)


def write_cache_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    at: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> torch.Tensor:
    q, k = rotary_reference(q, k, cos, sin)
    slot_T = torch.arange(k.shape[1], device=k.device) + at
    for x, slots, scales in ((k, keys, key_scales), (v, values, value_scales)):
        if scales is not None:
            x, scale = quantise_reference(x)
            scales.index_copy_(2, slot_T, scale.transpose(1, 2))
        slots.index_copy_(2, slot_T, x.transpose(1, 2).to(slots.dtype))
    return q


@inlined
def _store_new(
    ptr, scale_ptr, low, high, batch, head, slot, heads, slots, x_batch, x_head, x_slot, half, BLOCK_D: tl.constexpr
):
    """Put the halves of a token's heads into its slot, quantised where there are scales."""
    if scale_ptr is not None:
        peak = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))  # [BLOCK_H]
        peak = tl.where(peak > 1e-30, peak, 0.0)
        steps = tl.where(peak > 0, 127.0 / tl.where(peak > 0, peak, 1.0), 0.0)
        low, high = tl.floor(low * steps[:, None] + 0.5), tl.floor(high * steps[:, None] + 0.5)
        at = scale_ptr + (batch * heads + head) * slots + slot
        tl.store(at, peak * (1.0 / 127.0), mask=head < heads)
    store_halves(ptr + batch * x_batch + slot * x_slot, low, high, head, heads, x_head, half, BLOCK_D)


@jit
def _cache_write_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, at_ptr, q_out_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr,
    tokens, slots, query_heads, key_heads, half,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head, angle_batch, angle_stride,
    keys_batch, keys_head, keys_slot, values_batch, values_head, values_slot,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    slot = tl.load(at_ptr).to(tl.int64) + token
    angle = batch * angle_batch + token * angle_stride
    cos_low, cos_high, sin_low, sin_high = load_angles(cos_ptr + angle, sin_ptr + angle, half, BLOCK_D)
    query_blocks = tl.cdiv(query_heads, BLOCK_H)
    block = tl.program_id(1)
    if block < query_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        low, high = load_halves(q_ptr + batch * q_batch + token * q_stride, head, query_heads, q_head, half, BLOCK_D)
        low, high = rotated(low, high, cos_low, cos_high, sin_low, sin_high, False)
        store_halves(q_out_ptr + row * query_heads * (2 * half), low, high, head, query_heads, 2 * half, half, BLOCK_D)
    # Tokens past the last slot are dropped.
    elif slot < slots:
        head = (block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        low, high = load_halves(k_ptr + batch * k_batch + token * k_stride, head, key_heads, k_head, half, BLOCK_D)
        low, high = rotated(low, high, cos_low, cos_high, sin_low, sin_high, False)
        _store_new(
            keys_ptr, key_scale_ptr, low, high, batch, head, slot, key_heads, slots, keys_batch, keys_head, keys_slot,
            half, BLOCK_D,
        )  # fmt: skip
        low, high = load_halves(v_ptr + batch * v_batch + token * v_stride, head, key_heads, v_head, half, BLOCK_D)
        _store_new(
            values_ptr, value_scale_ptr, low, high, batch, head, slot, key_heads, slots,
            values_batch, values_head, values_slot, half, BLOCK_D,
        )  # fmt: skip


def _cache_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    at: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> torch.Tensor:
    out = unwritten(q)
    batch, tokens, key_heads, head_dim = k.shape
    if batch * tokens:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        cos, sin = angles_per_token(cos, sin, q)
        key = head_dim_key(head_dim)
        choice = tile("cache_write", key, q.device)
        block = choice["BLOCK_H"]
        launch(
            _cache_write_kernel,
            (batch * tokens, -(-q.shape[2] // block) - (-key_heads // block)),
            *(q, k, v, cos, sin, at, out, keys, values, key_scales, value_scales),
            *(tokens, keys.shape[2], q.shape[2], key_heads, head_dim // 2),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cos.stride()[:2]),
            *(*keys.stride()[:3], *values.stride()[:3]),
            tile=choice,
            BLOCK_D=key // 2,
        )
    return out


_cache_write_op = torch.library.custom_op(
    "llava_fast::cache_write", _cache_write, mutates_args=("keys", "values", "key_scales", "value_scales")
)


@_cache_write_op.register_fake
def _cache_write_fake(q, k, v, cos, sin, at, keys, values, key_scales, value_scales):
    return q.new_empty(q.shape)


def _cache_write_triton(*arguments):
    return (_cache_write_op if observed(*arguments) else _cache_write)(*arguments)


def _supports(q, k, v, cos, sin, at, keys, values, key_scales, value_scales) -> bool | str:
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {q.shape[-1]} is over {MAX_HEAD_DIM}"
    if differentiated(q, k, v):
        return "a cache is not differentiated through"
    if not at.is_cuda == keys.is_cuda == values.is_cuda == q.is_cuda:
        return "the cache is on another device"
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        return "the last dimension of the cache is not contiguous"
    if key_scales is not None and not (key_scales.is_contiguous() and value_scales.is_contiguous()):
        return "the scales are not contiguous"
    return takes(q, k, v, cos, sin)


register("cache_write", "reference", write_cache_reference)
register("cache_write", "triton", _cache_write_triton, _supports)


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """LLaVA-1.5's prefill into a cache of that dtype, and into an int8 cache with a quarter of the key heads."""
    tokens, heads = (640, 32) if device.type != "cpu" else (3, 4)
    at = torch.zeros((), dtype=torch.int64, device=device)
    for key in map(int, tile_table("cache_write")["sm_80"]["tiles"]):
        q, k, v = torch.randn(3, 1, tokens, heads, key, device=device).to(dtype)
        cos, sin = torch.randn(2, 1, tokens, key, device=device).to(dtype)
        keys, values = torch.zeros(2, 1, heads, tokens, key, device=device, dtype=dtype)
        tiles = [
            {"BLOCK_H": block, "num_warps": warps, "num_stages": 1}
            for block in (2, 4, 8, 16, 32)
            for warps in (1, 2, 4, 8)
            if 4 <= block * key // (32 * warps) <= 64  # elements per thread
        ]
        call = partial(_cache_write, q, k, v, cos, sin, at, keys, values, None, None)
        yield Example("cache_write", key, call, tiles)
        k, v, keys, values = (
            k[:, :, : heads // 4],
            v[:, :, : heads // 4],
            keys[:, : heads // 4],
            values[:, : heads // 4],
        )
        scales = torch.zeros(1, heads // 4, tokens, device=device)
        int8 = (keys.to(torch.int8), values.to(torch.int8), scales, torch.zeros_like(scales))
        for cache in ((keys, values, None, None), int8):
            yield Example("cache_write", key, partial(_cache_write, q, k, v, cos, sin, at, *cache))
