"""The multi-modal projector: linear layers with exact GELU between them.

    h_i = a_{i-1} · W_iᵀ + b_i;   a_0 = x, a_i = GELU(h_i);   the result is the last h   (LLaVA-1.5: two layers)

No layers at all is the identity. GELU is the exact one (Hendrycks & Gimpel 2016).

Fused, for M rows and a hidden width of D in bf16: bias and GELU in the epilogue of the GEMM, which writes a once
(2·M·D bytes; a GEMM, then GELU moves 6·M·D). For a later backward it also writes h, and only h is saved; PyTorch saves
the input and the output of GELU. Backward recomputes a from h in the pass that multiplies by GELU' and sums the bias
gradient (reads da and h, writes dh over da, and a if a weight needs its gradient: 8·M·D, or 6·M·D; PyTorch's GELU
backward and sum move 8·M·D with a saved). Sums use partial sums in a fixed order, without atomics. Gradients of frozen
parameters are not computed. The rows of x may have two strides (patches of images without their CLS token): the GEMM
reads them in place.

`LIBRARY` in an entry of `tuned/projector_fwd.json` chooses the GEMM: 1 is the library's, with GELU in a separate pass;
0 is the fused kernel, if K is a multiple of BLOCK_K. All entries ship with 1 until the tuner, which times both, has
measured the fused kernel to be faster. Gradients of weights and inputs always use the library's GEMM.

Shapes: M rows, K columns of a layer's input, N of its output; tiles are BLOCK_M × BLOCK_N, in steps of BLOCK_K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, differentiated, observed, register
from llava_fast.ops._gemm import tile_order
from llava_fast.ops._launch import Example, as_rows, forced_tile, launch, multiprocessors, tile
from llava_fast.ops._math import gelu_slope, normal_below
from llava_fast.ops._triton import jit, takes, tl
from llava_fast.ops.activation import activation_forward

FEW_ROWS = 2048  # up to three images of 576 tokens


def projector(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Project vision features into the language model's embedding space: linear layers, exact GELU between them.

    Args:
        x: [..., D_in] of a floating dtype; under autocast it, weights and biases are cast as `F.linear` casts them.
        weights: per layer [D_out, D_in].
        biases: per layer [D_out] or None.

    Returns:
        [..., D_out] of the last layer.

    Raises:
        ValueError: if the numbers of biases and weights differ.
    """
    if len(biases) != len(weights):
        raise ValueError(f"projector: {len(weights)} weights, {len(biases)} biases")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [bias if bias is None else bias.to(dtype) for bias in biases]
    present = [bias for bias in biases if bias is not None]
    return choose("projector", x, *weights, *present)(x, weights, biases)


def projector_reference(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(F.gelu(x) if i else x, weight, bias)
    return x


@jit
def _projector_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
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
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_m, first_n = tile_order(m, n, BLOCK_M, BLOCK_N)
    # Loads need no mask: row and column indices are clamped to the last, and K is a multiple of BLOCK_K.
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

    # Offsets are recomputed after the loop instead of occupying registers during it.
    row = first_m + tl.arange(0, BLOCK_M)
    column = first_n + tl.arange(0, BLOCK_N)
    inside = (row < m)[:, None] & (column < n)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * n + column[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + place, sums.to(hidden_ptr.dtype.element_ty), mask=inside)
    if GELU:
        sums = sums * normal_below(sums)
    tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask=inside)


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
    # dh = da · GELU'(h), written over da. Each program loops over consecutive row tiles, and sums the bias gradient of
    # its columns in registers.
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for step in range(tiles_per_program):
        row = (tl.program_id(0) * tiles_per_program + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        h = tl.load(h_ptr + place, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + place, mask=inside, other=0.0).to(tl.float32)
        below = normal_below(h)
        dh = da * gelu_slope(h, below)
        tl.store(da_ptr + place, dh.to(da_ptr.dtype.element_ty), mask=inside)
        if a_ptr is not None:
            tl.store(a_ptr + place, (h * below).to(a_ptr.dtype.element_ty), mask=inside)
        if dbias_ptr is not None:
            sums += tl.sum(dh, axis=0)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * width + column, sums, mask=column < width)


def _fwd_key(rows: int, dtype: torch.dtype) -> str:
    return f"{'single' if dtype == torch.float32 else 'half'}_{'few' if rows <= FEW_ROWS else 'many'}"


