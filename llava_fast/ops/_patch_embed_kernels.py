"""The kernels of `patch_embed.py`: products with patches that are read from images as they are stored.

Row m of the left side is token m % T of image m // T, element k of it one pixel's channel, counted in the order of
storage: (row, column, channel) of a patch for bytes [B, H, W, C], (channel, row, column) for floats [B, C, H, W].
"""

from __future__ import annotations

from llava_fast.ops._triton import inlined, jit, tl


@inlined
def _patch_offset(token, height, width, BYTES: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """Where a patch starts in its image, in elements; token 0 is the CLS, which has none."""
    patch = tl.maximum(token - 1, 0)
    columns = width // P
    first = (patch // columns) * P * width + (patch % columns) * P
    if BYTES:
        first = first * C
    return first


@inlined
def _pixel_offset(k, height, width, BYTES: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """Where element k of a patch lies from the start of the patch, in the order in which the image is stored."""
    if BYTES:  # [H, W, C]: a row of a patch is one run of bytes
        offset = (k // (C * P)) * width * C + k % (C * P)
    else:  # [C, H, W]
        offset = (k // (P * P)) * height * width + (k // P % P) * width + k % P
    return offset


@inlined
def _of_channel(channel, first, second, third):
    return tl.where(channel == 0, first, tl.where(channel == 1, second, third))


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
    # Programs side by side share rows: an image is read once from memory and then from the L2 cache.
    tiles_n = tl.cdiv(width_d, BLOCK_N)
    first_m = (tl.program_id(0) // tiles_n) * BLOCK_M
    first_n = (tl.program_id(0) % tiles_n) * BLOCK_N
    row = first_m + tl.arange(0, BLOCK_M)
    column = first_n + tl.arange(0, BLOCK_N)
    # 64-bit up to the tile's first image, 32-bit from there.
    image = first_m // tokens
    image_size = height * width * C
    token = row % tokens
    start = (row // tokens - image) * image_size + _patch_offset(token, height, width, BYTES, C, P)
    has_pixels = (row < rows) & (token > 0)
    pixels_ptr += image.to(tl.int64) * image_size

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_k in range(0, C * P * P, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        inside = k < C * P * P
        offset = _pixel_offset(k, height, width, BYTES, C, P)
        values = tl.load(
            pixels_ptr + start[:, None] + offset[None, :], mask=has_pixels[:, None] & inside[None, :], other=0
        )  # [BLOCK_M, BLOCK_K]
        if BYTES:
            scale = _of_channel(k % C, scale0, scale1, scale2)
            shift = _of_channel(k % C, shift0, shift1, shift2)
            values = values.to(tl.float32) * scale[None, :] + shift[None, :]
        weight = tl.load(
            weight_ptr + k[:, None] * width_d + column[None, :],
            mask=inside[:, None] & (column < width_d)[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        sums = tl.dot(values.to(weight_ptr.dtype.element_ty), weight, sums, input_precision="ieee")

    # Computed anew, so that the loop keeps its registers.
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
    inside = k < C * P * P
    offset = _pixel_offset(k, height, width, BYTES, C, P)
    image_size = height * width * C
    if BYTES:
        scale = _of_channel(k % C, scale0, scale1, scale2)
        shift = _of_channel(k % C, shift0, shift1, shift2)

    sums = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for first_m in range(0, rows, BLOCK_M):
        row = first_m + tl.arange(0, BLOCK_M)
        image = first_m // tokens
        token = row % tokens
        start = (row // tokens - image) * image_size + _patch_offset(token, height, width, BYTES, C, P)
        has_pixels = (row < rows) & (token > 0)
        values = tl.load(
            pixels_ptr + tl.cast(image, tl.int64) * image_size + offset[:, None] + start[None, :],
            mask=inside[:, None] & has_pixels[None, :],
            other=0,
        )  # [BLOCK_K, BLOCK_M]
        if BYTES:
            values = values.to(tl.float32) * scale[:, None] + shift[:, None]
        dz_tile = dz_ptr + tl.cast(first_m, tl.int64) * width_d
        dz = tl.load(
            dz_tile + tl.arange(0, BLOCK_M)[:, None] * width_d + column[None, :],
            mask=has_pixels[:, None] & (column < width_d)[None, :],  # which leaves out the CLS rows
            other=0.0,
        )  # [BLOCK_M, BLOCK_N]
        sums = tl.dot(values.to(dz_ptr.dtype.element_ty), dz, sums, input_precision="ieee")

    channel, place = k // (P * P), k % (P * P)
    if BYTES:
        channel, place = k % C, k // C
    into = dweight_ptr + column[None, :] * (C * P * P) + (channel * P * P + place)[:, None]
    tl.store(into, sums.to(dweight_ptr.dtype.element_ty), mask=inside[:, None] & (column < width_d)[None, :])
