"""Linear layers that read one input, computed in one product at inference.

From `eval()` until `train()` or `state_dict()` their weights lie one behind the other in one storage, and so do their
biases; each layer keeps its parameters, which are views of it. Where somebody else has a say in where they lie (a
wrapper, hooks, a sharded optimiser, a compiler) the layers are called one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from llava_fast.backend import is_plain


def _adjoining(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensors as one, if they lie one behind the other in one storage."""
    first = tensors[0]
    place = first.data_ptr()
    for x in tensors:
        alike = x.dtype == first.dtype and x.shape[1:] == first.shape[1:] and x.is_contiguous()
        if not alike or x.data_ptr() != place or not x.nbytes:
            return None
        place += x.nbytes
    begins, size = first.storage_offset() * first.element_size(), sum(x.nbytes for x in tensors)
    if first.untyped_storage().nbytes() < begins + size:
        return None
    return first.detach().as_strided((sum(x.shape[0] for x in tensors), *first.shape[1:]), first.stride())


def _separate(module: JoinedLinears, *_) -> None:
    """A state dict has no shared storage: safetensors refuses it, and accelerate would leave all but one layer out."""
    module._separate()


class JoinedLinears(nn.Module):
    """A module whose children named in `joins` are linear layers with biases that read one input."""

    joins: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_pre_hook(_separate)

    def train(self, mode: bool = True) -> JoinedLinears:
        super().train(mode)
        if mode:
            self._separate()
        else:
            self._join()
        return self

    def _apply(self, fn, recurse: bool = True) -> JoinedLinears:
        joined = self._joined() is not None
        super()._apply(fn, recurse)
        if joined:
            self._join()  # what was moved or converted was so one by one
        return self

    def project(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """The outputs of the layers, in the order of `joins`. Their weights get no gradient."""
        joined = None if torch.compiler.is_compiling() else self._joined()
        if joined is None:
            return [layer(x) for layer in self._layers()]
        return F.linear(x, *joined).split([layer.out_features for layer in self._layers()], dim=-1)

    def _layers(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.joins]

    def _parameters_of(self, name: str) -> list[torch.Tensor]:
        return [getattr(layer, name) for layer in self._layers()]

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight and bias of all layers, if theirs lie so and nobody has wrapped them."""
        if not all(is_plain(layer, nn.Linear) for layer in self._layers()):
            return None
        weight, bias = _adjoining(self._parameters_of("weight")), _adjoining(self._parameters_of("bias"))
        return None if weight is None or bias is None else (weight, bias)

    def _join(self) -> None:
        """Give the layers' parameters one storage, where nobody else has a say in where they lie.

        What is not the whole of its storage belongs to somebody, such as the flat buffer of a sharded optimiser.
        """
        if self._joined() is not None or not all(is_plain(layer, nn.Linear) for layer in self._layers()):
            return
        everything = [*self._parameters_of("weight"), *self._parameters_of("bias")]
        if len({(t.dtype, t.device) for t in everything}) > 1 or everything[0].device.type == "meta":
            return
        if any(t.untyped_storage().nbytes() != t.nbytes or not t.is_contiguous() for t in everything):
            return
        for name in ("weight", "bias"):
            tensors = self._parameters_of(name)
            with torch.inference_mode(False), torch.no_grad():
                views = torch.cat([t.detach() for t in tensors]).split([t.shape[0] for t in tensors])
            for tensor, view in zip(tensors, views, strict=True):
                tensor.data = view

    def _separate(self) -> None:
        """Give each layer a storage of its own again: a trained parameter is nobody's view."""
        if self._joined() is not None:
            with torch.inference_mode(False):
                for parameter in [*self._parameters_of("weight"), *self._parameters_of("bias")]:
                    parameter.data = parameter.data.clone()
