"""llava-fast: LLaVA with the same weights, logits and checkpoints, built to be fast.

Public names are imported on first use, so that `import llava_fast` is fast and loads neither CUDA nor
a compiler.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The module of each public name; it is imported at the first access.
_HOME = {
    "LlavaConfig": "llava_fast.model.llava",
    "LlavaForConditionalGeneration": "llava_fast.drop_in",
    "LlavaModel": "llava_fast.drop_in",
    "LlavaProcessor": "llava_fast.processor.processor",
    "attention": "llava_fast.ops.attention",
    "register": "llava_fast.auto",
    "register_attention": "llava_fast.attention_interface",
    "use_backend": "llava_fast.backend",
}

__all__ = [
    "LlavaConfig",
    "LlavaForConditionalGeneration",
    "LlavaModel",
    "LlavaProcessor",
    "__version__",
    "attention",
    "register",
    "register_attention",
    "use_backend",
]

if TYPE_CHECKING:
    from llava_fast.attention_interface import register_attention
    from llava_fast.auto import register
    from llava_fast.backend import use_backend
    from llava_fast.drop_in import LlavaForConditionalGeneration, LlavaModel
    from llava_fast.model.llava import LlavaConfig
    from llava_fast.ops.attention import attention
    from llava_fast.processor import LlavaProcessor


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llava_fast' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # cached: the next look-up does not call __getattr__
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
