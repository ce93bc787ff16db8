"""Linear layers with the same input, computed in one GEMM at inference.

From `eval()` until `train()` or `state_dict()` the weights are contiguous in one storage, and so are the biases; the
layers' parameters are views of it. The layers are called one by one if they are wrapped or hooked, if their parameters
are views of another buffer (such as a sharded optimiser's), or under torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from llava_fast.backend import is_plain


def _adjoining(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensors as one view, if they follow each other without gaps in one storage; else None."""
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
    """A state dict must not share storage: safetensors refuses it, and accelerate would save only one of the layers."""
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
            self._join()  # `fn` has moved or converted each parameter separately
        return self

    def project(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """The outputs of the layers, in the order of `joins`. Not for training: weights get no gradient."""
        joined = None if torch.compiler.is_compiling() else self._joined()
        if joined is None:
            return [layer(x) for layer in self._layers()]
        return F.linear(x, *joined).split([layer.out_features for layer in self._layers()], dim=-1)

    def _layers(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.joins]

    def _parameters_of(self, name: str) -> list[torch.Tensor]:
        return [getattr(layer, name) for layer in self._layers()]

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The joined weight and bias, if the parameters are adjoining and no layer is wrapped or hooked; else None."""
        if not all(is_plain(layer, nn.Linear) for layer in self._layers()):
            return None
        weight, bias = _adjoining(self._parameters_of("weight")), _adjoining(self._parameters_of("bias"))
        return None if weight is None or bias is None else (weight, bias)

    def _join(self) -> None:
        """Move the layers' parameters into one storage, unless one of them is a view of a larger storage, such as the
        flat buffer of a sharded optimiser."""
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
        """Give each parameter a storage of its own again; training and saving expect that."""
        if self._joined() is not None:
            with torch.inference_mode(False):
                for parameter in [*self._parameters_of("weight"), *self._parameters_of("bias")]:
                    parameter.data = parameter.data.clone()
