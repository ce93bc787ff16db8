"""Losses of a chunk of logits, and their gradient over the logits where they lie: by PyTorch, and by a Triton kernel.

The formulas are those of `loss.py`. The kernel reads the logits twice (statistics by online softmax, Milakov and
Gimelshein 2018; then the gradient) and writes them once, one program per row in tiles of BLOCK_V; the softcap is
applied as they are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llava_fast.ops._launch import launch, tile
from llava_fast.ops._triton import jit, tl

SMALL_VOCABULARY = 1024


class Options(NamedTuple):
    """What changes the formula; a softcap of 0 is none."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    z_loss: float = 0.0


def chunk_loss_reference(
    z_CV: torch.Tensor, labels_C: torch.Tensor, scale: torch.Tensor | None, options: Options, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [C] of logits in float32 or float64, and the logits' gradient times `scale` ([C], [] or None).

    The logits are overwritten.
    """
    _, smoothing, softcap, z_loss = options
    slope = None
    if softcap:
        z_CV.div_(softcap).tanh_()
        slope = 1 - z_CV.square() if gradient else None
        z_CV.mul_(softcap)
    # Relative to the largest logit, so that nothing is lost to its size.
    peak = z_CV.amax(1, keepdim=True)
    z_CV.sub_(peak)
    losses = z_CV.gather(1, labels_C[:, None])[:, 0] * (smoothing - 1)
    if smoothing:
        losses -= smoothing * z_CV.mean(1)
    sums = z_CV.exp_().sum(1, keepdim=True)
    losses += sums[:, 0].log()
    lse = (peak + sums.log())[:, 0]
    if z_loss:
        losses += z_loss * lse.square()
    if gradient:
        weights = torch.ones_like(lse) if scale is None else scale.expand_as(lse)
        z_CV.mul_((weights * (1 + 2 * z_loss * lse))[:, None] / sums)
        if smoothing:
            z_CV.sub_(weights[:, None] * (smoothing / z_CV.shape[1]))
        z_CV.scatter_add_(1, labels_C[:, None], (weights * (smoothing - 1))[:, None])
        if slope is not None:
            z_CV.mul_(slope)
    return losses, z_CV


@jit
def _tanh(x):
    # As Cephes' tanhf (Moshier): a polynomial near 0, where the exponential would cancel. Within 1e-7.
    square = tl.minimum(x * x, 0.4)
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = ((p * square - 5.37397155531e-2) * square + 1.33314422036e-1) * square - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * square * p, tl.where(x < 0.0, -far, far))


@jit
def _logits(logits_ptr, column, vocabulary, softcap, SOFTCAP: tl.constexpr):
    # The logits of these columns, −∞ beyond the vocabulary, and their slope.
    inside = column < vocabulary
    z = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        t = _tanh(z / softcap)
        z = softcap * t
        slope = 1.0 - t * t
    return tl.where(inside, z, float("-inf")), slope


@jit
def _loss_kernel(
    logits_ptr,
    rows_ptr,
    labels_ptr,
    scale_ptr,
    losses_ptr,
    vocabulary,
    scale_stride,
    ignore_index,
    smoothing,
    softcap,
    z_loss,
    HAS_SCALE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    ZERO_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program per row of the chunk: statistics first, then the gradient over the logits.
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

    at_label, _slope = _logits(logits_ptr, label, vocabulary, softcap, SOFTCAP)
    peak = float("-inf")
    exps = 0.0
    total = 0.0
    for first in range(0, vocabulary, BLOCK_V):
        column = first + lane
        z, slope = _logits(logits_ptr, column, vocabulary, softcap, SOFTCAP)
        higher = tl.maximum(peak, tl.max(z, axis=0))
        exps = exps * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher), axis=0)
        peak = higher
        if SMOOTHING:
            total += tl.sum(tl.where(column < vocabulary, z, 0.0), axis=0)
    lse = peak + tl.log(exps)
    # Relative to the largest logit, so that nothing is lost to its size.
    loss = tl.log(exps) - (1.0 - smoothing) * (at_label - peak) + z_loss * lse * lse
    if SMOOTHING:
        loss -= smoothing * (total / vocabulary - peak)
    # A label outside the vocabulary must not pass for a row without one.
    tl.store(losses_ptr + row, tl.where((label >= 0) & (label < vocabulary), loss, float("nan")))

    if GRADIENT:
        weight = 1.0
        if HAS_SCALE:
            weight = tl.load(scale_ptr + row * scale_stride)
        factor = weight * (1.0 + 2.0 * z_loss * lse) / exps
        for first in range(0, vocabulary, BLOCK_V):
            column = first + lane
            z, slope = _logits(logits_ptr, column, vocabulary, softcap, SOFTCAP)
            dz = factor * tl.exp(z - peak)
            if SMOOTHING:
                dz -= weight * (smoothing / vocabulary)
            dz -= tl.where(column == label, weight * (1.0 - smoothing), 0.0)
            if SOFTCAP:
                dz *= slope
            tl.store(logits_ptr + column, dz.to(logits_ptr.dtype.element_ty), mask=column < vocabulary)


def chunk_loss_triton(
    logits_CV: torch.Tensor,
    rows_C: torch.Tensor,
    labels_N: torch.Tensor,
    scale: torch.Tensor | None,
    losses_N: torch.Tensor,
    options: Options,
    gradient: bool,
    zero_rest: bool,
) -> None:
    """Write losses into `losses_N` and, with `gradient`, that of the logits over them, for the rows that have a label.

    The others become zeros with `zero_rest`, and else stay as they are.
    """
    rows, vocabulary = logits_CV.shape
    launch(
        _loss_kernel,
        (rows,),
        *(logits_CV, rows_C, labels_N, scale, losses_N, vocabulary),
        *(0 if scale is None or scale.ndim == 0 else scale.stride(0), *options),
        tile=tile("loss", "small" if vocabulary <= SMALL_VOCABULARY else "any", logits_CV.device),
        HAS_SCALE=scale is not None,
        SMOOTHING=options.label_smoothing != 0.0,
        SOFTCAP=options.softcap != 0.0,
        GRADIENT=gradient,
        ZERO_REST=zero_rest,
    )
