"""The Triton kernels of `attention.py`, which says how tiles are laid and walked.

`first` is, for each row (a query, or a key), the first row of its sample. `scale` comes multiplied by log2(e),
since the hardware's exponential is 2ˣ. A line is a row counted through the batch, b · T + t.

Registers decide these kernels. What does not depend on the tile would be moved out of the loop over tiles and hold
registers all through the walk, until some spill: hence `disable_licm`, and addresses outside of the inner loops that
are written in terms of the tile's first row. Bases are 64-bit, offsets inside a tile of an inner loop are not.
"""

from llava_fast.ops._triton import inlined, jit, tl


@inlined
def _load_tile(
    ptr, stride, rows, CHECK_ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """[BLOCK_R, BLOCK_D] from `ptr` on, zeros from row `rows` and column DIM on."""
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    at = ptr + r[:, None] * stride + d[None, :]
    if CHECK_ROWS and DIM < BLOCK_D:
        x = tl.load(at, mask=(r < rows)[:, None] & (d < DIM)[None, :], other=0.0)
    elif CHECK_ROWS:
        x = tl.load(at, mask=(r < rows)[:, None], other=0.0)
    elif DIM < BLOCK_D:
        x = tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@inlined
def _rows_at(ptr, row0, stride, column, count, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to, and mask of, DIM columns of the `count` rows from `row0` on."""
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    at = ptr + ((row0 + r).to(tl.int64) * stride + column)[:, None] + d[None, :]
    return at, (r < count)[:, None] & (d < DIM)[None, :]


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
def _key_walk(start_ptr, end_ptr, line, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key that a tile's rows see and one past the last; in tiles of keys from the first: the number of them,
    and the run [whole, mixed) of those that every row sees all of."""
    start, end = _ranges(start_ptr, end_ptr, line, count, BLOCK_M)
    row, seeing = tl.arange(0, BLOCK_M), end > start
    low = tl.min(tl.where(seeing, start, 0x7FFFFFFF))
    high = tl.maximum(tl.max(tl.where(seeing, end, 0)), 0)
    tiles = tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
    from_all = tl.max(tl.where(row < count, start, 0))
    to_all = tl.min(tl.where(row < count, end, 0x7FFFFFFF))
    whole = tl.cdiv(tl.maximum(from_all - low, 0), BLOCK_N)
    mixed = tl.maximum(whole, tl.maximum(to_all - low, 0) // BLOCK_N)
    return low, high, tiles, whole, mixed


@inlined
def _fwd_step(
    acc, best, total, q, k_ptr, v_ptr, k0, high, start, end, k_stride, v_stride, scale,
    MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    base = tl.cast(k0, tl.int64)
    k = _load_tile(k_ptr + base * k_stride, k_stride, high - k0, MASKED, DIM, BLOCK_N, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if MASKED:
        key = k0 + tl.arange(0, BLOCK_N)
        s = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), s, float("-inf"))
    new = tl.maximum(best, tl.max(s, axis=1) * scale)
    # A row that has seen nothing yet has −inf; subtracting it from itself would give NaN.
    shift = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    p = tl.exp2(s * scale - shift[:, None])
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(p, axis=1)
    v = _load_tile(v_ptr + base * v_stride, v_stride, high - k0, MASKED, DIM, BLOCK_N, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new, total


@jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, first_ptr, out_ptr, lse_ptr,
    tokens, group,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Late tiles of a causal sample are the longest, so they go first.
    window, head, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    line0, plane = batch * tokens, (batch * heads + head) * tokens
    q_ptr += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    k_ptr += batch.to(tl.int64) * k_batch + (head // group).to(tl.int64) * k_head
    v_ptr += batch.to(tl.int64) * v_batch + (head // group).to(tl.int64) * v_head

    stop = tl.minimum(window * BLOCK_M + BLOCK_M, tokens)
    row0, tiles_here = _next_tile(first_ptr, line0, window * BLOCK_M, stop, BLOCK_M)
    for _ in tl.range(tiles_here, disable_licm=True):
        count = _tile_rows(first_ptr, line0, tokens, row0, BLOCK_M)
        at, inside = _rows_at(q_ptr, row0, q_stride, 0, count, DIM, BLOCK_M, BLOCK_D)
        q = tl.load(at, mask=inside, other=0.0)
        low, high, tiles, whole, mixed = _key_walk(start_ptr, end_ptr, line0 + row0, count, BLOCK_M, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for i in range(whole, mixed):
            acc, best, total = _fwd_step(
                acc, best, total, q, k_ptr, v_ptr, low + i * BLOCK_N, high, None, None, k_stride, v_stride, scale,
                False, DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        start, end = _ranges(start_ptr, end_ptr, line0 + row0, count, BLOCK_M)
        for i in range(tiles - (mixed - whole)):
            step = i + tl.where(i < whole, 0, mixed - whole)
            acc, best, total = _fwd_step(
                acc, best, total, q, k_ptr, v_ptr, low + step * BLOCK_N, high, start, end, k_stride, v_stride, scale,
                True, DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        seen = total > 0
        acc = acc * (1.0 / tl.where(seen, total, 1.0))[:, None]
        at, inside = _rows_at(out_ptr, line0 + row0, heads * DIM, head * DIM, count, DIM, BLOCK_M, BLOCK_D)
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside)
        lse = tl.where(seen, (best + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
        row = row0 + tl.arange(0, BLOCK_M)
        tl.store(lse_ptr + (plane + row), lse, mask=row < row0 + count)
        row0, _left = _next_tile(first_ptr, line0, row0 + 1, stop, BLOCK_M)


@inlined
def _dq_step(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k0, high, start, end, k_stride, v_stride, scale,
    MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    base = tl.cast(k0, tl.int64)
    k = _load_tile(k_ptr + base * k_stride, k_stride, high - k0, MASKED, DIM, BLOCK_N, BLOCK_D)
    v = _load_tile(v_ptr + base * v_stride, v_stride, high - k0, MASKED, DIM, BLOCK_N, BLOCK_D)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])  # [BLOCK_M, BLOCK_N]
    if MASKED:
        key = k0 + tl.arange(0, BLOCK_N)
        p = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), p, 0.0)
    ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, first_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr, dq_ptr, delta_ptr,
    tokens, group,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    dout_batch, dout_stride, dout_head,
    scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    window, head, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    line0, plane = batch * tokens, (batch * heads + head) * tokens
    q_ptr += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    k_ptr += batch.to(tl.int64) * k_batch + (head // group).to(tl.int64) * k_head
    v_ptr += batch.to(tl.int64) * v_batch + (head // group).to(tl.int64) * v_head
    dout_ptr += batch.to(tl.int64) * dout_batch + head.to(tl.int64) * dout_head

    stop = tl.minimum(window * BLOCK_M + BLOCK_M, tokens)
    row0, tiles_here = _next_tile(first_ptr, line0, window * BLOCK_M, stop, BLOCK_M)
    for _ in tl.range(tiles_here, disable_licm=True):
        count = _tile_rows(first_ptr, line0, tokens, row0, BLOCK_M)
        at, inside = _rows_at(out_ptr, line0 + row0, heads * DIM, head * DIM, count, DIM, BLOCK_M, BLOCK_D)
        out = tl.load(at, mask=inside, other=0.0)
        at, inside = _rows_at(dout_ptr, row0, dout_stride, 0, count, DIM, BLOCK_M, BLOCK_D)
        dout = tl.load(at, mask=inside, other=0.0)
        # d lse / d s = p, so a gradient of the LSE enters where delta = Σ dout · out does.
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
        row = row0 + tl.arange(0, BLOCK_M)
        of_row = plane + row
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + of_row, mask=row < row0 + count, other=0.0)
        tl.store(delta_ptr + of_row, delta, mask=row < row0 + count)
        lse = tl.load(lse_ptr + of_row, mask=row < row0 + count, other=0.0) * 1.4426950408889634
        at, inside = _rows_at(q_ptr, row0, q_stride, 0, count, DIM, BLOCK_M, BLOCK_D)
        q = tl.load(at, mask=inside, other=0.0)
        low, high, tiles, whole, mixed = _key_walk(start_ptr, end_ptr, line0 + row0, count, BLOCK_M, BLOCK_N)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for i in range(whole, mixed):
            dq = _dq_step(
                dq, q, dout, lse, delta, k_ptr, v_ptr, low + i * BLOCK_N, high, None, None, k_stride, v_stride,
                scale, False, DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        start, end = _ranges(start_ptr, end_ptr, line0 + row0, count, BLOCK_M)
        for i in range(tiles - (mixed - whole)):
            step = i + tl.where(i < whole, 0, mixed - whole)
            dq = _dq_step(
                dq, q, dout, lse, delta, k_ptr, v_ptr, low + step * BLOCK_N, high, start, end, k_stride, v_stride,
                scale, True, DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        at, inside = _rows_at(dq_ptr, line0 + row0, heads * DIM, head * DIM, count, DIM, BLOCK_M, BLOCK_D)
        tl.store(at, (dq * (scale * 0.6931471805599453)).to(dq_ptr.dtype.element_ty), mask=inside)
        row0, _left = _next_tile(first_ptr, line0, row0 + 1, stop, BLOCK_M)


@inlined
def _dkdv_step(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, start_ptr, end_ptr, t0, to, key, q_stride, dout_stride, scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    base, row = tl.cast(t0, tl.int64), t0 + tl.arange(0, BLOCK_M)
    q = _load_tile(q_ptr + base * q_stride, q_stride, to - t0, True, DIM, BLOCK_M, BLOCK_D)
    lse = tl.load(lse_ptr + row, mask=row < to, other=0.0) * 1.4426950408889634
    start = tl.load(start_ptr + row, mask=row < to, other=0)
    end = tl.load(end_ptr + row, mask=row < to, other=0)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])  # [BLOCK_N, BLOCK_M]
    # A mask on every tile costs less here than the registers of a second loop.
    p = tl.where((key[:, None] >= start[None, :]) & (key[:, None] < end[None, :]), p, 0.0)
    dout = _load_tile(dout_ptr + base * dout_stride, dout_stride, to - t0, True, DIM, BLOCK_M, BLOCK_D)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    delta = tl.load(delta_ptr + row, mask=row < to, other=0.0)
    ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@jit
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, keys_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    tokens, keys, group,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    dout_batch, dout_stride, dout_head,
    scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Early keys of a causal sample are seen by most queries, and they are first already.
    window, key_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_heads = tl.num_programs(1)
    line0, lines = batch * keys, tl.num_programs(2) * keys
    head0 = key_head * group
    q_ptr += batch.to(tl.int64) * q_batch + head0.to(tl.int64) * q_head
    dout_ptr += batch.to(tl.int64) * dout_batch + head0.to(tl.int64) * dout_head
    lse_ptr += (batch * key_heads * group + head0).to(tl.int64) * tokens
    delta_ptr += (batch * key_heads * group + head0).to(tl.int64) * tokens
    start_ptr, end_ptr = start_ptr + batch * tokens, end_ptr + batch * tokens

    stop = tl.minimum(window * BLOCK_N + BLOCK_N, keys)
    k0, tiles_here = _next_tile(keys_ptr, line0, window * BLOCK_N, stop, BLOCK_N)
    for _ in tl.range(tiles_here, disable_licm=True):
        count = _tile_rows(keys_ptr, line0, keys, k0, BLOCK_N)
        # The queries that see a key of the tile: one run.
        t_from = tl.load(keys_ptr + (lines + line0 + k0))
        t_to = tl.load(keys_ptr + (2 * lines + line0 + k0 + count - 1))
        tiles = tl.cdiv(tl.maximum(t_to - t_from, 0), BLOCK_M)
        key = k0 + tl.arange(0, BLOCK_N)
        k_at = k_ptr + (batch.to(tl.int64) * k_batch + key_head.to(tl.int64) * k_head)
        at, inside = _rows_at(k_at, k0, k_stride, 0, count, DIM, BLOCK_N, BLOCK_D)
        k = tl.load(at, mask=inside, other=0.0)
        v_at = v_ptr + (batch.to(tl.int64) * v_batch + key_head.to(tl.int64) * v_head)
        at, inside = _rows_at(v_at, k0, v_stride, 0, count, DIM, BLOCK_N, BLOCK_D)
        v = tl.load(at, mask=inside, other=0.0)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        # One loop over the tiles of queries of all heads of the group.
        for i in range(group * tiles):
            head = tl.cast(i // tiles, tl.int64)
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_ptr + head * q_head, dout_ptr + head * dout_head, lse_ptr + head * tokens,
                delta_ptr + head * tokens, start_ptr, end_ptr, t_from + (i % tiles) * BLOCK_M, t_to, key,
                q_stride, dout_stride, scale, DIM, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        at, inside = _rows_at(dk_ptr, line0 + k0, key_heads * DIM, key_head * DIM, count, DIM, BLOCK_N, BLOCK_D)
        tl.store(at, (dk * (scale * 0.6931471805599453)).to(dk_ptr.dtype.element_ty), mask=inside)
        at, inside = _rows_at(dv_ptr, line0 + k0, key_heads * DIM, key_head * DIM, count, DIM, BLOCK_N, BLOCK_D)
        tl.store(at, dv.to(dv_ptr.dtype.element_ty), mask=inside)
        k0, _left = _next_tile(keys_ptr, line0, k0 + 1, stop, BLOCK_N)
