"""Point-wise activations of the two MLPs.

    swiglu(gate, up) = gate * sigmoid(gate) * up          (Shazeer 2020; Llama)
    quick_gelu(x)    = x * sigmoid(1.702 x)               (CLIP)
    gelu(x)          = x * (1 + erf(x / sqrt(2))) / 2     (Hendrycks & Gimpel 2016, exact; LLaVA's projector)

quick_gelu and gelu take the bias of the linear layer before them, if it has not added it: gelu(x + bias).

Each is one pass: SwiGLU reads two tensors and writes one (6 bytes an element in bf16; PyTorch's silu and product move
10), its backward reads three and writes two (10; PyTorch 26). Only the inputs are saved: the sigmoid and the product
are recomputed. With a bias the sum x + bias is never written (4 bytes an element, and 2 in backward for the bias's
gradient, which is summed on the way: per program in registers, then over programs). Arithmetic is float32, rounded
once.

Shapes: R rows, C columns; a program works on BLOCK columns of one row, so gate and up may be slices of one tensor;
where a bias wants a gradient, of a run of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, register
from llava_fast.ops._launch import as_rows, launch, multiprocessors, tile
from llava_fast.ops._triton import jit, takes, tl


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def quick_gelu_reference(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    x = x if bias is None else x + bias
    return x * torch.sigmoid(1.702 * x)


def gelu_reference(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.gelu(x if bias is None else x + bias)


@jit
def _activation_fwd_kernel(
    x_ptr,
    up_ptr,
    bias_ptr,
    y_ptr,
    columns,
    x_stride,
    up_stride,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if KIND == "swiglu":
        up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        y = x * tl.sigmoid(x) * up
    elif KIND == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _activation_bwd_kernel(
    dy_ptr,
    x_ptr,
    up_ptr,
    bias_ptr,
    dx_ptr,
    dup_ptr,
    dbias_ptr,
    rows,
    columns,
    dy_stride,
    x_stride,
    up_stride,
    rows_per_program,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANT_DBIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * rows_per_program
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if WANT_DBIAS:
        dbias = tl.zeros([BLOCK], tl.float32)
    for index in range(first, tl.minimum(first + rows_per_program, rows)):
        row = tl.cast(index, tl.int64)
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias
        if KIND == "swiglu":
            up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
            gate = tl.sigmoid(x)
            tl.store(dup_ptr + row * columns + column, (dy * x * gate).to(dup_ptr.dtype.element_ty), mask=inside)
            dx = dy * up * gate * (1.0 + x * (1.0 - gate))
        elif KIND == "quick_gelu":
            gate = tl.sigmoid(1.702 * x)
            dx = dy * gate * (1.0 + 1.702 * x * (1.0 - gate))
        else:
            density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
            dx = dy * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)
        tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WANT_DBIAS:
            dbias += dx
    if WANT_DBIAS:
        tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * columns + column, dbias, mask=inside)


def _forward(x: torch.Tensor, up: torch.Tensor | None, kind: str, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        x_RC, up_RC = as_rows(x), None if up is None else as_rows(up)
        rows, columns = x_RC.shape
        choice = tile("activation_fwd", "any", x.device)
        launch(
            _activation_fwd_kernel,
            (rows, -(-columns // choice["BLOCK"])),
            *(x_RC, up_RC, None if bias is None else bias.contiguous(), y),
            *(columns, x_RC.stride(0), 0 if up is None else up_RC.stride(0)),
            tile=choice,
            KIND=kind,
            HAS_BIAS=bias is not None,
        )
    return y


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor | None,
    kind: str,
    bias: torch.Tensor | None = None,
    want_dbias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dx, dup (None without `up`), dbias (None unless wanted)."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dup = None if up is None else torch.empty_like(dx)
    if not dx.numel():
        return dx, dup, torch.zeros_like(bias) if want_dbias else None
    dy_RC, x_RC, up_RC = as_rows(dy), as_rows(x), None if up is None else as_rows(up)
    rows, columns = x_RC.shape
    choice = tile("activation_bwd", "any", x.device)
    blocks, per_program, partials = -(-columns // choice["BLOCK"]), 1, None
    if want_dbias:
        per_program = -(-rows // min(rows, -(-4 * multiprocessors(x.device) // blocks)))
        partials = torch.empty(-(-rows // per_program), columns, dtype=torch.float32, device=x.device)
    launch(
        _activation_bwd_kernel,
        (-(-rows // per_program), blocks),
        *(dy_RC, x_RC, up_RC, None if bias is None else bias.contiguous(), dx, dup, partials, rows, columns),
        *(dy_RC.stride(0), x_RC.stride(0), 0 if up is None else up_RC.stride(0), per_program),
        tile=choice,
        KIND=kind,
        HAS_BIAS=bias is not None,
        WANT_DBIAS=want_dbias,
    )
    return dx, dup, partials.sum(0).to(bias.dtype) if want_dbias else None


@torch.library.custom_op("llava_fast::swiglu", mutates_args=())
def _swiglu_op(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _forward(gate, up, "swiglu")


@torch.library.custom_op("llava_fast::swiglu_backward", mutates_args=())
def _swiglu_backward_op(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward(dy, gate, up, "swiglu")[:2]


@torch.library.custom_op("llava_fast::activation", mutates_args=())
def _activation_op(x: torch.Tensor, kind: str, bias: torch.Tensor | None) -> torch.Tensor:
    return _forward(x, None, kind, bias)


# An operator always returns tensors, so a bias gradient that is not wanted is an empty one.
@torch.library.custom_op("llava_fast::activation_backward", mutates_args=())
def _activation_backward_op(
    dy: torch.Tensor, x: torch.Tensor, kind: str, bias: torch.Tensor | None, want_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, _, dbias = _backward(dy, x, None, kind, bias, want_dbias)
    return dx, x.new_empty(0) if dbias is None else dbias


_swiglu_op.register_fake(lambda gate, up: gate.new_empty(gate.shape))
_swiglu_backward_op.register_fake(lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)))
_activation_op.register_fake(lambda x, kind, bias: x.new_empty(x.shape))
_activation_backward_op.register_fake(
    lambda dy, x, kind, bias, want_dbias: (x.new_empty(x.shape), x.new_empty(x.shape[-1] if want_dbias else 0))
)


def _save_swiglu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _save_activation(ctx, inputs, output):
    x, ctx.kind, bias = inputs
    ctx.save_for_backward(x, bias)


def _activation_autograd(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.llava_fast.activation_backward(dy, x, ctx.kind, bias, ctx.needs_input_grad[2])
    return dx, None, dbias if ctx.needs_input_grad[2] else None


_swiglu_op.register_autograd(
    lambda ctx, dy: torch.ops.llava_fast.swiglu_backward(dy, *ctx.saved_tensors), setup_context=_save_swiglu
)
_activation_op.register_autograd(_activation_autograd, setup_context=_save_activation)


def _swiglu_triton(gate, up):
    return torch.ops.llava_fast.swiglu(gate, up)


def _quick_gelu_triton(x, bias):
    return torch.ops.llava_fast.activation(x, "quick_gelu", bias)


def _gelu_triton(x, bias):
    return torch.ops.llava_fast.activation(x, "gelu", bias)


def _supports(x: torch.Tensor, bias: torch.Tensor | None) -> bool | str:
    if bias is None:
        return takes(x)
    return takes(x, bias) if bias.dtype == x.dtype else f"the bias is {bias.dtype}, the input {x.dtype}"


register("swiglu", "reference", swiglu_reference)
register("swiglu", "triton", _swiglu_triton, takes)
register("quick_gelu", "reference", quick_gelu_reference)
register("quick_gelu", "triton", _quick_gelu_triton, _supports)
register("gelu", "reference", gelu_reference)
register("gelu", "triton", _gelu_triton, _supports)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU product.

    Args:
        gate, up: one shape [..., C] and dtype; they may be two halves of one tensor.

    Raises:
        ValueError: when the shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate is {gate.dtype} {tuple(gate.shape)}, up is {up.dtype} {tuple(up.shape)}")
    return choose("swiglu", gate, up)(gate, up)


def quick_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """CLIP's sigmoid approximation of GELU, of x + bias: x [..., C] of any shape, bias [C].

    Raises:
        ValueError: when the bias has another shape.
    """
    return choose("quick_gelu", x, _checked(bias, x))(x, bias)


def gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Exact (erf) GELU of x + bias; arguments as for `quick_gelu`."""
    return choose("gelu", x, _checked(bias, x))(x, bias)


