"""The kernels of `projector.py`: a linear layer with GELU in its epilogue, and the way back through GELU.

M rows, K columns of a layer's input, N of its output; tiles are BLOCK_M × BLOCK_N, in steps of BLOCK_K.
"""

from __future__ import annotations

from llava_fast.ops._triton import jit, tl


@jit
def _projector_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    slots_ptr,
    out_ptr,
    hidden_ptr,
    m,
    n,
    k,
    rows_per_block,
    x_stride_block,
    x_stride_row,
    weight_stride_n,
    weight_stride_k,
    out_stride,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that run together share a few rows of tiles of x, and go along the weight: both stay in the L2 cache.
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (8 * tiles_n)
    within = tl.program_id(0) % (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    first_m = (group * 8 + within % height) * BLOCK_M
    first_n = (within // height) * BLOCK_N

    # Rows and columns beyond the last are read as the last, and k is whole steps: nothing needs a mask.
    row = tl.minimum(first_m + tl.arange(0, BLOCK_M), m - 1)
    column = tl.minimum(first_n + tl.arange(0, BLOCK_N), n - 1)
    step = tl.arange(0, BLOCK_K)
    base = (row // rows_per_block).to(tl.int64) * x_stride_block + (row % rows_per_block).to(tl.int64) * x_stride_row
    x_tile = x_ptr + base[:, None] + step[None, :]
    weight_tile = weight_ptr + column.to(tl.int64)[None, :] * weight_stride_n + step[:, None] * weight_stride_k
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, k, BLOCK_K):
        x = tl.load(x_tile)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_tile)  # [BLOCK_K, BLOCK_N]
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        x_tile += BLOCK_K
        weight_tile += BLOCK_K * weight_stride_k

    # Offsets from here on are computed anew, so that the loop keeps its registers.
    row = first_m + tl.arange(0, BLOCK_M)
    column = first_n + tl.arange(0, BLOCK_N)
    inside = (row < m)[:, None] & (column < n)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    if hidden_ptr is not None:
        place = row.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(hidden_ptr + place, sums.to(hidden_ptr.dtype.element_ty), mask=inside)
    if GELU:
        sums = 0.5 * sums * (1.0 + tl.erf(sums * 0.7071067811865476))
    if slots_ptr is not None:
        place = tl.load(slots_ptr + row, mask=row < m, other=0)
    else:
        place = row.to(tl.int64)
    tl.store(out_ptr + place[:, None] * out_stride + column[None, :], sums.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _projector_bwd_kernel(
    da_ptr,
    h_ptr,
    a_ptr,
    dbias_ptr,
    rows,
    width,
    tiles_per_program,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # dh = da · GELU'(h), written over da. Each program walks a run of row tiles, and sums the bias gradient of its
    # columns in registers.
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for step in range(tiles_per_program):
        row = (tl.program_id(0) * tiles_per_program + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        h = tl.load(h_ptr + place, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + place, mask=inside, other=0.0).to(tl.float32)
        below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        dh = da * (below + h * 0.3989422804014327 * tl.exp(-0.5 * h * h))
        tl.store(da_ptr + place, dh.to(da_ptr.dtype.element_ty), mask=inside)
        if a_ptr is not None:
            tl.store(a_ptr + place, (h * below).to(a_ptr.dtype.element_ty), mask=inside)
        if dbias_ptr is not None:
            sums += tl.sum(dh, axis=0)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * width + column, sums, mask=column < width)
