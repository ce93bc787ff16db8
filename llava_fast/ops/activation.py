"""Point-wise activations of the two MLPs.

    swiglu(gate, up) = gate * sigmoid(gate) * up          (Shazeer 2020; Llama)
    quick_gelu(x)    = x * sigmoid(1.702 x)               (CLIP)
    gelu(x)          = x * (1 + erf(x / sqrt(2))) / 2     (Hendrycks & Gimpel 2016, exact; LLaVA's projector)

Each is one pass: SwiGLU reads two tensors and writes one (6 bytes an element in bf16; PyTorch's silu and product move
10), its backward reads three and writes two (10; PyTorch 26). Only the inputs are saved: the sigmoid and the product
are recomputed. Arithmetic is float32, rounded once.

Shapes: R rows, C columns; a program works on BLOCK columns of one row, so gate and up may be slices of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, differentiated, observed, register
from llava_fast.ops._launch import Example, as_rows, launch, rows_of, tile, unwritten
from llava_fast.ops._math import gelu_slope, normal_below
from llava_fast.ops._triton import jit, takes, tl


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU product, silu(gate) · up (Shazeer 2020).

    Args:
        gate, up: one shape [..., C] and floating dtype; they may be two halves of one tensor.

    Returns:
        [..., C], a new tensor in their dtype. Differentiable.

    Raises:
        ValueError: when the shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate is {gate.dtype} {tuple(gate.shape)}, up is {up.dtype} {tuple(up.shape)}")
    return choose("swiglu", gate, up)(gate, up)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x · sigmoid(1.702 x), CLIP's approximation of GELU (Hendrycks & Gimpel 2016).

    Args:
        x: any shape, a floating dtype.

    Returns:
        A new tensor of its shape and dtype. Differentiable.

    Raises:
        BackendUnavailable: when a backend was asked for by name that cannot take the tensor (Triton: float64).
    """
    return choose("quick_gelu", x)(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Exact GELU, x · (1 + erf(x / sqrt(2))) / 2 (Hendrycks & Gimpel 2016), as in LLaVA's projector.

    Args:
        x: any shape, a floating dtype.

    Returns:
        A new tensor of its shape and dtype. Differentiable.

    Raises:
        BackendUnavailable: as for `quick_gelu`.
    """
    return choose("gelu", x)(x)


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if differentiated(gate, up):
        return F.silu(gate) * up
    return F.silu(gate).mul_(up)


def quick_gelu_reference(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


@jit
def _activation_fwd_kernel(
    x_ptr, up_ptr, y_ptr, columns, x_stride, up_stride, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if KIND == "swiglu":
        up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        y = x * tl.sigmoid(x) * up
    elif KIND == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    else:
        y = x * normal_below(x)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _activation_bwd_kernel(
    dy_ptr, x_ptr, up_ptr, dx_ptr, dup_ptr, columns, dy_stride, x_stride, up_stride,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if KIND == "swiglu":
        up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.sigmoid(x)
        tl.store(dup_ptr + row * columns + column, (dy * x * gate).to(dup_ptr.dtype.element_ty), mask=inside)
        dx = dy * up * gate * (1.0 + x * (1.0 - gate))
    elif KIND == "quick_gelu":
        gate = tl.sigmoid(1.702 * x)
        dx = dy * gate * (1.0 + 1.702 * x * (1.0 - gate))
    else:
        dx = dy * gelu_slope(x, normal_below(x))
    tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def activation_forward(x: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
    """The kernel, without autograd, also for other operations; `kind`: "swiglu" (with `up`), "quick_gelu" or "gelu"."""
    y = unwritten(x)
    if y.numel():
        x_RC, rows, x_stride = rows_of(x)
        up_RC, _, up_stride = (None, 0, 0) if up is None else rows_of(up)
        columns = x.shape[-1]
        choice = tile("activation_fwd", "any", x.device)
        launch(
            _activation_fwd_kernel,
            (rows, -(-columns // choice["BLOCK"])),
            *(x_RC, up_RC, y, columns, x_stride, up_stride),
            tile=choice,
            KIND=kind,
        )
    return y


def _backward(
    dy: torch.Tensor, x: torch.Tensor, up: torch.Tensor | None, kind: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx, and dup (None without `up`)."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dup = None if up is None else torch.empty_like(dx)
    if dx.numel():
        dy_RC, x_RC, up_RC = as_rows(dy), as_rows(x), None if up is None else as_rows(up)
        rows, columns = x_RC.shape
        choice = tile("activation_bwd", "any", x.device)
        launch(
            _activation_bwd_kernel,
            (rows, -(-columns // choice["BLOCK"])),
            *(dy_RC, x_RC, up_RC, dx, dup, columns),
            *(dy_RC.stride(0), x_RC.stride(0), 0 if up_RC is None else up_RC.stride(0)),
            tile=choice,
            KIND=kind,
        )
    return dx, dup


@torch.library.custom_op("llava_fast::swiglu", mutates_args=())
def _swiglu_op(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return activation_forward(gate, up, "swiglu")


@torch.library.custom_op("llava_fast::swiglu_backward", mutates_args=())
def _swiglu_backward_op(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = _backward(dy, gate, up, "swiglu")
    assert dup is not None
    return dgate, dup


@torch.library.custom_op("llava_fast::activation", mutates_args=())
def _activation_op(x: torch.Tensor, kind: str) -> torch.Tensor:
    return activation_forward(x, None, kind)


@torch.library.custom_op("llava_fast::activation_backward", mutates_args=())
def _activation_backward_op(dy: torch.Tensor, x: torch.Tensor, kind: str) -> torch.Tensor:
    return _backward(dy, x, None, kind)[0]


_swiglu_op.register_fake(lambda gate, up: gate.new_empty(gate.shape))
_swiglu_backward_op.register_fake(lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)))
_activation_op.register_fake(lambda x, kind: x.new_empty(x.shape))
_activation_backward_op.register_fake(lambda dy, x, kind: x.new_empty(x.shape))


def _save_swiglu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _save_activation(ctx, inputs, output):
    x, ctx.kind = inputs
    ctx.save_for_backward(x)


_swiglu_op.register_autograd(
    lambda ctx, dy: torch.ops.llava_fast.swiglu_backward(dy, *ctx.saved_tensors), setup_context=_save_swiglu
)
_activation_op.register_autograd(
    lambda ctx, dy: (torch.ops.llava_fast.activation_backward(dy, *ctx.saved_tensors, ctx.kind), None),
    setup_context=_save_activation,
)


def _swiglu_triton(gate, up):
    if observed(gate, up):
        return torch.ops.llava_fast.swiglu(gate, up)
    return activation_forward(gate, up, "swiglu")


def _activation_triton(x, kind):
    return torch.ops.llava_fast.activation(x, kind) if observed(x) else activation_forward(x, None, kind)


def _quick_gelu_triton(x):
    return _activation_triton(x, "quick_gelu")


def _gelu_triton(x):
    return _activation_triton(x, "gelu")


register("swiglu", "reference", swiglu_reference)
register("swiglu", "triton", _swiglu_triton, takes)
register("quick_gelu", "reference", quick_gelu_reference)
register("quick_gelu", "triton", _quick_gelu_triton, takes)
register("gelu", "reference", gelu_reference)
register("gelu", "triton", _gelu_triton, takes)


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """All kinds; the tuner times SwiGLU, which moves the most bytes."""
    rows, columns = (832, 11008) if device.type != "cpu" else (3, 300)
    x, up, dy = torch.randn(3, rows, columns, device=device).to(dtype)
    tiles = [
        {"BLOCK": block, "num_warps": warps, "num_stages": 1}
        for block in (512, 1024, 2048, 4096)
        for warps in (2, 4, 8)
    ]
    yield Example("activation_fwd", "any", partial(activation_forward, x, up, "swiglu"), tiles)
    yield Example("activation_bwd", "any", partial(_backward, dy, x, up, "swiglu"), tiles)
    for kind in ("quick_gelu", "gelu"):
        yield Example("activation_fwd", "any", partial(activation_forward, x, None, kind))
        yield Example("activation_bwd", "any", partial(_backward, dy, x, None, kind))
