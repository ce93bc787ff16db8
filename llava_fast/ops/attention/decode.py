"""Decode attention, a few new queries over a long cache: keys are split over programs, splits are merged by their LSE.

    out = Σ_i exp(lse_i − lse) · out_i,   lse = log Σ_i exp(lse_i)              Dao et al. 2023, "Flash-Decoding"

One program takes all queries of one key head (so each key is read once for its whole group) and one split of the keys
they see. Of the programs of a key head, the one that finishes last merges the splits, in a fixed order: one launch, and
the result does not depend on which program is the last. The range is split on the device, from `start` and `end`, into
equal shares of the filled cache. The grid depends only on shapes, so a CUDA graph stays valid as the cache fills. Keys
and values are read in place, by strides (transformers' caches are [B, G, S, d]); each byte is read once, which is the
minimum.

The same kernel reads int8 caches, for `int8.py`.

Forward only; `attention` calls it for up to `MAX_TOKENS` queries if no gradient is needed.

Shapes: B batch, T queries, S keys, H query heads, G key heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from llava_fast.backend import observed
from llava_fast.ops._launch import Example, launch, multiprocessors, tile_table, unwritten
from llava_fast.ops._math import LN_2, LOG2_E
from llava_fast.ops._triton import inlined, jit, tl
from llava_fast.ops.attention.forward import _fwd_step
from llava_fast.ops.attention.ranges import KeyRanges
from llava_fast.ops.attention.tiles import _plane, _times, _zeros, blocks, columns, strides, tile_of

MAX_TOKENS = 4
MAX_ROWS = 64  # queries × heads of a group, all held by one program
MAX_SPLITS = 64


@inlined
def _load_queries(at, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    block_d = tl.load(at + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
    if BLOCK_E > 0:
        e = BLOCK_D + tl.arange(0, BLOCK_E)
        return (block_d, tl.load(at + e[None, :], mask=inside[:, None] & (e < DIM)[None, :], other=0.0))
    else:
        return (block_d,)


@inlined
def _merge_splits(
    split_out_ptr, split_lse_ptr, out_ptr, lse_ptr, row, rows, of_lse, splits,
    DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A query of one head: `row` is (b · T + t) · H + h, one of `rows`; the LSE's is (b · H + h) · T + t."""
    p, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_W)
    # ".cg" reads from L2, where the other programs' results are; this multiprocessor's L1 may hold older ones.
    at = split_lse_ptr + (p.to(tl.int64) * rows + of_lse)
    lse = tl.load(at, mask=p < splits, other=float("-inf"), cache_modifier=".cg")
    best = tl.max(lse)
    shift = tl.where(best == float("-inf"), 0.0, best)
    weight = tl.exp2((lse - shift) * LOG2_E)
    total = tl.sum(weight)
    seen = total > 0
    at = split_out_ptr + ((p.to(tl.int64) * rows + row) * DIM)[:, None] + d[None, :]
    out = tl.load(at, mask=(p < splits)[:, None] & (d < DIM)[None, :], other=0.0, cache_modifier=".cg")
    out = tl.sum(out * weight[:, None], axis=0) / tl.where(seen, total, 1.0)
    tl.store(out_ptr + row.to(tl.int64) * DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < DIM)
    merged = tl.where(seen, best + tl.log2(tl.where(seen, total, 1.0)) * LN_2, float("-inf"))
    tl.store(lse_ptr + of_lse, merged)


