"""The multi-modal projector: linear layers with exact GELU between them.

    h_i = a_{i-1} · W_iᵀ + b_i;   a_0 = x, a_i = GELU(h_i);   the result is the last h   (LLaVA-1.5: two layers)

No layers at all is the identity. GELU is the exact one (Hendrycks & Gimpel 2016). `projector_into` writes the rows
straight into their slots of a buffer; the model does not use it, as it also returns the features.

Fused, for M rows and a hidden width of D in bf16: bias and GELU in the epilogue of the GEMM, which writes a once
(2·M·D bytes; a GEMM, then GELU moves 6·M·D). When a backward will come it writes h beside it, and only h is saved:
PyTorch keeps both, GELU's input and its output. Backward recomputes a from h in the pass that multiplies by GELU' and
sums the bias gradient (reads da and h, writes dh over da, and a if a weight wants its gradient: 8·M·D, or 6·M·D;
PyTorch's GELU backward and sum move 8·M·D with a kept). Sums go by partial sums in a fixed order, without atomics. What
is frozen costs nothing. The rows of x may be two-level, as the patches of images without their CLS token are: the GEMM
reads them where they are.

One rule says whose GEMM it is: each entry of `tuned/projector_fwd.json` has `LIBRARY`. 1 leaves the product to the
library, with GELU as a pass of its own; 0 takes the fused kernel, where K is a multiple of BLOCK_K. Everything ships
with 1 until the tuner, which times both, has seen the fused kernel ahead. Gradients of weights and inputs are the
library's products either way.

Shapes: M rows, K columns of a layer's input, N of its output; tiles are BLOCK_M × BLOCK_N, in steps of BLOCK_K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, register
from llava_fast.ops import activation  # noqa: F401  (its operator does the GELU beside a library's GEMM)
from llava_fast.ops._launch import as_rows, forced_tile, launch, multiprocessors, tile
from llava_fast.ops._projector_kernels import _projector_bwd_kernel, _projector_fwd_kernel
from llava_fast.ops._triton import takes

FEW_ROWS = 2048  # up to three images of 576 tokens


def projector_reference(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(F.gelu(x) if i else x, weight, bias)
    return x


def _fwd_key(rows: int, dtype: torch.dtype) -> str:
    return f"{'single' if dtype == torch.float32 else 'half'}_{'few' if rows <= FEW_ROWS else 'many'}"


def _linear(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    *,
    gelu: bool,
    save: bool = False,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """a = x · Wᵀ + b [M, N], through GELU with `gelu`; and what was before it with `save`.

    `into` = (rows [R, N], slots [M]) takes the result in its rows `slots`.
    """
    m, (n, k) = x.numel() // max(x.shape[-1], 1), weight_NK.shape
    choice = tile("projector_fwd", _fwd_key(m, x.dtype), x.device)
    if choice["LIBRARY"] or k % choice["BLOCK_K"]:
        h = F.linear(as_rows(x), weight_NK, bias_N)
        a = torch.ops.llava_fast.activation(h, "gelu", None) if gelu else h
        if into is not None:
            into[0].index_copy_(0, into[1], a)
        return a, h if gelu and save else None
    x_RtK = x if x.dim() == 3 and x.stride(2) == 1 else as_rows(x)[None]
    h = torch.empty(m, n, dtype=x.dtype, device=x.device) if gelu and save else None
    a, slots = (torch.empty(m, n, dtype=x.dtype, device=x.device), None) if into is None else into
    if m and n:
        blocks = {name: value for name, value in choice.items() if name != "LIBRARY"}
        launch(
            _projector_fwd_kernel,
            (-(-m // choice["BLOCK_M"]) * -(-n // choice["BLOCK_N"]),),
            *(x_RtK, weight_NK, None if bias_N is None else bias_N.contiguous(), slots, a, h, m, n, k),
            *(x_RtK.shape[1], x_RtK.stride(0), x_RtK.stride(1), *weight_NK.stride(), a.stride(0)),
            tile=blocks,
            GELU=gelu,
        )
    return a, h


def _through_gelu(
    da_MD: torch.Tensor, h_MD: torch.Tensor, want_a: bool, want_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dh, written over `da`; as wanted a = GELU(h), and the sum of dh over rows."""
    rows, width = h_MD.shape
    choice = tile("projector_bwd", "any", h_MD.device)
    tiles, across = -(-rows // choice["BLOCK_R"]), -(-width // choice["BLOCK_D"])
    # Without a sum over rows every tile is a program of its own.
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
    """The result [M, N], and with `save` h of every layer but the last."""
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
            da = dh @ weights[i]
            da, a, dbiases[i - 1] = _through_gelu(da, hidden[i - 1], want_dweights[i], want_dbiases[i - 1])
        else:
            da, a = None, torch.ops.llava_fast.activation(hidden[i - 1], "gelu", None) if want_dweights[i] else None
        if want_dweights[i]:
            dweights[i] = dh.t() @ a
        if not further:
            break
        dh = da
    return dx, dweights, dbiases


# The biases that there are, and of which layers: a list with gaps would get no gradients.
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


@torch.library.custom_op("llava_fast::projector_into", mutates_args=("rows",))
def _projector_into_op(
    rows: torch.Tensor,
    slots: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    has_bias: Sequence[bool],
) -> None:
    for i, (weight, bias) in enumerate(zip(weights, _with_gaps(biases, has_bias), strict=True)):
        last = i == len(weights) - 1
        x, _ = _linear(x, weight, bias, gelu=not last, into=(rows, slots) if last else None)


_projector_into_op.register_fake(lambda rows, slots, x, weights, biases, has_bias: None)


def _projector_triton(x, weights, biases):
    if not weights:
        return x
    present = [bias for bias in biases if bias is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *present))
    has_bias = [bias is not None for bias in biases]
    return torch.ops.llava_fast.projector(x, list(weights), present, has_bias, save)[0]


