"""Fused linear cross entropy: the loss of hidden · weightᵀ, for labelled rows only, without storing all logits.

    z = hidden · weightᵀ;   loss = Σ (lse(z) − z[label]) / items;   dz = (softmax(z) − 1[label]) / items

Logits of rows with `ignore_index`, 69 % of a LLaVA sample, are not computed. The other rows are processed in chunks of
constant memory (`CHUNK_BYTES` of logits, at least 256 rows). In each chunk dz overwrites the logits in place, and the
gradients of hidden states and weight are computed from it at once, in the forward pass (as in Mallen 2023 and Liger);
backward only scales them. A frozen head needs no dW, a frozen input no dhidden. Bytes of logits for 832 rows, 256 of
them labelled, V = 32,000, bf16: PyTorch keeps 53 MB, 106 MB in float32 and as much for the gradient; here 16 MB at a
time, read twice and written once (49 MB in the reference, which converts them to float32).

The kernel processes one row of logits per program, in tiles of BLOCK_V: first the statistics, by online softmax
(Milakov and Gimelshein 2018), then the gradient. Statistics and sums are float32 (float64 for float64). dW is summed
over chunks in float32, and rounded once. In 16 bits dz is rounded before the division by the number of items (fp16
would underflow): backward divides, and applies the factor of GradScaler at the same time.

The labelled rows are found without synchronisation. With `num_labelled` (a collator knows it), one stable sort puts
their indices first and the library's GEMM multiplies exactly these rows. Without it the chunks cover all rows, and the
kernels of `_gemm` stop at the count that they read on the device. Its cost: six launches and zeroed rows of dhidden for
an empty chunk, Triton's GEMM instead of the faster library GEMM for a full one, and dW summed in float32 whenever *all*
rows are more than one chunk. "reference" counts on the host: free on a CPU, a synchronisation on a GPU.

Shapes: N rows, D width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, differentiated, observed, register
from llava_fast.ops._gemm import add_outer, rows_product
from llava_fast.ops._launch import Example, as_rows, launch, tile
from llava_fast.ops._triton import inlined, jit, takes, tl

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 128 * 2**20}
MIN_CHUNK_ROWS = 256  # with fewer rows the GEMMs are limited by reading the weight
SMALL_VOCABULARY = 1024


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    num_items: int | torch.Tensor | None = None,
    num_labelled: int | None = None,
) -> torch.Tensor:
    """Mean cross entropy of `hidden · weightᵀ` against `labels`, without storing all logits.

    Args:
        hidden: [..., D] of a floating dtype; under autocast it and weight are cast as `F.linear` casts them.
        weight: [V, D], in the dtype of `hidden`; may be tied to the embedding.
        labels: [...] int64, already shifted: the label of each row of `hidden`.
        ignore_index: label of the rows to leave out.
        num_items: divisor of the sum over labelled rows, instead of their number (transformers'
            `num_items_in_batch`).
        num_labelled: how many labels are not `ignore_index`, if the host knows. Must be right: checked on a CPU only.

    Returns:
        The loss, [], in float32 (float64 for float64). Without any labelled row it is 0, with gradients of zero
        (PyTorch's mean is NaN). There are no second derivatives.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or a wrong `num_labelled`.
        IndexError: on a CPU, for a label outside the vocabulary (as PyTorch's own cross entropy). On a GPU, where the
            check would synchronise, the kernels read no logit for it, and loss and gradients become NaN.
    """
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if weight.dtype != hidden.dtype:
        raise ValueError(f"hidden and weight must have one dtype, not {hidden.dtype}, {weight.dtype}")
    if hidden.shape[:-1] != labels.shape or weight.shape[1:] != hidden.shape[-1:]:
        shapes = [tuple(t.shape) for t in (hidden, weight, labels)]
        raise ValueError(f"hidden [..., D], weight [V, D] and labels [...] do not fit: {shapes}")
    items = num_labelled if num_items is None else num_items
    if items is None:
        items = (labels != ignore_index).sum()
    if not isinstance(items, torch.Tensor):
        items = torch.full((), items, device=labels.device)
    scale = items.to(labels.device, _wide(hidden.dtype)).clamp(min=1).reciprocal()
    run = choose("linear_cross_entropy", hidden, weight)
    return run(hidden, weight, labels, scale, num_labelled, ignore_index)


def linear_cross_entropy_reference(hidden, weight, labels, scale, num_labelled, ignore_index):
    return _apply(hidden, weight, labels, scale, num_labelled, ignore_index, kernels=False)


def _linear_cross_entropy_triton(hidden, weight, labels, scale, num_labelled, ignore_index):
    return _apply(hidden, weight, labels, scale, num_labelled, ignore_index, kernels=True)


register("linear_cross_entropy", "reference", linear_cross_entropy_reference)
register("linear_cross_entropy", "triton", _linear_cross_entropy_triton, takes)


def _chunk_loss_reference(
    z_CV: torch.Tensor, labels_C: torch.Tensor, scale: torch.Tensor | None, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [C] of logits in float32 or float64, and the logits' gradient times `scale` ([] or None).

    The logits are overwritten.
    """
    # Subtract the largest logit first, for precision.
    z_CV.sub_(z_CV.amax(1, keepdim=True))
    losses = -z_CV.gather(1, labels_C[:, None])[:, 0]
    sums = z_CV.exp_().sum(1, keepdim=True)
    losses += sums[:, 0].log()
    if gradient:
        weight = torch.ones((), dtype=z_CV.dtype, device=z_CV.device) if scale is None else scale
        z_CV.mul_(weight / sums)
        z_CV.scatter_add_(1, labels_C[:, None], -weight.expand(len(z_CV), 1))
    return losses, z_CV


@inlined
def _logits_at(logits_ptr, column, vocabulary):
    """The logits of these columns in float32, −∞ beyond the vocabulary."""
    inside = column < vocabulary
    return tl.where(inside, tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32), float("-inf"))


@jit
def _loss_kernel(
    logits_ptr,
    rows_ptr,
    labels_ptr,
    scale_ptr,
    losses_ptr,
    vocabulary,
    ignore_index,
    HAS_SCALE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ZERO_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program per row of the chunk: statistics first, then the gradient, which overwrites the logits.
    logits_ptr += tl.program_id(0).to(tl.int64) * vocabulary
    row = tl.load(rows_ptr + tl.program_id(0))
    label = tl.load(labels_ptr + row)
    lane = tl.arange(0, BLOCK_V)
    if label == ignore_index:
        if ZERO_REST:
            for first in range(0, vocabulary, BLOCK_V):
                column = first + lane
                zeros = tl.zeros([BLOCK_V], logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + column, zeros, mask=column < vocabulary)
        return

    known = (label >= 0) & (label < vocabulary)
    at_label = tl.load(logits_ptr + label, mask=known, other=0.0).to(tl.float32)
    peak = float("-inf")
    exps = 0.0
    for first in range(0, vocabulary, BLOCK_V):
        column = first + lane
        z = _logits_at(logits_ptr, column, vocabulary)
        higher = tl.maximum(peak, tl.max(z, axis=0))
        exps = exps * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher), axis=0)
        peak = higher
    # Relative to the largest logit, for precision.
    loss = tl.log(exps) - (at_label - peak)
    # A label outside the vocabulary gives NaN, here and in the gradient, not the 0 of a row without a label.
    tl.store(losses_ptr + row, tl.where(known, loss, float("nan")))

    if GRADIENT:
        weight = 1.0
        if HAS_SCALE:
            weight = tl.load(scale_ptr)
        factor = tl.where(known, weight / exps, float("nan"))
        for first in range(0, vocabulary, BLOCK_V):
            column = first + lane
            z = _logits_at(logits_ptr, column, vocabulary)
            dz = factor * tl.exp(z - peak) - tl.where(column == label, weight, 0.0)
            tl.store(logits_ptr + column, dz.to(logits_ptr.dtype.element_ty), mask=column < vocabulary)