def _linear(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    *,
    gelu: bool,
    save: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x · Wᵀ + b [M, N], with `gelu` followed by GELU; with `save` also the input of GELU."""
    m, (n, k) = x.numel() // max(x.shape[-1], 1), weight_NK.shape
    choice = tile("projector_fwd", _fwd_key(m, x.dtype), x.device)
    if choice["LIBRARY"] or k % choice["BLOCK_K"]:
        h = F.linear(as_rows(x), weight_NK, bias_N)
        return activation_forward(h, None, "gelu") if gelu else h, h if gelu and save else None
    x_RtK = x if x.dim() == 3 and x.stride(2) == 1 else as_rows(x)[None]
    a = torch.empty(m, n, dtype=x.dtype, device=x.device)
    kept = torch.empty_like(a) if gelu and save else None
    if m and n:
        blocks = {name: value for name, value in choice.items() if name != "LIBRARY"}
        launch(
            _projector_fwd_kernel,
            (-(-m // choice["BLOCK_M"]) * -(-n // choice["BLOCK_N"]),),
            *(x_RtK, weight_NK, None if bias_N is None else bias_N.contiguous(), a, kept, m, n, k),
            *(x_RtK.shape[1], x_RtK.stride(0), x_RtK.stride(1), *weight_NK.stride()),
            tile=blocks,
            GELU=gelu,
        )
    return a, kept


def _through_gelu(
    da_MD: torch.Tensor, h_MD: torch.Tensor, want_a: bool, want_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dh, written over `da`; and, if wanted, a = GELU(h) and the sum of dh over rows."""
    rows, width = h_MD.shape
    choice = tile("projector_bwd", "any", h_MD.device)
    tiles, across = -(-rows // choice["BLOCK_R"]), -(-width // choice["BLOCK_D"])
    # Without a sum over rows there is one program per tile.
    programs = min(tiles, -(-4 * multiprocessors(h_MD.device) // across)) if want_dbias else tiles
    a_MD = torch.empty_like(h_MD) if want_a else None
    partials = torch.empty(programs, width, dtype=torch.float32, device=h_MD.device) if want_dbias else None
    if rows and width:
        launch(
            _projector_bwd_kernel,
            (programs, across),
            *(da_MD, h_MD, a_MD, partials, rows, width, -(-tiles // programs)),
            tile=choice,
        )
    return da_MD, a_MD, None if partials is None else partials.sum(0).to(h_MD.dtype)


def _forward(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], save: bool
) -> list[torch.Tensor]:
    """The result [M, N]; with `save` also h of every layer but the last."""
    hidden = []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x, h = _linear(x, weight, bias, gelu=i < len(weights) - 1, save=save)
        if h is not None:
            hidden.append(h)
    return [x, *hidden]


def _backward(
    dy_MN: torch.Tensor,
    x: torch.Tensor,
    hidden: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    want_dx: bool,
    want_dweights: Sequence[bool],
    want_dbiases: Sequence[bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """dx [M, K], and the gradients of weights and biases, each only if wanted."""
    dx, dh, layers = None, as_rows(dy_MN), len(weights)
    dweights: list[torch.Tensor | None] = [None] * layers
    dbiases: list[torch.Tensor | None] = [None] * layers
    if want_dbiases[-1]:
        dbiases[-1] = dh.sum(0, dtype=torch.promote_types(dh.dtype, torch.float32)).to(dh.dtype)
    for i in reversed(range(layers)):
        further = want_dx or any(want_dweights[:i]) or any(want_dbiases[:i])
        if i == 0:
            if want_dweights[0]:
                dweights[0] = dh.t() @ as_rows(x)
            dx = dh @ weights[0] if want_dx else None
            break
        if further:
            da, a, dbiases[i - 1] = _through_gelu(dh @ weights[i], hidden[i - 1], want_dweights[i], want_dbiases[i - 1])
        else:
            da, a = None, activation_forward(hidden[i - 1], None, "gelu") if want_dweights[i] else None
        if a is not None:
            dweights[i] = dh.t() @ a
        if da is None:
            break
        dh = da
    return dx, dweights, dbiases


# A custom op gives no gradients to a list with None entries, so it takes the existing biases and a flag per layer.
def _with_gaps(biases: Sequence[torch.Tensor], has_bias: Sequence[bool]) -> list[torch.Tensor | None]:
    present = iter(biases)
    return [next(present) if has else None for has in has_bias]


@torch.library.custom_op("llava_fast::projector", mutates_args=())
def _projector_op(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    has_bias: Sequence[bool],
    save: bool,
) -> list[torch.Tensor]:
    y, *hidden = _forward(x, weights, _with_gaps(biases, has_bias), save)
    return [y.view(*x.shape[:-1], y.shape[-1]), *hidden]


@_projector_op.register_fake
def _projector_fake(x, weights, biases, has_bias, save):
    rows = x.numel() // x.shape[-1]
    hidden = [x.new_empty(rows, weight.shape[0]) for weight in weights[:-1]] if save else []
    return [x.new_empty(*x.shape[:-1], weights[-1].shape[0]), *hidden]


@torch.library.custom_op("llava_fast::projector_backward", mutates_args=())
def _projector_backward_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    hidden: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    wanted: Sequence[bool],
) -> list[torch.Tensor]:
    layers = len(weights)
    dx, dweights, dbiases = _backward(dy, x, hidden, weights, wanted[0], wanted[1 : 1 + layers], wanted[1 + layers :])
    return [
        gradient for gradient in (None if dx is None else dx.view(x.shape), *dweights, *dbiases) if gradient is not None
    ]


@_projector_backward_op.register_fake
def _projector_backward_fake(dy, x, hidden, weights, wanted):
    like = [x.shape, *(w.shape for w in weights), *(w.shape[:1] for w in weights)]
    return [x.new_empty(shape) for shape, want in zip(like, wanted, strict=True) if want]


def _setup_context(ctx, inputs, output):
    x, weights, _biases, ctx.has_bias, _ = inputs
    _y, *hidden = output
    ctx.layers = len(weights)
    ctx.save_for_backward(x, *weights, *hidden)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*hidden)


def _autograd(ctx, gradients):
    layers = ctx.layers
    need_x, need_weights, need_biases, *_ = ctx.needs_input_grad
    nothing = [None] * layers, [None] * len(need_biases), None, None
    if gradients[0] is None:
        return None, *nothing
    x, *saved = ctx.saved_tensors
    needed = iter(need_biases)
    wanted = [need_x, *need_weights, *(next(needed) if has else False for has in ctx.has_bias)]
    found = iter(torch.ops.llava_fast.projector_backward(gradients[0], x, saved[layers:], saved[:layers], wanted))
    dx, *rest = [next(found) if want else None for want in wanted]
    dbiases = [bias for bias, has in zip(rest[layers:], ctx.has_bias, strict=True) if has]
    return dx, rest[:layers], dbiases, None, None


_projector_op.register_autograd(_autograd, setup_context=_setup_context)


def _projector_triton(x, weights, biases):
    if not weights:
        return x
    present = [bias for bias in biases if bias is not None]
    if not observed(x, *weights, *present):
        return _forward(x, weights, biases, False)[0].view(*x.shape[:-1], weights[-1].shape[0])
    has_bias = [bias is not None for bias in biases]
    save = differentiated(x, *weights, *present)
    return torch.ops.llava_fast.projector(x, list(weights), present, has_bias, save)[0]


def _supports(x: torch.Tensor, *parameters: torch.Tensor) -> bool | str:
    for parameter in parameters:
        if parameter.dtype != x.dtype:
            return f"a weight is {parameter.dtype}, the input {x.dtype}"
    return takes(x, *parameters)


register("projector", "reference", projector_reference)
register("projector", "triton", _projector_triton, _supports)


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """LLaVA-1.5's first layer for one image and for 32, timed by the tuner, with the library's GEMM as a candidate.

    The fused kernel is launched even if the shipped tile chooses the library's GEMM.
    """
    large, half = device.type != "cpu", dtype.itemsize == 2
    into, width = (1024, 4096) if large else (64, 40)
    of_dtype = "half" if half else "single"
    sizes = ((64, 64), (64, 128), (128, 128), (128, 256), (256, 128)) if half else ((32, 64), (64, 64))
    tiles = [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "LIBRARY": 0, "num_warps": warps, "num_stages": stages}
        for m, n in sizes
        for k in ((32, 64) if half else (16, 32))
        for warps in (4, 8)
        for stages in (2, 3, 4)
        if 32 <= m * n // (32 * warps) <= 128 or not half
    ]
    for key, rows in (("few", 576 if large else 70), ("many", 32 * 576 if large else FEW_ROWS + 1)):
        # Random values, since the tuner compares results.
        x, weight, bias = (
            torch.randn(size, device=device).to(dtype) * scale
            for size, scale in (((rows, into), 1.0), ((width, into), into**-0.5), ((width,), 1.0))
        )
        of_key = f"{of_dtype}_{key}"
        call = partial(_linear, x, weight, bias, gelu=True)
        yield Example("projector_fwd", of_key, call, [{**tiles[0], "LIBRARY": 1}, *tiles])
        for gelu in (True, False):
            yield Example("projector_fwd", of_key, partial(_fused, x, weight, bias, gelu))
    h, da = (torch.randn(8 * 576 if large else 70, width, device=device).to(dtype) for _ in range(2))
    tiles = [
        {"BLOCK_R": rows, "BLOCK_D": columns, "num_warps": warps, "num_stages": 1}
        for rows in (4, 8, 16, 32)
        for columns in (128, 256, 512)
        for warps in (4, 8)
        if 4 <= rows * columns // (32 * warps) <= 32
    ]
    yield Example("projector_bwd", "any", lambda: _through_gelu(da.clone(), h, True, True), tiles)
    yield Example("projector_bwd", "any", lambda: _through_gelu(da.clone(), h, False, False))


def _fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool) -> Any:
    choice = {**tile("projector_fwd", _fwd_key(len(x), x.dtype), x.device), "LIBRARY": 0}
    with forced_tile("projector_fwd", choice):
        return _linear(x, weight, bias, gelu=gelu, save=gelu)
