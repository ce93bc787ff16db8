"""Operations of LLaVA-style models: each a plain PyTorch reference and, where there is a GPU, a fused kernel.

All are functions of tensors, differentiable unless they say otherwise, and traced by `torch.compile(fullgraph=True)`.
`llava_fast.backend` says which implementation runs, and how to ask for another.

    from llava_fast.ops import linear_cross_entropy, rms_norm, layer_norm, swiglu, gelu, quick_gelu

These names load when they are first used. An operation whose file or folder has the same name is imported from there,
as `llava_fast.ops.rotary` is the module:

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

# Where each public name lives.
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
    globals()[name] = value  # the next look-up finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
