"""The multi-modal projector: linear layers with exact GELU between them.

    h_0 = x;   h_{i+1} = h_i · W_iᵀ + b_i, with GELU before every layer but the first     (LLaVA-1.5: two layers)

No layers at all is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, register


def projector_reference(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(F.gelu(x) if i else x, weight, bias)
    return x


register("projector", "reference", projector_reference)


def projector(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Project vision features into the language model's embedding space.

    Args:
        x: [..., D_in].
        weights: per layer [D_out, D_in].
        biases: per layer [D_out] or None.

    Returns:
        [..., D_out] of the last layer.
    """
    return choose("projector", x, *weights)(x, weights, biases)