def _chunk_loss(
    logits_CV: torch.Tensor,
    rows_C: torch.Tensor,
    labels_N: torch.Tensor,
    scale: torch.Tensor | None,
    losses_N: torch.Tensor,
    ignore_index: int,
    gradient: bool,
    zero_rest: bool,
) -> None:
    """Write the losses of labelled rows into `losses_N`; with `gradient` overwrite their logits with the gradient.

    Logits of rows without a label are zeroed with `zero_rest`, and otherwise left unchanged.
    """
    rows, vocabulary = logits_CV.shape
    launch(
        _loss_kernel,
        (rows,),
        *(logits_CV, rows_C, labels_N, scale, losses_N, vocabulary, ignore_index),
        tile=tile("loss", "small" if vocabulary <= SMALL_VOCABULARY else "any", logits_CV.device),
        HAS_SCALE=scale is not None,
        GRADIENT=gradient,
        ZERO_REST=zero_rest,
    )


def _labelled_rows(
    labels_N: torch.Tensor, ignore_index: int, num_labelled: int | None, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Indices of the labelled rows, and None; or indices of all rows, labelled rows first, and the labelled count."""
    ignored = labels_N == ignore_index
    if num_labelled is None and not kernels:
        return (~ignored).nonzero()[:, 0], None
    if labels_N.device.type == "cpu" and num_labelled is not None:
        counted = int((~ignored).sum())
        if counted != num_labelled:
            raise ValueError(f"num_labelled is {num_labelled}, but {counted} labels are not {ignore_index}")
    if num_labelled == labels_N.numel():
        return torch.arange(num_labelled, device=labels_N.device), None
    order = ignored.to(torch.uint8).argsort(stable=True)
    return (order, (~ignored).sum()) if num_labelled is None else (order[:num_labelled], None)


def _chunks(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, stop) of chunks of rows: as few as the memory limit allows, of about equal sizes."""
    limit = max(MIN_CHUNK_ROWS, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (vocabulary * dtype.itemsize))
    size = -(-rows // -(-rows // limit)) if rows else 1
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def _logits(hidden_CD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    if hidden_CD.device.type != "cpu" or hidden_CD.dtype != torch.float32:
        return F.linear(hidden_CD, weight_VD).contiguous()
    # On a CPU in float32 this order of the product takes 12–25 % less time, copy included (8–256 rows, V = 32,000).
    return (weight_VD @ hidden_CD.t()).t().contiguous()


def _plus_outer(total: torch.Tensor | None, a_CM: torch.Tensor, b_CN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total + aᵀ·b in `dtype`, written into `total` where there is one."""
    a_MC = a_CM.t()
    if a_MC.dtype == dtype:
        return a_MC @ b_CN if total is None else total.addmm_(a_MC, b_CN)
    if a_MC.is_cuda:
        if total is None:
            return torch.mm(a_MC, b_CN, out_dtype=dtype)
        return torch.addmm(total, a_MC, b_CN, out_dtype=dtype, out=total)
    product = (a_MC @ b_CN).to(dtype)
    return product if total is None else total.add_(product)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _run(
    hidden: torch.Tensor,
    weight_VD: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor | None,
    num_labelled: int | None,
    ignore_index: int,
    wanted: Sequence[bool],
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Unscaled losses [N]; and, if `wanted`, the gradients of their sum · `scale` for hidden and weight, else None."""
    hidden_ND = as_rows(hidden) if kernels else hidden.reshape(-1, hidden.shape[-1])
    labels_N = labels.reshape(-1)
    (rows, width), vocabulary = hidden_ND.shape, weight_VD.shape[0]
    want_dhidden, want_dweight = wanted
    wide = _wide(hidden.dtype)
    rows_n, count = _labelled_rows(labels_N, ignore_index, num_labelled, kernels)
    labelled = rows_n.numel()
    everything = labelled == rows and count is None
    if hidden.device.type == "cpu" and labelled:
        known_n = labels_N[labels_N != ignore_index]
        outside_n = known_n[(known_n < 0) | (known_n >= vocabulary)]
        if outside_n.numel():
            raise IndexError(f"label {int(outside_n[0])} is outside the vocabulary of {vocabulary}")

    losses_N = torch.zeros(rows, dtype=wide, device=hidden.device)
    dhidden_ND = dweight = None
    if want_dhidden:
        # If the count is on the device, the chunks cover all rows and write all of them.
        make = torch.zeros if labelled < rows else torch.empty
        dhidden_ND = make(rows, width, dtype=hidden.dtype, device=hidden.device)
    chunks = list(_chunks(labelled, vocabulary, hidden.dtype, hidden.device))
    sum_dtype = weight_VD.dtype if len(chunks) == 1 else wide
    if want_dweight and (count is not None or not chunks):
        dweight = torch.zeros(weight_VD.shape, dtype=sum_dtype, device=hidden.device)

    for start, stop in chunks:
        rows_C = rows_n[start:stop]
        hidden_CD = hidden_ND[start:stop] if everything else hidden_ND.index_select(0, rows_C)
        if count is None:
            dz_CV = _logits(hidden_CD, weight_VD)
        else:
            dz_CV = rows_product(hidden_CD, weight_VD.t(), count, start)
        if kernels:
            zero_rest = any(wanted) and count is None
            _chunk_loss(dz_CV, rows_C, labels_N, scale, losses_N, ignore_index, any(wanted), zero_rest)
        else:
            z_CV = dz_CV.to(wide)
            del dz_CV  # in 16 bits it is a copy
            losses_N[rows_C], z_CV = _chunk_loss_reference(z_CV, labels_N[rows_C], scale, any(wanted))
            dz_CV = z_CV.to(hidden.dtype)
        if dhidden_ND is not None:
            if count is not None:
                dhidden_ND.index_copy_(0, rows_C, rows_product(dz_CV, weight_VD, count, start, zero_rest=True))
            elif everything:
                torch.mm(dz_CV, weight_VD, out=dhidden_ND[start:stop])
            else:
                dhidden_ND.index_copy_(0, rows_C, dz_CV @ weight_VD)
        if count is not None and dweight is not None:
            add_outer(dweight, dz_CV, hidden_CD, count, start)
        elif want_dweight:
            dweight = _plus_outer(dweight, dz_CV, hidden_CD, sum_dtype)

    return (
        losses_N,
        None if dhidden_ND is None else dhidden_ND.view(hidden.shape),
        None if dweight is None else dweight.to(weight_VD.dtype),
    )


def _folds(dtype: torch.dtype) -> bool:
    """Whether the forward pass scales the gradients: not in 16 bits, where small numbers lose precision."""
    return dtype.itemsize >= 4


# A custom op cannot return None, so an output that is not needed is an empty tensor.
@torch.library.custom_op("llava_fast::linear_cross_entropy", mutates_args=())
def _op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor,
    num_labelled: int | None,
    ignore_index: int,
    wanted: list[bool],
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    folded = scale if _folds(hidden.dtype) else None
    losses_N, dhidden, dweight = _run(hidden, weight, labels, folded, num_labelled, ignore_index, wanted, kernels)
    empty = hidden.new_empty
    return (
        losses_N.sum() * scale,
        empty(0) if dhidden is None else dhidden,
        empty(0) if dweight is None else dweight,
    )


@_op.register_fake
def _fake(hidden, weight, labels, scale, num_labelled, ignore_index, wanted, kernels):
    loss = hidden.new_empty((), dtype=_wide(hidden.dtype))
    return loss, *(t.new_empty(t.shape if want else 0) for t, want in zip((hidden, weight), wanted, strict=True))


def _setup_context(ctx, inputs, output):
    hidden, _, _, scale, _, _, ctx.wanted, _ = inputs
    ctx.folds = _folds(hidden.dtype)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], scale)


def _autograd(ctx, dloss, *_):
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("linear_cross_entropy has no second derivative")
    if dloss is None:
        return (None,) * 8
    *gradients, scale = ctx.saved_tensors
    factor = dloss if ctx.folds else dloss * scale
    if not _is_one(factor):
        gradients = [gradient * factor for gradient in gradients]
    needed = (need and want for need, want in zip(ctx.needs_input_grad, ctx.wanted))
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), *(None,) * 6


def _is_one(factor: torch.Tensor) -> bool:
    """Whether `factor` is 1; False if reading it would synchronise or break a trace."""
    # Then the saved gradient is returned as it is; with retain_graph=True autograd copies it.
    return type(factor) is torch.Tensor and factor.device.type == "cpu" and not _tracing() and factor.item() == 1


def _tracing() -> bool:
    return torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None


_op.register_autograd(_autograd, setup_context=_setup_context)


def _apply(hidden, weight, labels, scale, num_labelled, ignore_index, kernels: bool):
    wanted = [differentiated(hidden), differentiated(weight)]
    if not observed(hidden, weight, labels):
        return _run(hidden, weight, labels, None, num_labelled, ignore_index, wanted, kernels)[0].sum() * scale
    return torch.ops.llava_fast.linear_cross_entropy(
        hidden, weight, labels, scale, num_labelled, ignore_index, wanted, kernels
    )[0]


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """LLaVA-1.5-7B's head over one sample; the tuner times its kernels over 2048 rows."""
    large = device.type != "cpu"
    half = dtype.itemsize == 2
    rows, width, vocabularies = (832, 4096, (SMALL_VOCABULARY, 32000)) if large else (3, 32, (1024, 2048))
    of_gemm = "half" if half else "single"
    for key, vocabulary in zip(("small", "any"), vocabularies):
        hidden, weight = (torch.randn(n, width, device=device).to(dtype) for n in (rows, vocabulary))
        labels = torch.arange(rows, device=device) % vocabulary
        scale = None if half else torch.ones((), device=device)
        for num_labelled, wanted in ((None, (True, True)), (rows, (True, True)), (rows, (False, False))):
            call = partial(_run, hidden, weight, labels, scale, num_labelled, -100, wanted, True)
            yield Example("loss", key, call)
        logits = torch.randn(2048 if large else 3, vocabulary, device=device).to(dtype)
        order = torch.arange(logits.shape[0], device=device)
        losses = torch.empty(order.shape, device=device)

        def loss(logits=logits, order=order, losses=losses, scale=scale):
            dz = logits.clone()
            _chunk_loss(dz, order, order % logits.shape[1], scale, losses, -100, gradient=True, zero_rest=True)
            return losses, dz

        tiles = [
            {"BLOCK_V": block, "num_warps": warps, "num_stages": 1}
            for block in (1024, 2048, 4096, 8192, 16384)
            for warps in (4, 8, 16, 32)
            if 8 <= block // (32 * warps) <= 32  # elements per thread: wide loads, few registers
        ]
        yield Example("loss", key, loss, tiles)
    rows, width, vocabulary = (2048, 4096, 32000) if large else (70, 40, 90)
    hidden, weight = (torch.randn(n, width, device=device).to(dtype) for n in (rows, vocabulary))
    count = torch.full((), rows, device=device)

    def several_chunks():  # then dW is summed in float32
        dweight, dz = torch.zeros(weight.shape, device=device), torch.randn(rows, vocabulary, device=device)
        add_outer(dweight, dz.to(dtype), hidden, count, 0)
        return dweight

    yield Example("gemm", of_gemm, several_chunks)
    tiles = [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m, n in (((64, 64), (64, 128), (128, 128), (128, 256), (256, 128)) if half else ((32, 64), (64, 64)))
        for k in ((32, 64) if half else (16, 32))
        for warps in (4, 8)
        for stages in (2, 3, 4)
        if 32 <= m * n // (32 * warps) <= 128 or not half
    ]
    yield Example("gemm", of_gemm, partial(rows_product, hidden, weight.t(), count, 0), tiles)
