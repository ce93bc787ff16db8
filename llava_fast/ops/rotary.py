"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama.

    rotate(x)[i]       = x[i] * cos[i] - x[i + d/2] * sin[i]            for i < d/2
    rotate(x)[i + d/2] = x[i + d/2] * cos[i + d/2] + x[i] * sin[i + d/2]

Shapes: B batch, T tokens, H heads, d head dimension.
"""

from __future__ import annotations

import torch

from llava_fast.backend import choose, register


def rotary_reference(
    q_BTHd: torch.Tensor, k_BTHd: torch.Tensor, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_BTd.unsqueeze(-2), sin_BTd.unsqueeze(-2)
    return _rotate(q_BTHd, cos, sin), _rotate(k_BTHd, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


register("rotary", "reference", rotary_reference)


def rotary(
    q_BTHd: torch.Tensor, k_BTHd: torch.Tensor, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by the angles of their positions.

    Args:
        q_BTHd, k_BTHd: queries and keys; the number of heads may differ (GQA).
        cos_BTd, sin_BTd: cosines and sines per token, both halves of d filled; B may be 1.

    Returns:
        The rotated queries and keys, new tensors of the same shapes and dtypes.
    """
    return choose("rotary", q_BTHd, k_BTHd)(q_BTHd, k_BTHd, cos_BTd, sin_BTd)
