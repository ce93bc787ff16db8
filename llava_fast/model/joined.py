"""Linear layers with the same input: computed in one GEMM at inference; in training their input can be recomputed.

From `eval()` until `train()` or `state_dict()` the weights are contiguous in one storage, and so are the biases; the
layers' parameters are views of it. The layers are called one by one with gradients, under torch.compile, if autocast
converts their weights, if they are wrapped or hooked, or if their parameters are views of another buffer (such as a
sharded optimiser's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from llava_fast.backend import is_plain

NOTHING = nullcontext()


def heads(x_BTD: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A view [B, T, H, d]."""
    batch, tokens, width = x_BTD.shape
    return x_BTD.view(batch, tokens, width // head_dim, head_dim)


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


class _Joined:
    """The joined weight and bias (None without biases) of some layers, valid while `holds`."""

    def __init__(self, layers: dict[str, nn.Linear], weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight, bias
        self.widths = [layer.out_features for layer in layers.values()]
        self._layers = [(*item, item[1]._parameters, item[1].weight, item[1].bias) for item in layers.items()]
        self._places = self._pointers()

    def _pointers(self) -> list[int]:
        return [x.data_ptr() for *_, weight, bias in self._layers for x in (weight, bias) if x is not None]

    def holds(self, modules: dict[str, nn.Module | None]) -> bool:
        """Whether no layer was replaced or hooked, and no parameter replaced or moved."""
        for name, layer, parameters, weight, bias in self._layers:
            if modules[name] is not layer or parameters["weight"] is not weight or parameters["bias"] is not bias:
                return False
            if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
                return False
        return self._pointers() == self._places


class JoinedLinears(nn.Module):
    """A module whose children named in `joins` are linear layers that read one input."""

    joins: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._kept: _Joined | None = None
        self._numels: list[int] = []  # of the storages that `_join` made
        self.register_state_dict_pre_hook(_separate)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy has other parameters

    def train(self, mode: bool = True) -> JoinedLinears:
        super().train(mode)
        if mode:
            self._separate()
        else:
            self._join()
        return self

    def _apply(self, fn, recurse: bool = True) -> JoinedLinears:
        joined, self._kept = self._joined() is not None, None
        super()._apply(fn, recurse)
        if joined:
            self._join()  # `fn` has moved or converted each parameter separately
        return self

    def project(self, x: torch.Tensor, head_dim: int | None = None) -> Sequence[torch.Tensor]:
        """The outputs of the layers, in the order of `joins`; from one GEMM they are views of its result. With
        `head_dim`, of x [B, T, D]: as heads, [B, T, H, d]."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or (joined := self._joined_for(x)) is None:
            outputs = [layer(x) for layer in self._layers().values()]
            return outputs if head_dim is None else [heads(y, head_dim) for y in outputs]
        y = F.linear(x, joined.weight, joined.bias)
        if head_dim is None:
            return y.split_with_sizes(joined.widths, -1)
        return heads(y, head_dim).split_with_sizes([width // head_dim for width in joined.widths], 2)

    def _layers(self) -> dict[str, nn.Linear]:
        return {name: getattr(self, name) for name in self.joins}

    def _joined(self) -> _Joined | None:
        """The joined parameters, if they are adjoining and no layer is wrapped or hooked; else None."""
        if self._kept is None or not self._kept.holds(self._modules):
            self._kept = self._found()
        return self._kept

    def _joined_for(self, x: torch.Tensor) -> _Joined | None:
        joined = self._joined()
        if joined is not None and joined.weight.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
            return None  # autocast keeps its copies of parameters; it would copy a view of them at each call
        return joined

    def _found(self) -> _Joined | None:
        layers = self._layers()
        if torch._C._are_functorch_transforms_active():  # parameters that vmap made have no address
            return None
        if not all(is_plain(layer, nn.Linear) for layer in layers.values()):
            return None
        weight = _adjoining([layer.weight for layer in layers.values()])
        biases = [layer.bias for layer in layers.values() if layer.bias is not None]
        bias = _adjoining(biases) if biases else None
        if weight is None or (biases and (bias is None or len(biases) < len(layers))):
            return None
        return _Joined(layers, weight, bias)

    def _join(self) -> None:
        """Move the layers' parameters into one storage, unless one of them is a view of a larger storage, such as the
        flat buffer of a sharded optimiser."""
        layers = list(self._layers().values())
        if self._joined() is not None or not all(is_plain(layer, nn.Linear) for layer in layers):
            return
        self._separate()  # some may share a storage of ours, which others have left
        kinds = [[getattr(layer, kind) for layer in layers] for kind in ("weight", "bias")]
        kinds = [tensors for tensors in kinds if tensors != [None] * len(layers)]
        everything = [t for tensors in kinds for t in tensors]
        if any(t is None for t in everything):  # some layers have a bias, others none
            return
        if len({(t.dtype, t.device) for t in everything}) > 1 or everything[0].device.type == "meta":
            return
        if any(t.untyped_storage().nbytes() != t.nbytes or not t.is_contiguous() for t in everything):
            return
        self._numels = [sum(t.numel() for t in tensors) for tensors in kinds]
        for tensors in kinds:
            with torch.inference_mode(False), torch.no_grad():
                views = torch.cat([t.detach() for t in tensors]).split([t.shape[0] for t in tensors])
            for tensor, view in zip(tensors, views, strict=True):
                tensor.data = view

    def _separate(self) -> None:
        """Give each parameter a storage of its own again, also if a layer was wrapped, or another one given a new
        parameter since; training and saving expect that."""
        self._kept = None
        for parameter in nn.ModuleList(self._layers().values()).parameters():
            if type(parameter) is nn.Parameter and parameter.device.type != "meta":
                # A storage of another size is another's, such as a sharded optimiser's.
                whole = parameter.untyped_storage().nbytes()
                if whole > parameter.nbytes and whole in [n * parameter.element_size() for n in self._numels]:
                    with torch.inference_mode(False):
                        parameter.data = parameter.data.clone()


# Backward recomputes two tensors instead of saving them: the normalised input of a layer, and the product of SwiGLU.
# The linear layers that read them would save them (for dW, or for LoRA), but both are point-wise functions of tensors
# that autograd saves anyway. This frees 2 D + I of 6 D + 3 I numbers per token and layer (D width, I intermediate size
# of the MLP): 41 % at LLaVA-1.5-7B's sizes when all parameters are trained.


def recomputed(tensor: torch.Tensor, make: Callable[[], torch.Tensor] | None) -> AbstractContextManager[Any]:
    """A context for linear layers that read `tensor`: they do not save it; backward recomputes it by `make()`.

    Args:
        tensor: contiguous.
        make: recomputes `tensor`, bit for bit, from tensors that are saved anyway. With None the context does nothing.

    It also does nothing under torch.compile, which decides itself what to save, and inside other saved-tensor hooks:
    activation checkpointing and offloading use them to free tensors, which `make` would keep alive.
    """
    if make is None or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not tensor.is_contiguous():
        return NOTHING
    if type(tensor) is not torch.Tensor:  # a DTensor has no data pointer to compare
        return NOTHING
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if outer is not None and not isinstance(getattr(outer[0], "__self__", None), _Remake):
        return NOTHING
    remake = _Remake(tensor, make)
    return torch.autograd.graph.saved_tensors_hooks(remake.pack, remake.unpack)


class _Remake:
    """Saved-tensor hooks for one tensor: the recomputed tensor is freed after the last linear layer has unpacked it."""

    def __init__(self, tensor: torch.Tensor, make: Callable[[], torch.Tensor]):
        self.pointer, self.numel, self.dtype = tensor.data_ptr(), tensor.numel(), tensor.dtype
        self.make, self.readers, self.waiting = make, 0, 0
        self.made: torch.Tensor | None = None
        device = tensor.device.type
        # Backward runs outside of autocast; without restoring it, `make` would round differently.
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def pack(self, saved: torch.Tensor) -> torch.Tensor | tuple[torch.Size, tuple[int, ...]]:
        same = (saved.data_ptr(), saved.numel(), saved.dtype) == (self.pointer, self.numel, self.dtype)
        if not same or self.numel == 0:
            return saved
        self.readers += 1
        return saved.shape, saved.stride()

    def unpack(self, packed: torch.Tensor | tuple[torch.Size, tuple[int, ...]]) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        made = self.made
        if made is None:
            device, dtype, enabled = self.autocast
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                made, self.waiting = self.make(), self.readers
        self.waiting -= 1
        self.made = made if self.waiting else None
        return made.as_strided(*packed)