def projector_into_reference(
    rows_RD: torch.Tensor,
    slots_M: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
) -> None:
    rows_RD.index_copy_(0, slots_M, as_rows(projector_reference(x, weights, biases)))


def _projector_into_triton(rows_RD, slots_M, x, weights, biases):
    present, has_bias = [bias for bias in biases if bias is not None], [bias is not None for bias in biases]
    torch.ops.llava_fast.projector_into(rows_RD, slots_M, x, list(weights), present, has_bias)


def _supports(x: torch.Tensor, *parameters: torch.Tensor) -> bool | str:
    for parameter in parameters:
        if parameter.dtype != x.dtype:
            return f"a weight is {parameter.dtype}, the input {x.dtype}"
    return takes(x, *parameters)


register("projector", "reference", projector_reference)
register("projector", "triton", _projector_triton, _supports)
register("projector_into", "reference", projector_into_reference)
register("projector_into", "triton", _projector_into_triton, _supports)


def projector(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Project vision features into the language model's embedding space.

    Args:
        x: [..., D_in]; under autocast it, weights and biases are cast as `F.linear` casts them.
        weights: per layer [D_out, D_in].
        biases: per layer [D_out] or None.

    Returns:
        [..., D_out] of the last layer.

    Raises:
        ValueError: when there are not as many biases as weights.
    """
    if len(biases) != len(weights):
        raise ValueError(f"projector: {len(weights)} weights, {len(biases)} biases")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [bias if bias is None else bias.to(dtype) for bias in biases]
    present = [bias for bias in biases if bias is not None]
    return choose("projector", x, *weights, *present)(x, weights, biases)


def projector_into(
    rows_RD: torch.Tensor,
    slots_M: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
) -> None:
    """Project vision features straight into their rows of a buffer, such as packed embeddings: for inference.

    Saves writing and reading the features once (4·M·D bytes in bf16) where nobody else wants them.

    Args:
        rows_RD: [R, D_out] with contiguous rows, in the dtype of `x`; written to.
        slots_M: int64 [M], the row of each feature, each once.
        x, weights, biases: as for `projector`, at least one layer; x has M rows in all.

    Raises:
        ValueError: when the numbers do not fit, or a gradient is wanted, which there is not.
    """
    rows = x.numel() // x.shape[-1]
    if slots_M.numel() != rows or not weights or len(biases) != len(weights):
        counts = f"{rows} rows, {slots_M.numel()} slots, {len(weights)} weights, {len(biases)} biases"
        raise ValueError(f"projector_into: {counts}")
    if rows_RD.dtype != x.dtype or rows_RD.shape[1:] != weights[-1].shape[:1] or rows_RD.stride(1) != 1:
        raise ValueError(f"projector_into: rows are {rows_RD.dtype} {tuple(rows_RD.shape)}, features {x.dtype}")
    present = [bias for bias in biases if bias is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (rows_RD, x, *weights, *present)):
        raise ValueError("projector_into has no gradients; use projector, then merge")
    choose("projector_into", x, *weights, *present)(rows_RD, slots_M, x, weights, biases)


def _examples(device: torch.device, dtype: torch.dtype, rows: int, *widths: int) -> tuple[torch.Tensor, ...]:
    """Rows, a weight and a bias: random, as tuning compares results."""
    into, out = widths
    return tuple(
        torch.randn(size, device=device).to(dtype) * scale
        for size, scale in (((rows, into), 1.0), ((out, into), into**-0.5), ((out,), 1.0))
    )


def compile_examples(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Calls that between them launch each kernel with every shipped tile, for the compile report."""
    device = torch.device("cpu")
    for rows in (64, 2 * FEW_ROWS):
        x, weight, bias = _examples(device, dtype, rows, 64, 64)
        slots = torch.zeros(rows, dtype=torch.int64)
        for call in (
            partial(_linear, x, weight, bias, gelu=True, save=True),
            partial(_linear, x, weight, bias, gelu=False, into=(torch.empty_like(x), slots)),
        ):
            yield partial(_fused, call, rows, dtype)
    h = torch.empty(64, 4096, dtype=dtype)
    for wanted in (True, False):
        yield partial(_through_gelu, h.clone(), h, wanted, wanted)


def _fused(call: Callable[[], Any], rows: int, dtype: torch.dtype) -> Any:
    """The call with the fused kernel, whosever GEMM its tile asks for."""
    shipped = tile("projector_fwd", _fwd_key(rows, dtype), torch.device("cpu"))
    with forced_tile("projector_fwd", {**shipped, "LIBRARY": 0}):
        return call()


def tune_examples(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, str, Callable[[], Any], list[dict[str, int]]]]:
    """(kernel, key, call, tiles worth trying): LLaVA-1.5's first layer on a GPU, of one image and of 32.

    The library's GEMM is among the tiles.
    """
    gpu = device.type == "cuda"
    widths = (1024, 4096) if gpu else (64, 40)
    for name, of_dtype in (("half", dtype if dtype.itemsize == 2 else torch.float16), ("single", torch.float32)):
        sizes = ((64, 64), (64, 128), (128, 128), (128, 256), (256, 128)) if name == "half" else ((32, 64), (64, 64))
        tiles = [
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "LIBRARY": 0, "num_warps": warps, "num_stages": stages}
            for m, n in sizes
            for k in ((32, 64) if name == "half" else (16, 32))
            for warps in (4, 8)
            for stages in (2, 3, 4)
            if 32 <= m * n // (32 * warps) <= 128 or name == "single"
        ]
        for key, rows in (("few", 576 if gpu else 70), ("many", 32 * 576 if gpu else FEW_ROWS + 1)):
            x, weight, bias = _examples(device, of_dtype, rows, *widths)
            call = partial(_linear, x, weight, bias, gelu=True)
            yield "projector_fwd", f"{name}_{key}", call, [{**tiles[0], "LIBRARY": 1}, *tiles]
    h, da = (torch.randn(8 * 576 if gpu else 70, 4096 if gpu else 40, device=device).to(dtype) for _ in range(2))
    tiles = [
        {"BLOCK_R": rows, "BLOCK_D": columns, "num_warps": warps, "num_stages": 1}
        for rows in (4, 8, 16, 32)
        for columns in (128, 256, 512)
        for warps in (4, 8)
        if 4 <= rows * columns // (32 * warps) <= 32
    ]
    yield "projector_bwd", "any", lambda: _through_gelu(da.clone(), h, True, True), tiles
