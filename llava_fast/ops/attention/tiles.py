"""Shared device functions of the attention kernels: loads, stores and products of tiles, loop bounds, block sizes.

A tile is a tuple: [BLOCK_R, BLOCK_D], and if the head dimension is held in two blocks also [BLOCK_R, BLOCK_E].
A line is a flat row index over the batch, b · T + t.
"""

from __future__ import annotations

from functools import cache

import torch

from llava_fast.ops._launch import Tile, tile
from llava_fast.ops._triton import inlined, tl

MAX_HEAD_DIM = 256


def tile_of(kernel: str, q: torch.Tensor) -> Tile:
    """The shipped tile; float32 has its own, as its products do not use tensor cores and need more registers."""
    return tile(kernel, f"{columns(q.shape[3])}{' fp32' if q.dtype == torch.float32 else ''}", q.device)


def columns(dim: int) -> int:
    """Columns that hold a head: the smallest of 16, 32, 64, 80, 96, 128, 160, 192, 256 that is ≥ dim."""
    return sum(_two_blocks(dim))


@cache
def _two_blocks(dim: int) -> tuple[int, int]:
    """Block sizes, powers of two; above 64 a second block holds the rest: 72 is held in 64 + 16 rather than 128."""
    above = max(16, 1 << (dim - 1).bit_length())
    for rest in (above // 8, above // 4):
        if above >= 128 and dim <= above // 2 + rest:
            return above // 2, rest
    return above, 0


def blocks(*tensors: torch.Tensor) -> dict[str, int | bool]:
    """Constexprs for the last dimension, which is held in a block of BLOCK_D and, unless that is 0, one of BLOCK_E.

    ALIGNED: whether every head of every row begins at a multiple of 16 bytes.
    """
    dim = tensors[0].shape[-1]
    block_d, block_e = _two_blocks(dim)
    bits = 0  # of all addresses and strides, in bytes
    for x in tensors:
        batch, row, head, _ = x.stride()
        bits |= x.data_ptr() | (batch | row | head) * x.element_size()
    return {"DIM": dim, "ALIGNED": bits % 16 == 0, "BLOCK_D": block_d, "BLOCK_E": block_e}


def strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """The strides of batch, token and head of each tensor."""
    return sum((x.stride()[:3] for x in tensors), ())


@inlined
def _load_block(
    ptr, stride, rows, CHECK_ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr
):
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    at = ptr + r[:, None] * stride + d[None, :]
    if CHECK_ROWS and DIM < BLOCK:
        x = tl.load(at, mask=(r < rows)[:, None] & (d < DIM)[None, :], other=0)
    elif CHECK_ROWS:
        x = tl.load(at, mask=(r < rows)[:, None], other=0)
    elif DIM < BLOCK:
        x = tl.load(at, mask=(d < DIM)[None, :], other=0)
    else:
        x = tl.load(at)
    return x


@inlined
def _load_tile(
    ptr, stride, rows, CHECK_ROWS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_D] and perhaps [BLOCK_R, BLOCK_E] at `ptr`; zeros in rows ≥ `rows` and columns ≥ DIM."""
    block_d = _load_block(ptr, stride, rows, CHECK_ROWS, DIM, BLOCK_R, BLOCK_D)
    if BLOCK_E > 0:
        return (block_d, _load_block(ptr + BLOCK_D, stride, rows, CHECK_ROWS, DIM - BLOCK_D, BLOCK_R, BLOCK_E))
    else:
        return (block_d,)


@inlined
def _rows_at(ptr, row0, stride, column, count, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to, and mask of, DIM columns of the `count` rows from `row0` on."""
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    at = ptr + ((row0 + r).to(tl.int64) * stride + column)[:, None] + d[None, :]
    return at, (r < count)[:, None] & (d < DIM)[None, :]


@inlined
def _load_rows(
    ptr, row0, stride, column, count,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Load DIM columns of the `count` rows from `row0` on."""
    at, inside = _rows_at(ptr, row0, stride, column, count, DIM, BLOCK_R, BLOCK_D)
    block_d = tl.load(at, mask=inside, other=0.0)
    if BLOCK_E > 0:
        at, inside = _rows_at(ptr, row0, stride, column + BLOCK_D, count, DIM - BLOCK_D, BLOCK_R, BLOCK_E)
        return (block_d, tl.load(at, mask=inside, other=0.0))
    else:
        return (block_d,)


@inlined
def _store_rows(
    ptr, x, row0, stride, column, count,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    at, inside = _rows_at(ptr, row0, stride, column, count, DIM, BLOCK_R, BLOCK_D)
    tl.store(at, x[0].to(ptr.dtype.element_ty), mask=inside)
    if BLOCK_E > 0:
        at, inside = _rows_at(ptr, row0, stride, column + BLOCK_D, count, DIM - BLOCK_D, BLOCK_R, BLOCK_E)
        tl.store(at, x[1].to(ptr.dtype.element_ty), mask=inside)


@inlined
def _zeros(BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    block_d = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if BLOCK_E > 0:
        return (block_d, tl.zeros([BLOCK_R, BLOCK_E], tl.float32))
    else:
        return (block_d,)


@inlined
def _times(x, factor, BLOCK_E: tl.constexpr):
    """Each row of a tile times its factor."""
    if BLOCK_E > 0:
        return (x[0] * factor, x[1] * factor)
    else:
        return (x[0] * factor,)


@inlined
def _cast(x, to: tl.constexpr, BLOCK_E: tl.constexpr):
    if BLOCK_E > 0:
        return (x[0].to(to), x[1].to(to))
    else:
        return (x[0].to(to),)


@inlined
def _products(a, b, BLOCK_E: tl.constexpr):
    """a · bᵀ."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if BLOCK_E > 0:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")
    return s


@inlined
def _weighted(p, x, acc, BLOCK_E: tl.constexpr):
    """acc + p · x."""
    p = p.to(x[0].dtype)
    block_d = tl.dot(p, x[0], acc[0], input_precision="ieee")
    if BLOCK_E > 0:
        return (block_d, tl.dot(p, x[1], acc[1], input_precision="ieee"))
    else:
        return (block_d,)


@inlined
def _plane(ptr, batch, batch_stride, head, head_stride, ALIGNED: tl.constexpr):
    """Pointer to a head of a batch row. Triton does not infer alignment from strides divisible by 8, but not by 16."""
    ptr += batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@inlined
def _next_tile(first_ptr, line0, row0, stop, BLOCK_R: tl.constexpr):
    """The first row from `row0` on that begins a tile, and the number of rows before `stop` that begin one."""
    row = row0 + tl.arange(0, BLOCK_R)
    first = tl.load(first_ptr + (line0 + row), mask=row < stop, other=0)
    begins = (row < stop) & ((row - first) % BLOCK_R == 0)
    return tl.min(tl.where(begins, row, 0x7FFFFFFF)), tl.sum(begins.to(tl.int32))


@inlined
def _tile_rows(first_ptr, line0, rows, row0, BLOCK_R: tl.constexpr):
    """Number of rows of the tile at `row0`: those of its BLOCK_R rows that belong to the same sample."""
    row = row0 + tl.arange(0, BLOCK_R)
    first = tl.load(first_ptr + (line0 + row), mask=row < rows, other=-1)
    return tl.sum((first == tl.load(first_ptr + (line0 + row0))).to(tl.int32))


@inlined
def _ranges(start_ptr, end_ptr, line, count, BLOCK_M: tl.constexpr):
    row = line + tl.arange(0, BLOCK_M)
    start = tl.load(start_ptr + row, mask=row < line + count, other=0)
    end = tl.load(end_ptr + row, mask=row < line + count, other=0)
    return start, end


@inlined
def _key_walk(start_ptr, end_ptr, line, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Loop bounds of a tile of queries: the first key that its rows see, and one past the last; the number of key tiles
    between them; the tiles [whole, mixed), which every row sees completely."""
    start, end = _ranges(start_ptr, end_ptr, line, count, BLOCK_M)
    row, seeing = tl.arange(0, BLOCK_M), end > start
    k_from = tl.min(tl.where(seeing, start, 0x7FFFFFFF))
    k_to = tl.maximum(tl.max(tl.where(seeing, end, 0)), 0)
    tiles = tl.cdiv(tl.maximum(k_to - k_from, 0), BLOCK_N)
    from_all = tl.max(tl.where(row < count, start, 0))
    to_all = tl.min(tl.where(row < count, end, 0x7FFFFFFF))
    whole = tl.cdiv(tl.maximum(from_all - k_from, 0), BLOCK_N)
    mixed = tl.maximum(whole, tl.maximum(to_all - k_from, 0) // BLOCK_N)
    return k_from, k_to, tiles, whole, mixed
