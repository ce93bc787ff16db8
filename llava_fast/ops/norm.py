"""RMSNorm and LayerNorm over the last dimension, each with an optional residual add in front.

    s = x + residual                       (only with a residual; s is returned too: it is the new residual)
    rms_norm(s)   = weight * s / sqrt(mean(s²) + eps)                        Zhang & Sennrich 2019
    layer_norm(s) = weight * (s - mean(s)) / sqrt(var(s) + eps) + bias       Ba et al. 2016

Statistics are float32 whatever the dtype. The RMS-normalised value is rounded to the input dtype before it is
multiplied by the weight, as transformers' LlamaRMSNorm does.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, register


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is not None:
        x = residual + x
    x32 = x.float()
    y = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype), x


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is not None:
        x = residual + x
    return F.layer_norm(x, weight.shape, weight, bias, eps), x


register("rms_norm", "reference", rms_norm_reference)
register("layer_norm", "reference", layer_norm_reference)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of `x` (+ `residual`).

    Args:
        x: [..., D], any floating dtype.
        weight: [D].
        eps: added to the mean square.
        residual: [..., D], added to `x` first.

    Returns:
        The normalised [..., D] in the dtype of `x`, and the sum that was normalised (`x` itself without a residual).
    """
    return choose("rms_norm", x, weight)(x, weight, eps, residual)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of `x` (+ `residual`); arguments and results as for `rms_norm`, with a `bias` [D]."""
    return choose("layer_norm", x, weight)(x, weight, bias, eps, residual)
