"""Point-wise activations of the two MLPs.

swiglu(gate, up) = gate * sigmoid(gate) * up          (Shazeer 2020; Llama)
quick_gelu(x)    = x * sigmoid(1.702 x)               (CLIP)
gelu(x)          = x * (1 + erf(x / sqrt(2))) / 2     (Hendrycks & Gimpel 2016, exact; LLaVA's projector)
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, register


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def quick_gelu_reference(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


register("swiglu", "reference", swiglu_reference)
register("quick_gelu", "reference", quick_gelu_reference)
register("gelu", "reference", gelu_reference)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU product of two tensors of one shape and dtype."""
    return choose("swiglu", gate, up)(gate, up)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's sigmoid approximation of GELU, any shape."""
    return choose("quick_gelu", x)(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Exact (erf) GELU, any shape."""
    return choose("gelu", x)(x)