@jit
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, start_ptr, end_ptr, out_ptr, lse_ptr,
    merged_out_ptr, merged_lse_ptr, finished_ptr,
    tokens, slots, group,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    scale,
    DIM: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    split, key_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, heads = tl.num_programs(0), tl.num_programs(1) * group
    r, d, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E if BLOCK_E > 0 else 1)
    t, head = r // group, key_head * group + r % group  # row r is query t of one head of the group
    inside = t < tokens
    start = tl.load(start_ptr + (batch * tokens + t), mask=inside, other=0)
    end = tl.minimum(tl.load(end_ptr + (batch * tokens + t), mask=inside, other=0), slots)  # a full cache has no more
    k_from = tl.min(tl.where(end > start, start, 0x7FFFFFFF))
    k_to = tl.maximum(tl.max(tl.where(end > start, end, 0)), 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(k_to - k_from, 0), splits), BLOCK_N) * BLOCK_N
    own_from = k_from + split * share
    own_to = tl.minimum(own_from + share, k_to)

    q = _load_queries(
        q_ptr + (batch.to(tl.int64) * q_batch + t.to(tl.int64) * q_stride + head.to(tl.int64) * q_head)[:, None],
        inside, DIM, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    k_ptr = _plane(k_ptr, batch, k_batch, key_head, k_head, ALIGNED)
    v_ptr = _plane(v_ptr, batch, v_batch, key_head, v_head, ALIGNED)
    if k_scale_ptr is not None:
        k_scale_ptr += (batch * tl.num_programs(1) + key_head).to(tl.int64) * slots
        v_scale_ptr += (batch * tl.num_programs(1) + key_head).to(tl.int64) * slots
    acc = _zeros(BLOCK_M, BLOCK_D, BLOCK_E)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for k0 in range(own_from, own_to, BLOCK_N):
        acc, best, total = _fwd_step(
            acc, best, total, q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k0, own_to, start, end,
            k_stride, v_stride, scale, True, DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    seen = total > 0
    acc = _times(acc, (1.0 / tl.where(seen, total, 1.0))[:, None], BLOCK_E)
    lse = tl.where(seen, (best + tl.log2(tl.where(seen, total, 1.0))) * LN_2, float("-inf"))
    plane = split * tl.num_programs(2) + batch
    row = (plane * tokens + t).to(tl.int64) * heads + head
    at = out_ptr + (row * DIM)[:, None]
    tl.store(at + d[None, :], acc[0].to(out_ptr.dtype.element_ty), mask=inside[:, None] & (d < DIM)[None, :])
    if BLOCK_E > 0:
        tl.store(
            at + BLOCK_D + e[None, :],
            acc[1].to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & (e < DIM - BLOCK_D)[None, :],
        )
    tl.store(lse_ptr + ((plane * heads + head) * tokens + t), lse, mask=inside)
    if finished_ptr is not None:
        # All threads have stored before one of them counts this program as finished: the barrier, then "acq_rel", make
        # the stores visible to the program that counts last, which also sets the counter back for the next launch.
        tl.debug_barrier()
        counter = finished_ptr + (batch * tl.num_programs(1) + key_head)
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            tl.store(counter, 0)
            for i in range(tokens * group):
                token, of_group = i // group, key_head * group + i % group
                _merge_splits(
                    out_ptr, lse_ptr, merged_out_ptr, merged_lse_ptr,
                    (batch * tokens + token) * heads + of_group, tl.num_programs(2) * tokens * heads,
                    (batch * heads + of_group) * tokens + token, splits, DIM, BLOCK_P, BLOCK_W,
                )  # fmt: skip


def launch_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    scale: float,
    splits: int,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    finished: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, T, H, d] and LSE [B, H, T]. The scales of int8 keys and values are [B, G, S], contiguous; `finished` is
    that of `finished_of`, made here if it is not given."""
    batch, tokens, heads, dim = q.shape
    slots, key_heads = k.shape[1:3]
    group = heads // key_heads
    out = unwritten(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    results: tuple[torch.Tensor | None, ...] = (out, lse, None, None, None)
    if splits > 1:
        rows = lse.numel()
        parts = torch.empty(splits * rows * (dim + 1), dtype=torch.float32, device=q.device)
        if finished is None:
            finished = parts.new_zeros((batch, key_heads), dtype=torch.int32)
        results = (*parts.split_with_sizes((splits * rows * dim, splits * rows)), out, lse, finished)
    launch(
        _decode_attention_kernel,
        (splits, key_heads, batch),
        *(q, k, v, k_scale, v_scale, start, end, *results, tokens, slots, group),
        *strides(q, k, v),
        scale * LOG2_E.value,
        tile=tile_of("decode_attention", q),
        **blocks(k, v),
        BLOCK_M=max(16, 1 << (group * tokens - 1).bit_length()),
        BLOCK_P=1 << (splits - 1).bit_length(),
        BLOCK_W=1 << (dim - 1).bit_length(),
    )
    return out, lse


def finished_of(ranges: KeyRanges, k: torch.Tensor, splits: int) -> torch.Tensor | None:
    """int32 [B, G], zeros: how many programs of a key head have finished. A launch leaves zeros behind, so all layers
    of a pass share it; they must be queued on one stream. None where nothing is split."""
    return ranges.derived(_none_finished, k.shape[2]) if splits > 1 else None


def _none_finished(ranges: KeyRanges, key_heads: int) -> torch.Tensor:
    return ranges.start.new_zeros(ranges.shape[0], key_heads)


def splits_of(q: torch.Tensor, k: torch.Tensor) -> int:
    """Enough splits for two programs per multiprocessor, each of at least 128 keys of a full cache. Depends on shapes
    only."""
    wanted = -(-2 * multiprocessors(q.device) // max(1, k.shape[0] * k.shape[2]))
    return max(1, min(wanted, k.shape[1] // 128, MAX_SPLITS))


@torch.library.custom_op("llava_fast::decode_attention", mutates_args=())
def _decode_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, end: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_decode(q, k, v, start, end, scale, splits_of(q, k))


@_decode_op.register_fake
def _decode_fake(q, k, v, start, end, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def takes_decode(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether these are few enough queries for `decode_attention`."""
    return q.shape[1] <= MAX_TOKENS and q.shape[1] * (q.shape[2] // k.shape[2]) <= MAX_ROWS


def decode_attention(
    q_BTHd: torch.Tensor, k_BSGd: torch.Tensor, v_BSGd: torch.Tensor, ranges: KeyRanges, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, T, H, d] and LSE [B, H, T], for tensors that `attention` has checked and `takes_decode` accepts."""
    tensors = q_BTHd, k_BSGd, v_BSGd, ranges.start, ranges.end
    if observed(q_BTHd, k_BSGd, v_BSGd):
        return torch.ops.llava_fast.decode_attention(*tensors, scale)
    splits = splits_of(q_BTHd, k_BSGd)
    return launch_decode(*tensors, scale, splits, finished=finished_of(ranges, k_BSGd, splits))


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """A decoding step of batch 8 with 32 heads after 768 tokens, at every head dimension that fills a tile and at 72:
    with 32 key heads, with 8, and with 8 in int8. The tuner times 64 and 128. float16 compiles as bfloat16."""
    batch, heads, filled, slots = (8, 32, 768, 1024) if device.type != "cpu" else (1, 4, 37, 50)
    start = torch.zeros(batch, 1, dtype=torch.int32, device=device)
    end = torch.full_like(start, filled)
    keys = [key for key in tile_table("decode_attention")["sm_80"]["tiles"] if not key.endswith("fp32")]
    for dim in () if dtype == torch.float16 else (72, *map(int, keys)):
        key = f"{columns(dim)}{' fp32' if dtype == torch.float32 else ''}"
        q = torch.randn(batch, 1, heads, dim, device=device).to(dtype)
        k, v = torch.randn(2, batch, heads, slots, dim, device=device).to(dtype).transpose(2, 3)
        tiles = [
            {"BLOCK_N": block, "num_warps": warps, "num_stages": stages}
            for block in (16, 32, 64, 128)
            for warps in (2, 4, 8)
            for stages in (2, 3, 4)
            if 16 <= block * dim // (32 * warps) <= 64  # elements of a tile of keys per thread
        ]
        if dim in (64, 128):
            call = partial(launch_decode, q, k, v, start, end, dim**-0.5, splits_of(q, k))
            yield Example("decode_attention", key, call, tiles)
        for key_heads in (heads, heads // 4):
            few = k[:, :, :key_heads]
            yield Example("decode_attention", key, partial(launch_decode, q, few, few, start, end, dim**-0.5, 8))
        int8 = torch.zeros(batch, heads // 4, slots, dim, dtype=torch.int8, device=device).transpose(1, 2)
        scales = torch.zeros(batch, heads // 4, slots, device=device)
        call = partial(launch_decode, q, int8, int8, start, end, dim**-0.5, 8, scales, scales)
        yield Example("decode_attention", key, call)
