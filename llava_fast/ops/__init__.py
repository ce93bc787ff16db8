"""Operations of LLaVA-style models, each with a plain PyTorch reference and, for GPUs, fused kernels.

All are functions of tensors, differentiable unless documented otherwise, and work in `torch.compile(fullgraph=True)`.
`llava_fast.backend` chooses the implementation; see there how to request another.

    from llava_fast.ops import linear_cross_entropy, rms_norm, layer_norm, swiglu, gelu, quick_gelu

These names are loaded lazily. An operation that has the name of its module must be imported from the module
(`llava_fast.ops.rotary` is the module):

    from llava_fast.ops.attention import attention
    from llava_fast.ops.rotary import rotary
    from llava_fast.ops.projector import projector
    from llava_fast.ops.patch_embed import patch_embed
    from llava_fast.ops.merge import embed_merge, merge

One file or folder holds one operation: the public function, the reference, kernels, launchers, registration. What
several kernels share is in `_*.py`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The module of each public name.
_HOME = {
    "gelu": "activation",
    "layer_norm": "norm",
    "linear_cross_entropy": "loss",
    "quick_gelu": "activation",
    "rms_norm": "norm",
    "swiglu": "activation",
}

__all__ = ["gelu", "layer_norm", "linear_cross_entropy", "quick_gelu", "rms_norm", "swiglu"]

if TYPE_CHECKING:
    from llava_fast.ops.activation import gelu, quick_gelu, swiglu
    from llava_fast.ops.loss import linear_cross_entropy
    from llava_fast.ops.norm import layer_norm, rms_norm


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llava_fast.ops' has no attribute {name!r}")
    value = getattr(import_module(f"llava_fast.ops.{_HOME[name]}"), name)
    globals()[name] = value  # cached: the next look-up does not call __getattr__
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
