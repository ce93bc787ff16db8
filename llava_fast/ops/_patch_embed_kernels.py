"""The kernels of `patch_embed.py`: GEMMs with a matrix of patches that is read directly from the images.

Row m of that matrix is token m % T of image m // T. Column k is one channel of one pixel of the patch, in storage
order: (row, column, channel) for bytes [B, H, W, C], (channel, row, column) for floats [B, C, H, W].
"""

from __future__ import annotations

from llava_fast.ops._triton import inlined, jit, tl


@inlined
def _patch_rows(
    first_m, rows, tokens, height, width,
    BYTES: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """For the rows of a tile: offset of the first row's image (64-bit, in elements), offset of each row's patch from
    there (32-bit), and whether the row has a patch; token 0, the CLS, has none."""
    row = first_m + tl.arange(0, BLOCK_M)
    image = first_m // tokens
    token = row % tokens
    patch = tl.maximum(token - 1, 0)
    columns = width // P
    first = (patch // columns) * P * width + (patch % columns) * P
    if BYTES:
        first = first * C
    image_size = height * width * C
    start = (row // tokens - image) * image_size + first
    return tl.cast(image, tl.int64) * image_size, start, (row < rows) & (token > 0)


@inlined
def _patch_columns(
    k, height, width, scale0, scale1, scale2, shift0, shift1, shift2,
    BYTES: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """For columns k: their offset from the start of a patch, whether they exist, and the scale and shift that normalise
    bytes."""
    if BYTES:  # [H, W, C]: a row of a patch is contiguous
        offset = (k // (C * P)) * width * C + k % (C * P)
    else:  # [C, H, W]
        offset = (k // (P * P)) * height * width + (k // P % P) * width + k % P
    channel = k % C
    scale = tl.where(channel == 0, scale0, tl.where(channel == 1, scale1, scale2))
    shift = tl.where(channel == 0, shift0, tl.where(channel == 1, shift1, shift2))
    return offset, k < C * P * P, scale, shift


@inlined
def _read_pixels(image_ptr, start, has_pixels, offset, inside, scale, shift, BYTES: tl.constexpr):
    """A tile of patches, from the results of the two functions above, broadcast. Bytes are normalised in float32."""
    values = tl.load(image_ptr + start + offset, mask=has_pixels & inside, other=0)
    if BYTES:
        values = values.to(tl.float32) * scale + shift
    return values


@jit
def _patch_embed_fwd_kernel(
    pixels_ptr,
    weight_ptr,
    cls_ptr,
    position_ptr,
    z_ptr,
    rows,
    tokens,
    width_d,
    height,
    width,
    scale0,
    scale1,
    scale2,
    shift0,
    shift1,
    shift2,
    BYTES: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Consecutive programs have the same rows: an image is read from memory once, then from the L2 cache.
    tiles_n = tl.cdiv(width_d, BLOCK_N)
    first_m = (tl.program_id(0) // tiles_n) * BLOCK_M
    first_n = (tl.program_id(0) % tiles_n) * BLOCK_N
    column = first_n + tl.arange(0, BLOCK_N)
    image, start, has_pixels = _patch_rows(first_m, rows, tokens, height, width, BYTES, C, P, BLOCK_M)
    pixels_ptr += image

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_k in range(0, C * P * P, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        offset, inside, scale, shift = _patch_columns(
            k, height, width, scale0, scale1, scale2, shift0, shift1, shift2, BYTES, C, P
        )
        values = _read_pixels(
            pixels_ptr, start[:, None], has_pixels[:, None],
            offset[None, :], inside[None, :], scale[None, :], shift[None, :], BYTES,
        )  # fmt: skip
        # values [BLOCK_M, BLOCK_K], weight [BLOCK_K, BLOCK_N]
        weight = tl.load(
            weight_ptr + k[:, None] * width_d + column[None, :],
            mask=inside[:, None] & (column < width_d)[None, :],
            other=0.0,
        )
        sums = tl.dot(values.to(weight_ptr.dtype.element_ty), weight, sums, input_precision="ieee")

    # Recomputed after the loop instead of occupying registers during it.
    row = first_m + tl.arange(0, BLOCK_M)
    token = row % tokens
    wanted = (row < rows)[:, None] & (column < width_d)[None, :]
    cls = tl.load(cls_ptr + column, mask=column < width_d, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + token[:, None] * width_d + column[None, :], mask=wanted, other=0.0)
    z = tl.where((token == 0)[:, None], cls[None, :], sums) + position.to(tl.float32)
    z_tile = z_ptr + row.to(tl.int64)[:, None] * width_d + column[None, :]
    tl.store(z_tile, z.to(z_ptr.dtype.element_ty), mask=wanted)


@jit
def _patch_embed_dweight_kernel(
    pixels_ptr,
    dz_ptr,
    dweight_ptr,
    rows,
    tokens,
    width_d,
    height,
    width,
    scale0,
    scale1,
    scale2,
    shift0,
    shift1,
    shift2,
    BYTES: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dweight [D, C, P, P] = patchesᵀ · dz; the sum runs over BLOCK_M rows at a time."""
    tiles_n = tl.cdiv(width_d, BLOCK_N)
    k = (tl.program_id(0) // tiles_n) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset, inside, scale, shift = _patch_columns(
        k, height, width, scale0, scale1, scale2, shift0, shift1, shift2, BYTES, C, P
    )

    sums = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for first_m in range(0, rows, BLOCK_M):
        image, start, has_pixels = _patch_rows(first_m, rows, tokens, height, width, BYTES, C, P, BLOCK_M)
        values = _read_pixels(
            pixels_ptr + image, start[None, :], has_pixels[None, :],
            offset[:, None], inside[:, None], scale[:, None], shift[:, None], BYTES,
        )  # fmt: skip
        # values [BLOCK_K, BLOCK_M], dz [BLOCK_M, BLOCK_N]
        dz_tile = dz_ptr + tl.cast(first_m, tl.int64) * width_d
        dz = tl.load(
            dz_tile + tl.arange(0, BLOCK_M)[:, None] * width_d + column[None, :],
            mask=has_pixels[:, None] & (column < width_d)[None, :],  # without the CLS rows
            other=0.0,
        )
        sums = tl.dot(values.to(dz_ptr.dtype.element_ty), dz, sums, input_precision="ieee")

    channel, place = k // (P * P), k % (P * P)
    if BYTES:
        channel, place = k % C, k // C
    into = dweight_ptr + column[None, :] * (C * P * P) + (channel * P * P + place)[:, None]
    tl.store(into, sums.to(dweight_ptr.dtype.element_ty), mask=inside[:, None] & (column < width_d)[None, :])