def _checked(bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"the bias is {tuple(bias.shape)}, the input {tuple(x.shape)}")
    return bias


def compile_examples(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Calls that between them launch every kernel variant, for the compile report."""
    x = torch.empty(64, 11008, dtype=dtype)
    for kind, up in (("swiglu", x), ("quick_gelu", None), ("gelu", None)):
        yield partial(_forward, x, up, kind)
        yield partial(_backward, x, x, up, kind)
        if up is None:
            yield partial(_forward, x, None, kind, x[0])
            for want_dbias in (False, True):
                yield partial(_backward, x, x, None, kind, x[0], want_dbias)


def tune_examples(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, str, Callable[[], Any], list[dict[str, int]]]]:
    """(kernel, key, call, tiles worth trying): SwiGLU, which moves the most bytes, decides."""
    rows, columns = (832, 11008) if device.type == "cuda" else (3, 300)
    gate, up, dy = torch.randn(3, rows, columns, device=device).to(dtype)
    tiles = [
        {"BLOCK": block, "num_warps": warps, "num_stages": 1}
        for block in (512, 1024, 2048, 4096)
        for warps in (2, 4, 8)
    ]
    yield "activation_fwd", "any", partial(_forward, gate, up, "swiglu"), tiles
    yield "activation_bwd", "any", partial(_backward, dy, gate, up, "swiglu"), tiles
