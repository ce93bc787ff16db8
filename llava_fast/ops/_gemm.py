"""Triton GEMMs over the first rows of a matrix; the number of rows is read on the device, without synchronisation.

A library's GEMM takes its sizes from the host, so multiplying only the labelled rows would need a synchronisation. Here
the grid covers all rows, and programs beyond `count` return at once: a product of no rows costs one launch.

    rows_product(a, b)     a[:left] · b                        left = clamp(count − start, 0, rows of a)
    add_outer(out, a, b)   out += a[:left]ᵀ · b[:left]

fp32 accumulation; fp32 operands are multiplied in fp32 (no TF32). Rows from `left` on are never read into a product, so
they may contain NaN. Shapes: M × K times K × N, in tiles BLOCK_M × BLOCK_K × BLOCK_N.
"""

from __future__ import annotations

import torch

from llava_fast.ops._launch import launch, tile
from llava_fast.ops._triton import inlined, jit, tl


@inlined
def tile_order(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of this program's tile in [M, N] = a · b, in an order that reuses the L2 cache.

    Consecutive programs work on the same 8 rows of tiles of a, column of tiles by column of b.
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (8 * tiles_n)
    within = tl.program_id(0) % (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    return (group * 8 + within % height) * BLOCK_M, (within // height) * BLOCK_N


@jit
def _gemm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    count_ptr,
    start,
    m,
    n,
    k,
    a_stride_m,
    a_stride_k,
    b_stride_k,
    b_stride_n,
    out_stride,
    COUNT_K: tl.constexpr,
    ADD: tl.constexpr,
    ZERO_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    left = tl.maximum(tl.load(count_ptr) - start, 0)
    first_m, first_n = tile_order(m, n, BLOCK_M, BLOCK_N)
    rows = m
    depth = k
    if COUNT_K:
        depth = tl.minimum(left, k).to(tl.int32)
        if ADD:
            if depth == 0:
                return
    else:
        rows = tl.minimum(left, m).to(tl.int32)
        if first_m >= rows:
            if not ZERO_REST:
                return
            depth = 0
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    wanted_m = first_m + row < rows
    wanted_n = first_n + column < n
    # 64-bit bases, 32-bit offsets inside a tile.
    a_tile = a_ptr + first_m.to(tl.int64) * a_stride_m + row[:, None] * a_stride_m + step[None, :] * a_stride_k
    b_tile = b_ptr + first_n.to(tl.int64) * b_stride_n + step[:, None] * b_stride_k + column[None, :] * b_stride_n
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_k in range(0, depth, BLOCK_K):
        wanted_k = first_k + step < depth
        a = tl.load(a_tile, mask=wanted_m[:, None] & wanted_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(b_tile, mask=wanted_k[:, None] & wanted_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        sums = tl.dot(a, b, sums, input_precision="ieee")
        a_tile += BLOCK_K * a_stride_k
        b_tile += BLOCK_K * b_stride_k

    # Offsets are recomputed after the loop instead of occupying registers during it.
    row = first_m + tl.arange(0, BLOCK_M)
    column = first_n + tl.arange(0, BLOCK_N)
    out_tile = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    wanted = (row < m)[:, None] & (column < n)[None, :]
    if not COUNT_K and not ZERO_REST:
        wanted = (row < rows)[:, None] & (column < n)[None, :]
    if ADD:
        sums += tl.load(out_tile, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out_tile, sums.to(out_ptr.dtype.element_ty), mask=wanted)


def _gemm(
    a_MK: torch.Tensor,
    b_KN: torch.Tensor,
    out_MN: torch.Tensor,
    count: torch.Tensor,
    start: int,
    **flags: bool,
) -> None:
    (m, k), n = a_MK.shape, b_KN.shape[1]
    choice = tile("gemm", "single" if a_MK.dtype == torch.float32 else "half", a_MK.device)
    if m and n:
        launch(
            _gemm_kernel,
            (-(-m // choice["BLOCK_M"]) * -(-n // choice["BLOCK_N"]),),
            *(a_MK, b_KN, out_MN, count, start, m, n, k, *a_MK.stride(), *b_KN.stride(), out_MN.stride(0)),
            tile=choice,
            **flags,
        )


def rows_product(
    a_MK: torch.Tensor,
    b_KN: torch.Tensor,
    count: torch.Tensor,
    start: int,
    *,
    zero_rest: bool = False,
) -> torch.Tensor:
    """a[:left] · b [M, N] in the dtype of `a`. Rows from `left` on are zero with `zero_rest`, else not written."""
    out_MN = torch.empty(a_MK.shape[0], b_KN.shape[1], dtype=a_MK.dtype, device=a_MK.device)
    _gemm(a_MK, b_KN, out_MN, count, start, COUNT_K=False, ADD=False, ZERO_REST=zero_rest)
    return out_MN


def add_outer(out_MN: torch.Tensor, a_KM: torch.Tensor, b_KN: torch.Tensor, count: torch.Tensor, start: int) -> None:
    """out += a[:left]ᵀ · b[:left], in place; `out` in any dtype, with contiguous rows."""
    _gemm(a_KM.t(), b_KN, out_MN, count, start, COUNT_K=True, ADD=True, ZERO_REST=False)
