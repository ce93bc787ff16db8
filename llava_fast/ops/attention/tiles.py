"""What the attention kernels are made of: tiles of rows, their products, and the walk over them.

A tile is a tuple: [BLOCK_R, BLOCK_D], and where the head dimension is held in two blocks [BLOCK_R, BLOCK_E] as well.
A line is a row counted through the batch, b · T + t.
"""

from llava_fast.ops._triton import inlined, tl


@inlined
def _load_part(
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
    """[BLOCK_R, BLOCK_D] and perhaps [BLOCK_R, BLOCK_E] from `ptr` on, zeros from row `rows` and column DIM on."""
    low = _load_part(ptr, stride, rows, CHECK_ROWS, DIM, BLOCK_R, BLOCK_D)
    if BLOCK_E > 0:
        parts = (low, _load_part(ptr + BLOCK_D, stride, rows, CHECK_ROWS, DIM - BLOCK_D, BLOCK_R, BLOCK_E))
    else:
        parts = (low,)
    return parts


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
    """DIM columns of the `count` rows from `row0` on."""
    at, inside = _rows_at(ptr, row0, stride, column, count, DIM, BLOCK_R, BLOCK_D)
    low = tl.load(at, mask=inside, other=0.0)
    if BLOCK_E > 0:
        at, inside = _rows_at(ptr, row0, stride, column + BLOCK_D, count, DIM - BLOCK_D, BLOCK_R, BLOCK_E)
        parts = (low, tl.load(at, mask=inside, other=0.0))
    else:
        parts = (low,)
    return parts


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
    low = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if BLOCK_E > 0:
        parts = (low, tl.zeros([BLOCK_R, BLOCK_E], tl.float32))
    else:
        parts = (low,)
    return parts


@inlined
def _times(x, factor, BLOCK_E: tl.constexpr):
    """Each row of a tile times its factor."""
    if BLOCK_E > 0:
        parts = (x[0] * factor, x[1] * factor)
    else:
        parts = (x[0] * factor,)
    return parts


@inlined
def _cast(x, to: tl.constexpr, BLOCK_E: tl.constexpr):
    if BLOCK_E > 0:
        parts = (x[0].to(to), x[1].to(to))
    else:
        parts = (x[0].to(to),)
    return parts


@inlined
def _products(a, b, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr):
    """Of each row of a with each of b. A lone row is multiplied outside of the tensor cores, which take 16 at least."""
    if BLOCK_R == 1:
        s = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), axis=1)[None, :]
        if BLOCK_E > 0:
            s += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), axis=1)[None, :]
    else:
        s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
        if BLOCK_E > 0:
            s = tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")
    return s


@inlined
def _weighted(p, x, acc, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr):
    """acc + p · x."""
    if BLOCK_R == 1:
        w = tl.trans(p.to(tl.float32))
        low = acc[0] + tl.sum(w * x[0].to(tl.float32), axis=0)[None, :]
        if BLOCK_E > 0:
            parts = (low, acc[1] + tl.sum(w * x[1].to(tl.float32), axis=0)[None, :])
        else:
            parts = (low,)
    else:
        p = p.to(x[0].dtype)
        low = tl.dot(p, x[0], acc[0], input_precision="ieee")
        if BLOCK_E > 0:
            parts = (low, tl.dot(p, x[1], acc[1], input_precision="ieee"))
        else:
            parts = (low,)
    return parts


@inlined
def _plane(ptr, batch, batch_stride, head, head_stride, ALIGNED: tl.constexpr):
    """Where a head of a batch row begins. Strides that are multiples of 8, but not of 16, are not seen as aligned."""
    ptr += batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@inlined
def _next_tile(first_ptr, line0, row0, stop, BLOCK_R: tl.constexpr):
    """The first row, from `row0` on, that begins a tile, and how many rows before `stop` do."""
    row = row0 + tl.arange(0, BLOCK_R)
    first = tl.load(first_ptr + (line0 + row), mask=row < stop, other=0)
    begins = (row < stop) & ((row - first) % BLOCK_R == 0)
    return tl.min(tl.where(begins, row, 0x7FFFFFFF)), tl.sum(begins.to(tl.int32))


@inlined
def _tile_rows(first_ptr, line0, rows, row0, BLOCK_R: tl.constexpr):
    """How many rows the tile at `row0` has: as many of BLOCK_R as are of its sample."""
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
def _cut(rows, BLOCK_R: tl.constexpr, NARROW: tl.constexpr):
    """Tiles that `rows` rows are walked in, and whether a narrow one comes after those."""
    rest = rows % BLOCK_R
    if NARROW > 0 and BLOCK_R > NARROW:
        narrow = ((rest > 0) & (rest <= NARROW)).to(tl.int32)
        tiles = tl.cdiv(rows, BLOCK_R) - narrow
    else:
        narrow, tiles = rest * 0, tl.cdiv(rows, BLOCK_R)
    return tiles, narrow


@inlined
def _key_walk(start_ptr, end_ptr, line, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NARROW: tl.constexpr):
    """The first key that a tile's rows see and one past the last; in tiles of keys from the first: the number of them,
    whether a narrow one follows, and the run [whole, mixed) of those that every row sees all of."""
    start, end = _ranges(start_ptr, end_ptr, line, count, BLOCK_M)
    row, seeing = tl.arange(0, BLOCK_M), end > start
    low = tl.min(tl.where(seeing, start, 0x7FFFFFFF))
    high = tl.maximum(tl.max(tl.where(seeing, end, 0)), 0)
    tiles, narrow = _cut(tl.maximum(high - low, 0), BLOCK_N, NARROW)
    from_all = tl.max(tl.where(row < count, start, 0))
    to_all = tl.min(tl.where(row < count, end, 0x7FFFFFFF))
    whole = tl.cdiv(tl.maximum(from_all - low, 0), BLOCK_N)
    mixed = tl.maximum(whole, tl.maximum(to_all - low, 0) // BLOCK_N)
    return low, high, tiles, narrow, whole, mixed
