"""RMSNorm and LayerNorm over the last dimension, each with an optional residual add in front.

    s = x + residual                       (only with a residual; s is returned too: it is the new residual)
    rms_norm(s)   = weight * s / sqrt(mean(s²) + eps)                        Zhang & Sennrich 2019
    layer_norm(s) = weight * (s - mean(s)) / sqrt(var(s) + eps) + bias       Ba et al. 2016

Statistics are at least float32 whatever the dtype. The RMS-normalised value is rounded to the input dtype before it is
multiplied by the weight, as transformers' LlamaRMSNorm does.

Fused: one pass over memory for add and norm. Bytes per element (bf16): forward 4 without a residual (read x, write
y), 8 with one (read x and residual, write s and y), against 8 and 14 for PyTorch's add, norm; backward 6 (read dy, s;
write dx), 8 with a residual (also read ds). Saved for backward: s, which is the residual stream itself and no copy, and
one or two float32 per row. For a frozen weight dW is not computed.

Shapes: R rows, D width; kernels work on [BLOCK_R, BLOCK_D] tiles with BLOCK_D = the power of two ≥ D.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, differentiated, extension, observed, register
from llava_fast.ops._launch import Example, as_rows, launch, multiprocessors, rows_of, tile, tile_table, unwritten
from llava_fast.ops._triton import jit, takes, tl

MAX_WIDTH = 8192


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of `x` (+ `residual`): weight · s / sqrt(mean(s²) + eps) (Zhang & Sennrich 2019; rounded as Llama does).

    Args:
        x: [..., D], any floating dtype; statistics are at least float32.
        weight: [D].
        eps: added to the mean square.
        residual: [..., D], added to `x` first.

    Returns:
        The normalised [..., D] in the dtype of `x`, and the sum s that was normalised (`x` itself without a residual).

    Raises:
        BackendUnavailable: if the requested backend does not support the tensors: Triton needs one dtype of 32 or 16
            bits, and D ≤ 8192. Shapes that do not fit raise PyTorch's own errors.
    """
    return choose("rms_norm", x, weight, residual)(x, weight, eps, residual)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of `x` (+ `residual`): weight · (s − mean(s)) / sqrt(var(s) + eps) + bias (Ba et al. 2016).

    Args:
        x: [..., D], any floating dtype; statistics are at least float32.
        weight, bias: [D].
        eps: added to the variance.
        residual: [..., D], added to `x` first.

    Returns:
        The normalised [..., D] in the dtype of `x`, and the sum s that was normalised (`x` itself without a residual).

    Raises:
        BackendUnavailable: as for `rms_norm`.
    """
    return choose("layer_norm", x, weight, residual)(x, weight, bias, eps, residual)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is not None:
        x = residual + x
    normalise = _RMSNormReference.apply if differentiated(x, weight) else _normalised
    return normalise(x, weight, eps), x


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.dtype == weight.dtype and x.dtype.itemsize >= 4:
        return torch.rms_norm(x, weight.shape, weight, eps)
    # In 16 bits torch.rms_norm rounds once, transformers' norm twice.
    return (x * _rstd(x, eps)).to(x.dtype).mul_(weight)


def _rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x²) + eps), [..., 1], at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNormReference(torch.autograd.Function):
    """With plain autograd it would save three tensors of the size of x, and take twice the time on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normalised(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("rms_norm has no second derivative")
        x, weight = ctx.saved_tensors
        rstd = _rstd(x, ctx.eps)
        normed = x * rstd
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            g = (dy * weight).to(normed.dtype)
            mean = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(x.shape[-1])
            dx = g.addcmul_(normed, mean, value=-1).mul_(rstd).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = normed.mul_(dy).flatten(0, -2).sum(0).to(weight.dtype)
        return dx, dweight, None


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is not None:
        x = residual + x
    return F.layer_norm(x, weight.shape, weight, bias, eps), x


@jit
def _norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    width,
    x_stride,
    residual_stride,
    eps,
    CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    # The tile's base is 64-bit: rows · width may pass 2³¹.
    base = row.to(tl.int64)
    s = tl.load(x_ptr + (base * x_stride)[:, None] + column[None, :], mask=inside, other=0.0)
    if HAS_RESIDUAL:
        r = tl.load(residual_ptr + (base * residual_stride)[:, None] + column[None, :], mask=inside, other=0.0)
        s = (s.to(tl.float32) + r.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + (base * width)[:, None] + column[None, :], s, mask=inside)
    s = s.to(tl.float32)
    if CENTRED:
        mean = tl.sum(s, axis=1) / width
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, mask=row < rows)
        s = tl.where(inside, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(s * s, axis=1) / width + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    y = s * rstd[:, None]
    if CENTRED:
        bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        y = y * weight[None, :] + bias[None, :]
    else:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32) * weight[None, :]
    tl.store(y_ptr + (base * width)[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _norm_bwd_kernel(
    dy_ptr,
    dsum_ptr,
    s_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    width,
    dy_stride,
    dsum_stride,
    s_stride,
    tiles_per_program,
    CENTRED: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    WANT_DWEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Each program loops over consecutive row tiles, so dW is summed in registers and written once per program.
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if WANT_DWEIGHT:
        dweight = tl.zeros([BLOCK_D], tl.float32)
        if CENTRED:
            dbias = tl.zeros([BLOCK_D], tl.float32)
    for step in range(tiles_per_program):
        row = (program * tiles_per_program + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        base = row.to(tl.int64)
        s = tl.load(s_ptr + (base * s_stride)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + (base * dy_stride)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        if CENTRED:
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
            s = tl.where(inside, s - mean[:, None], 0.0)
        normed = s * rstd[:, None]
        g = dy * weight[None, :]
        dx = g - normed * (tl.sum(g * normed, axis=1) / width)[:, None]
        if CENTRED:
            dx -= (tl.sum(g, axis=1) / width)[:, None]
        dx = dx * rstd[:, None]
        if HAS_DSUM:
            dsum = tl.load(dsum_ptr + (base * dsum_stride)[:, None] + column[None, :], mask=inside, other=0.0)
            dx += dsum.to(tl.float32)
        tl.store(dx_ptr + (base * width)[:, None] + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WANT_DWEIGHT:
            dweight += tl.sum(dy * normed, axis=0)
            if CENTRED:
                dbias += tl.sum(dy, axis=0)
    if WANT_DWEIGHT:
        partial_row = program.to(tl.int64) * width
        tl.store(dweight_ptr + partial_row + column, dweight, mask=column < width)
        if CENTRED:
            tl.store(dbias_ptr + partial_row + column, dbias, mask=column < width)


@cache
def _width_key(width: int) -> int:
    """BLOCK_D, and the key of the tile tables."""
    return max(128, 1 << (width - 1).bit_length())


def norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None = None,
    statistics: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The kernel without autograd, also for other operations. Returns y (written to `out` if given, which may be x), s
    (None without a residual), mean (None for RMSNorm) and rstd, both None unless these `statistics` are wanted."""
    x_RD, rows, x_stride = rows_of(x)
    residual_RD, _, residual_stride = (None, 0, 0) if residual is None else rows_of(residual)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    y = unwritten(x) if out is None else out
    s = None if residual is None else torch.empty_like(y)
    mean = rstd = None
    if statistics:
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        mean = None if bias is None else torch.empty_like(rstd)
    key = _width_key(x.shape[-1])
    choice = tile("norm_fwd", key, x.device)
    if rows:
        launch(
            _norm_fwd_kernel,
            (-(-rows // choice["BLOCK_R"]),),
            *(x_RD, residual_RD, weight, bias, y, s, mean, rstd, rows, x.shape[-1], x_stride, residual_stride, eps),
            tile=choice,
            CENTRED=bias is not None,
            HAS_RESIDUAL=residual is not None,
            BLOCK_D=key,
        )
    return y, s, mean, rstd


def norm_backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    want_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dx (also the residual's gradient), dweight, dbias (None for RMSNorm, or a frozen weight)."""
    dy_RD, s_RD = as_rows(dy), as_rows(s)
    dsum_RD = None if dsum is None else as_rows(dsum)
    rows, width = s_RD.shape
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    key = _width_key(width)
    choice = tile("norm_bwd", key, s.device)
    tiles = -(-rows // choice["BLOCK_R"])
    # Without dW nothing is summed over rows, so there is one program per tile.
    programs = min(tiles, 2 * multiprocessors(s.device)) if want_dweight else tiles
    partials = [
        torch.empty(programs, width, dtype=torch.float32, device=s.device) if want_dweight and wanted else None
        for wanted in (True, mean is not None)
    ]
    if rows:
        launch(
            _norm_bwd_kernel,
            (programs,),
            *(dy_RD, dsum_RD, s_RD, weight.contiguous(), mean, rstd, dx, *partials, rows, width),
            *(dy_RD.stride(0), 0 if dsum_RD is None else dsum_RD.stride(0), s_RD.stride(0)),
            -(-tiles // programs),
            tile=choice,
            CENTRED=mean is not None,
            HAS_DSUM=dsum is not None,
            WANT_DWEIGHT=want_dweight,
            BLOCK_D=key,
        )
    dweight, dbias = (None if p is None else p.sum(0).to(weight.dtype) for p in partials)
    return dx, dweight, dbias


# A custom op cannot return None, so an output that is not needed is an empty tensor.
def _or_empty(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op("llava_fast::norm", mutates_args=())
def _norm_op(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, s, mean, rstd = norm_forward(x, weight, bias, residual, eps)
    assert rstd is not None
    return y, _or_empty(s, like=x), _or_empty(mean, like=rstd), rstd


@_norm_op.register_fake
def _norm_fake(x, residual, weight, bias, eps):
    y, rstd = x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    s = x.new_empty(0 if residual is None else x.shape)
    return y, s, rstd.new_empty(0) if bias is None else torch.empty_like(rstd), rstd


@torch.library.custom_op("llava_fast::norm_backward", mutates_args=())
def _norm_backward_op(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    centred: bool,
    want_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dweight, dbias = norm_backward(dy, dsum, s, weight, mean if centred else None, rstd, want_dweight)
    return dx, _or_empty(dweight, like=weight), _or_empty(dbias, like=weight)


@_norm_backward_op.register_fake
def _norm_backward_fake(dy, dsum, s, weight, mean, rstd, centred, want_dweight):
    dweight = weight.new_empty(weight.shape if want_dweight else 0)
    return s.new_empty(s.shape), dweight, weight.new_empty(weight.shape if want_dweight and centred else 0)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _ = inputs
    _, s, mean, rstd = output
    ctx.has_residual, ctx.centred = residual is not None, bias is not None
    ctx.save_for_backward(s if ctx.has_residual else x, weight, mean, rstd)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dsum, _dmean, _drstd):
    s, weight, mean, rstd = ctx.saved_tensors
    if dy is None:
        # Only the sum was used: the residual add passes its gradient through.
        return dsum, dsum if ctx.has_residual else None, None, None, None
    want_dweight = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    dx, dweight, dbias = torch.ops.llava_fast.norm_backward(
        dy, dsum if ctx.has_residual else None, s, weight, mean, rstd, ctx.centred, want_dweight
    )
    return (
        dx,
        dx if ctx.has_residual else None,
        dweight if ctx.needs_input_grad[2] else None,
        dbias if ctx.needs_input_grad[3] else None,
        None,
    )


_norm_op.register_autograd(_autograd, setup_context=_setup_context)


def _supports(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> bool | str:
    if weight.dtype != x.dtype:
        return f"the weight is {weight.dtype}, the input {x.dtype}"
    if residual is not None and residual.dtype != x.dtype:
        return f"the residual is {residual.dtype}, the input {x.dtype}"
    if x.shape[-1] > MAX_WIDTH:
        return f"width {x.shape[-1]} is over {MAX_WIDTH}"
    return takes(x, weight)


def _rms_norm_triton(x, weight, eps, residual):
    return _layer_norm_triton(x, weight, None, eps, residual)


def _layer_norm_triton(x, weight, bias, eps, residual):
    if observed(x, weight, bias, residual):
        y, s, _, _ = torch.ops.llava_fast.norm(x, residual, weight, bias, eps)
    else:
        y, s, _, _ = norm_forward(x, weight, bias, residual, eps, statistics=False)
    return y, x if residual is None else s


def _rms_norm_cuda(x, weight, eps, residual):
    module, x_RD, weight = extension(), as_rows(x), weight.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = x if residual is None else torch.empty_like(y)
    into_sum = {}
    if residual is not None:
        residual = as_rows(residual)
        into_sum = {
            "residual": residual.data_ptr(),
            "residual_stride": residual.stride(0),
            "residual_output": s.data_ptr(),
            "residual_output_stride": x_RD.shape[1],
        }
    with torch.cuda.device(x.device):
        module.rms_norm_forward(
            output=y.data_ptr(),
            input=x_RD.data_ptr(),
            weight=weight.data_ptr(),
            rows=x_RD.shape[0],
            columns=x_RD.shape[1],
            output_stride=x_RD.shape[1],
            input_stride=x_RD.stride(0),
            eps=eps,
            dtype=getattr(module.DType, str(x.dtype).removeprefix("torch.")),
            stream=torch.cuda.current_stream(x.device).cuda_stream,
            **into_sum,
        )
    return y, s


def _supports_cuda(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> bool | str:
    if differentiated(x, weight, residual):
        return "the CUDA kernel has no backward"
    if not x.is_cuda:
        return f"the tensors are on {x.device.type}"
    return _supports(x, weight, residual)


register("rms_norm", "reference", rms_norm_reference)
register("rms_norm", "triton", _rms_norm_triton, _supports)
register("rms_norm", "cuda", _rms_norm_cuda, _supports_cuda)
register("layer_norm", "reference", layer_norm_reference)
register("layer_norm", "triton", _layer_norm_triton, _supports)


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """Both norms at every width, with a residual; without one, or without statistics, the kernels do a part of it.

    The tuner times the vision tower's LayerNorm for small widths and the language model's RMSNorm for large ones.
    """
    for key in map(int, tile_table("norm_fwd")["sm_80"]["tiles"]):
        rows = 2**22 // key if device.type != "cpu" else 9
        x, residual, dy, dsum = torch.randn(4, rows, key, device=device).to(dtype)
        weight, rstd = torch.randn(key, device=device).to(dtype), torch.rand(rows, device=device)
        tiles = [
            {"BLOCK_R": block, "num_warps": warps, "num_stages": 1}
            for block in (1, 2, 4, 8, 16)
            for warps in (1, 2, 4, 8, 16)
            if 8 <= block * key // (32 * warps) <= 32  # elements per thread: wide loads, few registers
        ]
        for bias, mean in ((weight, rstd), (None, None)):
            timed = tiles if (bias is None) == (key > 1024) else []
            yield Example("norm_fwd", key, partial(norm_forward, x, weight, bias, residual, 1e-5), timed)
            backward = partial(norm_backward, dy, dsum, x, weight, mean, rstd, True)
            yield Example("norm_bwd", key, backward, timed)
