"""Whether a child's parameters may be read, and its work done, without calling it."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does with its parameters, and nothing more.

    False for what PEFT or a quantiser has put in its place (another class, or parameters that are no plain tensors),
    for a module with hooks (ZeRO-3 gathers parameters in one, accelerate moves them, PEFT marks embeddings), and for
    one with a `forward` of its own.
    """
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return all(p is None or type(p) in (nn.Parameter, torch.Tensor) for p in module._parameters.values())


def is_plain_lookup(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether `module` is an embedding that only looks rows up."""
    return is_plain(module, nn.Embedding) and not (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    )
