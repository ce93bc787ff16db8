"""The backward kernels of attention, which recompute the scores from the log-sum-exp of each row.

dQ: a tile of queries loops over keys, as in the forward kernel. dK and dV: a tile of keys loops over the run of queries
that see it, for all query heads of its group, so gradients are summed in registers, in a fixed order, without atomics.

See `forward.py` for `first`, `scale`, line, and the register limits.
"""

from __future__ import annotations

import torch

from llava_fast.ops._launch import launch
from llava_fast.ops._math import LN_2, LOG2_E
from llava_fast.ops._triton import inlined, jit, tl
from llava_fast.ops.attention.tiles import (
    _key_walk,
    _load_rows,
    _load_tile,
    _next_tile,
    _plane,
    _products,
    _ranges,
    _store_rows,
    _tile_rows,
    _times,
    _weighted,
    _zeros,
    blocks,
    strides,
    tile_of,
)


@inlined
def _dq_step(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k0, k_to, start, end, k_stride, v_stride, scale,
    MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    base = tl.cast(k0, tl.int64)
    k = _load_tile(k_ptr + base * k_stride, k_stride, k_to - k0, MASKED, DIM, BLOCK_N, BLOCK_D, BLOCK_E)
    v = _load_tile(v_ptr + base * v_stride, v_stride, k_to - k0, MASKED, DIM, BLOCK_N, BLOCK_D, BLOCK_E)
    p = tl.exp2(_products(q, k, BLOCK_E) * scale - lse[:, None])  # [BLOCK_M, BLOCK_N]
    if MASKED:
        key = k0 + tl.arange(0, BLOCK_N)
        p = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), p, 0.0)
    ds = p * (_products(dout, v, BLOCK_E) - delta[:, None])
    return _weighted(ds, k, dq, BLOCK_E)


