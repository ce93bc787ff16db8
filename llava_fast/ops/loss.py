"""The head and its loss in one operation: cross entropy of hidden · weightᵀ, for labelled rows only, logits never kept.

    z = hidden · weightᵀ + bias;   z ← softcap · tanh(z / softcap)                       (Gemma 2; optional)
    loss = lse(z) − (1 − ε) · z[label] − ε · mean(z) + z_loss · lse(z)²     ε = label_smoothing (Szegedy et al. 2016);
    dz   = (1 + 2 · z_loss · lse) · softmax(z) − ε / V − (1 − ε) · 1[label]                   z_loss (PaLM 2022)

Rows with `ignore_index` never meet the head: of a LLaVA sample that is 69 % of them. The others are worked off in
chunks of constant memory (`CHUNK_BYTES` of logits, at least 256 rows); dz overwrites the logits where they lie, and
what the hidden states' and the weight's gradients need of a chunk is taken from it at once, in the forward pass
(Mallen 2023 and Liger do so too); backward scales. A frozen head costs no dW, a frozen input no dhidden. Bytes of
logits for 832 rows, 256 of them labelled, V = 32,000, bf16: PyTorch keeps 53 MB, 106 MB in float32 and as much for
the gradient; here 16 MB at a time, read twice and written once (by the reference, which widens them to float32, 49 MB).

Statistics and sums are float32 (float64 for float64). dW is summed over chunks in float32, and rounded once. In 16 bits
dz is not divided by the number of rows before it is rounded (fp16 would lose it); backward scales, by what GradScaler
says too.

How the labelled rows are found costs no synchronisation. Given `num_labelled` (a collator knows it), one stable sort
puts their indices in front and the library's GEMM multiplies exactly these. Without it the chunks cover all rows and
the kernels of `_gemm` stop at the count they read on the device: an empty chunk costs six launches and its share of
dhidden, a full one what Triton's GEMM is slower than the library's, and dW is summed in float32 whenever *all* rows
would be more than a chunk. "reference" counts on the host instead: free on a CPU, a synchronisation on a GPU.

With reduction "none" every row has a gradient of its own. dhidden can still be scaled by row afterwards; dW cannot, so
where the head is trained backward computes the logits again.

Shapes: N rows, D width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, register
from llava_fast.ops._chunk_loss import SMALL_VOCABULARY, Options, chunk_loss_reference, chunk_loss_triton
from llava_fast.ops._gemm import add_outer, rows_product
from llava_fast.ops._launch import as_rows
from llava_fast.ops._triton import takes

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 128 * 2**20}
MIN_CHUNK_ROWS = 256  # fewer would leave the GEMMs waiting for the weight


def _labelled_rows(
    labels_N: torch.Tensor, ignore_index: int, num_labelled: int | None, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Indices of the labelled rows, in order, and None; or of all rows, the labelled first, and how many these are."""
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
    """(start, stop) of as few chunks of rows as the budget allows, all of about the same size."""
    limit = max(MIN_CHUNK_ROWS, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (vocabulary * dtype.itemsize))
    size = -(-rows // -(-rows // limit)) if rows else 1
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def _logits(hidden_CD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    if hidden_CD.is_cuda or hidden_CD.dtype != torch.float32:
        return F.linear(hidden_CD, weight_VD, bias_V).contiguous()
    # A CPU's float32 GEMM takes 12–25 % less time this way round, the copy included (8 to 256 rows, V = 32,000).
    logits_CV = (weight_VD @ hidden_CD.t()).t().contiguous()
    return logits_CV if bias_V is None else logits_CV.add_(bias_V)


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
    bias_V: torch.Tensor | None,
    labels: torch.Tensor,
    scale: torch.Tensor | None,
    num_labelled: int | None,
    options: Options,
    wanted: tuple[bool, bool, bool],
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Losses [N], not scaled; and as `wanted` the gradients of hidden, weight and bias of their sum, times `scale`."""
    hidden_ND, labels_N = as_rows(hidden), labels.reshape(-1)
    bias_V = None if bias_V is None else bias_V.contiguous()
    (rows, width), vocabulary = hidden_ND.shape, weight_VD.shape[0]
    want_dhidden, want_dweight, want_dbias = wanted
    wide = _wide(hidden.dtype)
    rows_n, count = _labelled_rows(labels_N, options.ignore_index, num_labelled, kernels)
    labelled = rows_n.numel()
    everything = labelled == rows and count is None
    if not hidden.is_cuda and not kernels and labelled:
        low, high = (int(bound) for bound in labels_N[rows_n].aminmax())
        if low < 0 or high >= vocabulary:
            raise IndexError(f"label {low if low < 0 else high} is outside the vocabulary of {vocabulary}")

    losses_N = torch.zeros(rows, dtype=wide, device=hidden.device)
    dhidden_ND = dweight = dbias = None
    if want_dhidden:
        # With a count on the device the chunks cover all rows, and so write all of them.
        make = torch.zeros if labelled < rows else torch.empty
        dhidden_ND = make(rows, width, dtype=hidden.dtype, device=hidden.device)
    chunks = list(_chunks(labelled, vocabulary, hidden.dtype, hidden.device))
    sum_dtype = weight_VD.dtype if len(chunks) == 1 else wide
    if want_dweight and (count is not None or not chunks):
        dweight = torch.zeros(weight_VD.shape, dtype=sum_dtype, device=hidden.device)
    if want_dbias:
        dbias = torch.zeros(vocabulary, dtype=wide, device=hidden.device)

    for start, stop in chunks:
        rows_C = rows_n[start:stop]
        hidden_CD = hidden_ND[start:stop] if everything else hidden_ND.index_select(0, rows_C)
        if count is None:
            logits_CV = _logits(hidden_CD, weight_VD, bias_V)
        else:
            logits_CV = rows_product(hidden_CD, weight_VD.t(), count, start, bias_N=bias_V)
        if kernels:
            zero_rest = any(wanted) and (count is None or want_dbias)
            chunk_loss_triton(logits_CV, rows_C, labels_N, scale, losses_N, options, any(wanted), zero_rest)
            dz_CV = logits_CV
        else:
            z_CV = logits_CV.to(wide)
            del logits_CV  # in 16 bits that was a copy
            scale_C = scale if scale is None or scale.ndim == 0 else scale[rows_C]
            losses_C, z_CV = chunk_loss_reference(z_CV, labels_N[rows_C], scale_C, options, any(wanted))
            losses_N[rows_C] = losses_C
            dz_CV = z_CV.to(hidden.dtype)
        if want_dhidden:
            if count is not None:
                dhidden_ND.index_copy_(0, rows_C, rows_product(dz_CV, weight_VD, count, start, zero_rest=True))
            elif everything:
                torch.mm(dz_CV, weight_VD, out=dhidden_ND[start:stop])
            else:
                dhidden_ND.index_copy_(0, rows_C, dz_CV @ weight_VD)
        if want_dweight:
            if count is None:
                dweight = _plus_outer(dweight, dz_CV, hidden_CD, sum_dtype)
            else:
                add_outer(dweight, dz_CV, hidden_CD, count, start)
        if want_dbias:
            dbias += dz_CV.sum(0, dtype=wide)

    return (
        losses_N,
        None if dhidden_ND is None else dhidden_ND.view(hidden.shape),
        None if dweight is None else dweight.to(weight_VD.dtype),
        None if dbias is None else dbias.to(bias_V.dtype),
    )


def _folds(dtype: torch.dtype) -> bool:
    """Whether the gradients of the forward pass are scaled already: where rounding does not mind the size."""
    return dtype.itemsize >= 4


# An operator always returns tensors, so an output that is not wanted is an empty one.
@torch.library.custom_op("llava_fast::linear_cross_entropy", mutates_args=())
def _op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: torch.Tensor | None,
    num_labelled: int | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    by_row: bool,
    wanted: list[bool],
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = Options(ignore_index, label_smoothing, softcap, z_loss)
    folded = scale if scale is None or scale.ndim or _folds(hidden.dtype) else None
    losses_N, *gradients = _run(hidden, weight, bias, labels, folded, num_labelled, options, tuple(wanted), kernels)
    loss = losses_N.view(labels.shape) if by_row else losses_N.sum()
    if not by_row and scale is not None:
        loss = (losses_N * scale).sum() if scale.ndim else loss * scale
    return loss, *(hidden.new_empty(0) if g is None else g for g in gradients)


@_op.register_fake
def _fake(hidden, weight, bias, labels, scale, num_labelled, ignore_index, label_smoothing, softcap, z_loss, *rest):
    by_row, wanted, _ = rest
    loss = hidden.new_empty(labels.shape if by_row else (), dtype=_wide(hidden.dtype))
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return loss, *(hidden.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, labels, scale, *ctx.settings, by_row, wanted, kernels = inputs
    ctx.by_row, ctx.wanted, ctx.kernels, ctx.folds = by_row, wanted, kernels, _folds(hidden.dtype)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.deferred = by_row and not any(wanted)
    if ctx.deferred:
        ctx.save_for_backward(hidden, weight, bias, labels)
    else:
        ctx.save_for_backward(*output[1:], scale)


def _autograd(ctx, dloss, *_):
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("linear_cross_entropy has no second derivative")
    nothing = (None,) * 13
    if dloss is None:
        return nothing
    needed = [ctx.needs_input_grad[i] for i in range(3)]
    if ctx.deferred:
        hidden, weight, bias, labels = ctx.saved_tensors
        scale = dloss.reshape(-1).contiguous()
        _, *gradients = torch.ops.llava_fast.linear_cross_entropy(
            hidden, weight, bias, labels, scale, *ctx.settings, False, needed, ctx.kernels
        )
    else:
        *gradients, scale = ctx.saved_tensors
        if ctx.by_row:
            dhidden = gradients[0]
            gradients[0] = (dhidden * dloss[..., None]).to(dhidden.dtype)
        else:
            factor = dloss if ctx.folds or scale is None else dloss * scale
            if not _is_one(factor):
                gradients = [gradient * factor for gradient in gradients]
        needed = [need and want for need, want in zip(needed, ctx.wanted, strict=True)]
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), *nothing[3:]


def _is_one(factor: torch.Tensor) -> bool:
    """Whether multiplying by `factor` is a waste, where it costs nothing to look."""
    # A saved gradient that is passed on as it is stays saved: autograd copies it if it is kept for another backward.
    return type(factor) is torch.Tensor and factor.device.type == "cpu" and not _tracing() and factor.item() == 1


def _tracing() -> bool:
    return torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None


_op.register_autograd(_autograd, setup_context=_setup_context)


def _apply(hidden, weight, bias, labels, scale, num_labelled, options: Options, by_row: bool, kernels: bool):
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if by_row and any(wanted[1:]):
        wanted = [False] * 3  # backward computes them
    return torch.ops.llava_fast.linear_cross_entropy(
        hidden, weight, bias, labels, scale, num_labelled, *options, by_row, wanted, kernels
    )[0]


def linear_cross_entropy_reference(hidden, weight, bias, labels, scale, num_labelled, options, by_row):
    return _apply(hidden, weight, bias, labels, scale, num_labelled, options, by_row, kernels=False)


def _linear_cross_entropy_triton(hidden, weight, bias, labels, scale, num_labelled, options, by_row):
    return _apply(hidden, weight, bias, labels, scale, num_labelled, options, by_row, kernels=True)


register("linear_cross_entropy", "reference", linear_cross_entropy_reference)
register("linear_cross_entropy", "triton", _linear_cross_entropy_triton, takes)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    bias: torch.Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    num_items: int | torch.Tensor | None = None,
    num_labelled: int | None = None,
) -> torch.Tensor:
    """Cross entropy of `hidden · weightᵀ + bias` against `labels`, without the logits.

    Args:
        hidden: [..., D]; under autocast it, weight and bias are cast as `F.linear` casts them.
        weight: [V, D], in the dtype of `hidden`; may be the embedding too.
        labels: [...] int64, those of the same row of `hidden` (the caller has shifted them).
        ignore_index: label of the rows to leave out.
        bias: [V].
        reduction: "mean" over the labelled rows, "sum", or "none".
        label_smoothing: between 0 and 1, as in `F.cross_entropy`.
        softcap: logits become softcap · tanh(logits / softcap).
        z_loss: weight of the squared log-sum-exp that is added to each row's loss.
        num_items: the "mean" divides the sum by this instead (transformers' `num_items_in_batch`).
        num_labelled: how many labels are not `ignore_index`, if the host knows. Must be right: checked on a CPU only.

    Returns:
        The loss, [] or with "none" [...] with zeros where there is no label, in float32 (float64 for float64). Without
        any labelled row it is 0, with gradients of zero (PyTorch's mean is NaN). A label outside the vocabulary raises
        `IndexError` on a CPU; from the kernels its loss is NaN. There are no second derivatives.
    """
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (t if t is None else t.to(dtype) for t in (hidden, weight, bias))
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        dtypes = [hidden.dtype, weight.dtype, *([] if bias is None else [bias.dtype])]
        raise ValueError(f"hidden, weight and bias must have one dtype, not {', '.join(map(str, dtypes))}")
    if hidden.shape[:-1] != labels.shape or weight.shape[1:] != hidden.shape[-1:]:
        shapes = [tuple(t.shape) for t in (hidden, weight, labels)]
        raise ValueError(f"hidden [..., D], weight [V, D] and labels [...] do not fit: {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}, the vocabulary {weight.shape[0]}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be mean, sum or none")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items is what a mean is divided by; reduction is {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be between 0 and 1")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None")

    scale = None
    if reduction == "mean":
        items = num_labelled if num_items is None else num_items
        if items is None:
            items = (labels != ignore_index).sum()
        if not isinstance(items, torch.Tensor):
            items = torch.full((), items, device=labels.device)
        scale = items.to(labels.device, _wide(hidden.dtype)).clamp(min=1).reciprocal()
    options = Options(ignore_index, float(label_smoothing), float(softcap or 0.0), float(z_loss))
    run = choose("linear_cross_entropy", hidden, weight)
    return run(hidden, weight, bias, labels, scale, num_labelled, options, reduction == "none")


def tune_examples(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, str, Callable[[], Any], list[dict[str, int]]]]:
    """(kernel, key, call, tiles worth trying) for each entry of the tile tables, at about LLaVA's sizes on a GPU."""
    gpu = device.type == "cuda"
    for key, vocabulary in (("small", SMALL_VOCABULARY), ("any", 32000 if gpu else 2 * SMALL_VOCABULARY)):
        logits = torch.randn(2048 if gpu else 3, vocabulary, device=device).to(dtype)
        rows = torch.arange(logits.shape[0], device=device)
        losses, labels = torch.empty(rows.shape, device=device), rows % vocabulary

        def loss(logits=logits, rows=rows, losses=losses, labels=labels):
            dz = logits.clone()
            chunk_loss_triton(dz, rows, labels, None, losses, Options(), gradient=True, zero_rest=True)
            return losses, dz

        tiles = [
            {"BLOCK_V": block, "num_warps": warps, "num_stages": 1}
            for block in (1024, 2048, 4096, 8192, 16384)
            for warps in (4, 8, 16, 32)
            if 8 <= block // (32 * warps) <= 32  # elements per thread: wide loads, few registers
        ]
        yield "loss", key, loss, tiles
    for key, of_dtype in (("half", dtype if dtype.itemsize == 2 else torch.float16), ("single", torch.float32)):
        rows, width, vocabulary = (2048, 4096, 32000) if gpu else (70, 40, 90)
        hidden, weight = (torch.randn(size, width, device=device).to(of_dtype) for size in (rows, vocabulary))
        count = torch.full((), rows, device=device)
        sizes = ((64, 64), (64, 128), (128, 128), (128, 256), (256, 128)) if key == "half" else ((32, 64), (64, 64))
        tiles = [
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
            for m, n in sizes
            for k in ((32, 64) if key == "half" else (16, 32))
            for warps in (4, 8)
            for stages in (2, 3, 4)
            if 32 <= m * n // (32 * warps) <= 128 or key == "single"
        ]
        yield "gemm", key, partial(rows_product, hidden, weight.t(), count, 0), tiles


def compile_examples(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Calls that between them launch each kernel with every shipped tile, for the compile report."""
    options = Options(label_smoothing=0.1, softcap=30.0, z_loss=1e-4)
    labels, scale = torch.zeros(64, dtype=torch.int64), torch.ones(64)
    for vocabulary in (SMALL_VOCABULARY, 2 * SMALL_VOCABULARY):
        hidden, weight = torch.empty(64, 128, dtype=dtype), torch.empty(vocabulary, 128, dtype=dtype)
        for bias, chosen, by_row in ((None, Options(), None), (weight[:, 0], options, scale)):
            wanted = (True, True, bias is not None)
            for num_labelled in (None, 64):
                yield partial(_run, hidden, weight, bias, labels, by_row, num_labelled, chosen, wanted, True)
        yield partial(_run, hidden, weight, None, labels, None, 64, Options(), (False, False, False), True)
        # dW of several chunks.
        yield partial(add_outer, torch.empty(weight.shape), hidden @ weight.t(), hidden, labels[0], 0)
