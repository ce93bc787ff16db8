"""The forward kernel of attention: a tile of queries loops over the keys that it sees.

`first` holds, for each row (a query, or a key), the first row of its sample. `scale` includes the factor log2(e),
since the hardware's exponential is 2ˣ. A line is a flat row index over the batch, b · T + t.

Register pressure limits these kernels. The compiler would hoist values that do not depend on the tile out of the loop
over tiles (LICM); they would occupy registers during the whole loop and cause spills. Hence `disable_licm`, and
addresses that are computed from the tile's first row. Bases are 64-bit; offsets inside a tile are 32-bit.
"""

from __future__ import annotations

import torch

from llava_fast.ops._launch import launch, unwritten
from llava_fast.ops._math import LN_2, LOG2_E
from llava_fast.ops._triton import inlined, jit, tl
from llava_fast.ops.attention.tiles import (
    _cast,
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
def _fwd_step(
    acc, best, total, q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k0, k_to, start, end, k_stride, v_stride, scale,
    MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One tile of keys. For int8 keys and values, `k_scale_ptr` and `v_scale_ptr` point to their scales, which multiply
    scores and probabilities instead of keys and values."""
    base = tl.cast(k0, tl.int64)
    k = _load_tile(k_ptr + base * k_stride, k_stride, k_to - k0, MASKED, DIM, BLOCK_N, BLOCK_D, BLOCK_E)
    s = _products(q, _cast(k, q[0].dtype, BLOCK_E), BLOCK_E)  # [rows of q, BLOCK_N]
    key = k0 + tl.arange(0, BLOCK_N)
    if k_scale_ptr is not None:
        s *= tl.load(k_scale_ptr + key, mask=key < k_to, other=0.0)[None, :]
    if MASKED:
        s = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), s, float("-inf"))
    new = tl.maximum(best, tl.max(s, axis=1) * scale)
    # The maximum of a row that has seen no key yet is −inf; −inf − (−inf) would be NaN.
    shift = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    p = tl.exp2(s * scale - shift[:, None])
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(p, axis=1)
    v = _load_tile(v_ptr + base * v_stride, v_stride, k_to - k0, MASKED, DIM, BLOCK_N, BLOCK_D, BLOCK_E)
    if v_scale_ptr is not None:
        p *= tl.load(v_scale_ptr + key, mask=key < k_to, other=0.0)[None, :]
    v = _cast(v, q[0].dtype, BLOCK_E)
    acc = _weighted(p, v, _times(acc, fade[:, None], BLOCK_E), BLOCK_E)
    return acc, new, total


@inlined
def _fwd_tile(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, row0, count, line0, plane, out_stride, out_column,
    q_stride, k_stride, v_stride, scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    q = _load_rows(q_ptr, row0, q_stride, 0, count, DIM, BLOCK_M, BLOCK_D, BLOCK_E)
    k_from, k_to, tiles, whole, mixed = _key_walk(start_ptr, end_ptr, line0 + row0, count, BLOCK_M, BLOCK_N)
    acc = _zeros(BLOCK_M, BLOCK_D, BLOCK_E)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in range(whole, mixed):
        acc, best, total = _fwd_step(
            acc, best, total, q, k_ptr, v_ptr, None, None, k_from + i * BLOCK_N, k_to, None, None,
            k_stride, v_stride, scale, False, DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    start, end = _ranges(start_ptr, end_ptr, line0 + row0, count, BLOCK_M)
    for i in range(tiles - (mixed - whole)):
        step = i + tl.where(i < whole, 0, mixed - whole)
        acc, best, total = _fwd_step(
            acc, best, total, q, k_ptr, v_ptr, None, None, k_from + step * BLOCK_N, k_to, start, end,
            k_stride, v_stride, scale, True, DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    seen = total > 0
    acc = _times(acc, (1.0 / tl.where(seen, total, 1.0))[:, None], BLOCK_E)
    _store_rows(out_ptr, acc, line0 + row0, out_stride, out_column, count, DIM, BLOCK_M, BLOCK_D, BLOCK_E)
    lse = tl.where(seen, (best + tl.log2(tl.where(seen, total, 1.0))) * LN_2, float("-inf"))
    row = row0 + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + (plane + row), lse, mask=row < row0 + count)


@jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, first_ptr, out_ptr, lse_ptr,
    tokens, group,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    scale,
    DIM: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # The last tiles of a causal sample have the longest loops, so they run first.
    window, head, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    line0, plane = batch * tokens, (batch * heads + head) * tokens
    q_ptr = _plane(q_ptr, batch, q_batch, head, q_head, ALIGNED)
    k_ptr = _plane(k_ptr, batch, k_batch, head // group, k_head, ALIGNED)
    v_ptr = _plane(v_ptr, batch, v_batch, head // group, v_head, ALIGNED)

    stop = tl.minimum(window * BLOCK_M + BLOCK_M, tokens)
    row0, tiles_here = _next_tile(first_ptr, line0, window * BLOCK_M, stop, BLOCK_M)
    for _ in tl.range(tiles_here, disable_licm=True):
        count = _tile_rows(first_ptr, line0, tokens, row0, BLOCK_M)
        _fwd_tile(
            q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, row0, count, line0, plane,
            heads * DIM, head * DIM, q_stride, k_stride, v_stride, scale,
            DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
        row0, _left = _next_tile(first_ptr, line0, row0 + 1, stop, BLOCK_M)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    first: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, T, H, d] and LSE [B, H, T]."""
    batch, tokens, heads = q.shape[:3]
    out = unwritten(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    choice = tile_of("attention_fwd", q)
    if lse.numel():
        launch(
            _attention_fwd_kernel,
            (-(-tokens // choice["BLOCK_M"]), heads, batch),
            *(q, k, v, start, end, first, out, lse, tokens, heads // k.shape[2]),
            *strides(q, k, v),
            scale * LOG2_E.value,
            tile=choice,
            **blocks(q, k, v),
        )
    return out, lse