@inlined
def _dq_tile(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr, dq_ptr, delta_ptr,
    row0, count, line0, plane, out_stride, out_column, q_stride, k_stride, v_stride, dout_stride, scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    out = _load_rows(out_ptr, line0 + row0, out_stride, out_column, count, DIM, BLOCK_M, BLOCK_D, BLOCK_E)
    dout = _load_rows(dout_ptr, row0, dout_stride, 0, count, DIM, BLOCK_M, BLOCK_D, BLOCK_E)
    # ds = p · (dout · v − delta) with delta = Σ dout · out; since d lse / d s = p, dlse is subtracted from delta.
    delta = tl.sum(out[0].to(tl.float32) * dout[0].to(tl.float32), axis=1)
    if BLOCK_E > 0:
        delta += tl.sum(out[1].to(tl.float32) * dout[1].to(tl.float32), axis=1)
    row = row0 + tl.arange(0, BLOCK_M)
    of_row = plane + row
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + of_row, mask=row < row0 + count, other=0.0)
    tl.store(delta_ptr + of_row, delta, mask=row < row0 + count)
    lse = tl.load(lse_ptr + of_row, mask=row < row0 + count, other=0.0) * LOG2_E
    q = _load_rows(q_ptr, row0, q_stride, 0, count, DIM, BLOCK_M, BLOCK_D, BLOCK_E)
    k_from, k_to, tiles, whole, mixed = _key_walk(start_ptr, end_ptr, line0 + row0, count, BLOCK_M, BLOCK_N)
    dq = _zeros(BLOCK_M, BLOCK_D, BLOCK_E)
    for i in range(whole, mixed):
        dq = _dq_step(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_from + i * BLOCK_N, k_to, None, None, k_stride, v_stride,
            scale, False, DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    start, end = _ranges(start_ptr, end_ptr, line0 + row0, count, BLOCK_M)
    for i in range(tiles - (mixed - whole)):
        step = i + tl.where(i < whole, 0, mixed - whole)
        dq = _dq_step(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_from + step * BLOCK_N, k_to, start, end, k_stride, v_stride,
            scale, True, DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    dq = _times(dq, scale * LN_2, BLOCK_E)
    _store_rows(dq_ptr, dq, line0 + row0, out_stride, out_column, count, DIM, BLOCK_M, BLOCK_D, BLOCK_E)


@jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, first_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr, dq_ptr, delta_ptr,
    tokens, group,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    dout_batch, dout_stride, dout_head,
    scale,
    DIM: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    window, head, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    line0, plane = batch * tokens, (batch * heads + head) * tokens
    q_ptr = _plane(q_ptr, batch, q_batch, head, q_head, ALIGNED)
    k_ptr = _plane(k_ptr, batch, k_batch, head // group, k_head, ALIGNED)
    v_ptr = _plane(v_ptr, batch, v_batch, head // group, v_head, ALIGNED)
    dout_ptr = _plane(dout_ptr, batch, dout_batch, head, dout_head, ALIGNED)

    stop = tl.minimum(window * BLOCK_M + BLOCK_M, tokens)
    row0, tiles_here = _next_tile(first_ptr, line0, window * BLOCK_M, stop, BLOCK_M)
    for _ in tl.range(tiles_here, disable_licm=True):
        count = _tile_rows(first_ptr, line0, tokens, row0, BLOCK_M)
        _dq_tile(
            q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr, dq_ptr, delta_ptr,
            row0, count, line0, plane, heads * DIM, head * DIM, q_stride, k_stride, v_stride, dout_stride, scale,
            DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
        row0, _left = _next_tile(first_ptr, line0, row0 + 1, stop, BLOCK_M)


@inlined
def _dkdv_step(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, start_ptr, end_ptr, t0, to, key, q_stride, dout_stride, scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    base, row = tl.cast(t0, tl.int64), t0 + tl.arange(0, BLOCK_M)
    q = _load_tile(q_ptr + base * q_stride, q_stride, to - t0, True, DIM, BLOCK_M, BLOCK_D, BLOCK_E)
    lse = tl.load(lse_ptr + row, mask=row < to, other=0.0) * LOG2_E
    start = tl.load(start_ptr + row, mask=row < to, other=0)
    end = tl.load(end_ptr + row, mask=row < to, other=0)
    p = tl.exp2(_products(k, q, BLOCK_E) * scale - lse[None, :])  # [BLOCK_N, BLOCK_M]
    # Masking every tile costs less here than a second loop without a mask, which needs more registers.
    p = tl.where((key[:, None] >= start[None, :]) & (key[:, None] < end[None, :]), p, 0.0)
    dout = _load_tile(dout_ptr + base * dout_stride, dout_stride, to - t0, True, DIM, BLOCK_M, BLOCK_D, BLOCK_E)
    dv = _weighted(p, dout, dv, BLOCK_E)
    delta = tl.load(delta_ptr + row, mask=row < to, other=0.0)
    ds = p * (_products(v, dout, BLOCK_E) - delta[None, :])
    return _weighted(ds, q, dk, BLOCK_E), dv


@inlined
def _dkdv_tile(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    k0, count, line0, t_from, t_to, group, tokens, out_stride, out_column,
    q_stride, q_head, k_stride, v_stride, dout_stride, dout_head, scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tl.maximum(t_to - t_from, 0), BLOCK_M)
    key = k0 + tl.arange(0, BLOCK_N)
    k = _load_rows(k_ptr, k0, k_stride, 0, count, DIM, BLOCK_N, BLOCK_D, BLOCK_E)
    v = _load_rows(v_ptr, k0, v_stride, 0, count, DIM, BLOCK_N, BLOCK_D, BLOCK_E)
    dk, dv = _zeros(BLOCK_N, BLOCK_D, BLOCK_E), _zeros(BLOCK_N, BLOCK_D, BLOCK_E)
    # One loop over the tiles of queries of all heads of the group.
    for i in range(group * tiles):
        head = tl.cast(i // tiles, tl.int64)
        dk, dv = _dkdv_step(
            dk, dv, k, v, q_ptr + head * q_head, dout_ptr + head * dout_head, lse_ptr + head * tokens,
            delta_ptr + head * tokens, start_ptr, end_ptr, t_from + (i % tiles) * BLOCK_M, t_to, key,
            q_stride, dout_stride, scale, DIM, BLOCK_M, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    dk = _times(dk, scale * LN_2, BLOCK_E)
    _store_rows(dk_ptr, dk, line0 + k0, out_stride, out_column, count, DIM, BLOCK_N, BLOCK_D, BLOCK_E)
    _store_rows(dv_ptr, dv, line0 + k0, out_stride, out_column, count, DIM, BLOCK_N, BLOCK_D, BLOCK_E)


@jit
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, keys_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    tokens, keys, group,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    dout_batch, dout_stride, dout_head,
    scale,
    DIM: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # The longest loops run first: the early keys of a causal sample are seen by the most queries.
    window, key_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_heads = tl.num_programs(1)
    line0, lines = batch * keys, tl.num_programs(2) * keys
    head0 = key_head * group
    q_ptr = _plane(q_ptr, batch, q_batch, head0, q_head, ALIGNED)
    dout_ptr = _plane(dout_ptr, batch, dout_batch, head0, dout_head, ALIGNED)
    lse_ptr += (batch * key_heads * group + head0).to(tl.int64) * tokens
    delta_ptr += (batch * key_heads * group + head0).to(tl.int64) * tokens
    start_ptr, end_ptr = start_ptr + batch * tokens, end_ptr + batch * tokens

    stop = tl.minimum(window * BLOCK_N + BLOCK_N, keys)
    k0, tiles_here = _next_tile(keys_ptr, line0, window * BLOCK_N, stop, BLOCK_N)
    for _ in tl.range(tiles_here, disable_licm=True):
        count = _tile_rows(keys_ptr, line0, keys, k0, BLOCK_N)
        # The queries that see any key of the tile are one contiguous run.
        t_from = tl.load(keys_ptr + (lines + line0 + k0))
        t_to = tl.load(keys_ptr + (2 * lines + line0 + k0 + count - 1))
        k_at = _plane(k_ptr, batch, k_batch, key_head, k_head, ALIGNED)
        v_at = _plane(v_ptr, batch, v_batch, key_head, v_head, ALIGNED)
        _dkdv_tile(
            q_ptr, k_at, v_at, start_ptr, end_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
            k0, count, line0, t_from, t_to, group, tokens, key_heads * DIM, key_head * DIM,
            q_stride, q_head, k_stride, v_stride, dout_stride, dout_head, scale,
            DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
        k0, _left = _next_tile(keys_ptr, line0, k0 + 1, stop, BLOCK_N)


def launch_dq(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    first: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dq, and delta [B, H, T], which `launch_dkdv` needs."""
    batch, tokens, heads = q.shape[:3]
    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    choice = tile_of("attention_bwd_dq", q)
    if lse.numel():
        launch(
            _attention_bwd_dq_kernel,
            (-(-tokens // choice["BLOCK_M"]), heads, batch),
            *(q, k, v, start, end, first, out, lse, dout, None if dlse is None else dlse.contiguous(), dq, delta),
            *(tokens, heads // k.shape[2], *strides(q, k, v, dout), scale * LOG2_E.value),
            tile=choice,
            **blocks(q, k, v, dout),
        )
    return dq, delta


def launch_dkdv(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads = q.shape[:3]
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    choice = tile_of("attention_bwd_dkdv", q)
    if dk.numel():
        launch(
            _attention_bwd_dkdv_kernel,
            (-(-k.shape[1] // choice["BLOCK_N"]), k.shape[2], batch),
            *(q, k, v, start, end, keys, lse, dout, delta, dk, dv, tokens, k.shape[1], heads // k.shape[2]),
            *(*strides(q, k, v, dout), scale * LOG2_E.value),
            tile=choice,
            **blocks(q, k, v, dout),
        )
    return dk, dv
