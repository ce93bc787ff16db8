"""CUDA graphs of tower and projector: at inference on few images, kernel launches take longer than the kernels.

The first call with a shape runs without a graph, the second captures one. A graph reads parameters at the addresses of
its capture, so all graphs are dropped if a parameter has moved. A graph cannot run hooks or replaced modules, so a
model that has any gets no graph.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from llava_fast.backend import is_plain, requested

logger = logging.getLogger(__name__)

Function = Callable[[torch.Tensor], torch.Tensor]

# With more images the GPU is busy for longer with each kernel than a launch takes.
MOST_IMAGES = 8
SHAPES = 4
OPERATIONS = ("patch_embed", "layer_norm", "attention", "quick_gelu", "gelu", "projector")


class VisionGraphs:
    """CUDA graphs of a function of images, one per shape; an LRU cache of `SHAPES` entries."""

    def __init__(self, capture: Callable[[Function, torch.Tensor], Function] | None = None):
        self._capture = capture or capture_graph
        self._replays: OrderedDict[Any, Function | None] = OrderedDict()  # None: seen once
        self._modules: list[nn.Module] = []
        self._state: list[int] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple]:
        """Graphs are not copied or pickled with the model; the copy captures its own."""
        return type(self), (self._capture,)

    def __len__(self) -> int:
        return len(self._replays)

    def __call__(
        self, function: Function, pixels: torch.Tensor, modules: Sequence[nn.Module], *settings: Any
    ) -> torch.Tensor:
        """function(pixels), replayed from a CUDA graph if there is one.

        Args:
            function: its result depends on the pixels, the parameters of `modules` and `settings` only.
            settings: hashable; with shape, dtype, device and backends they are the key of the graph.

        Returns:
            A tensor that no later call writes to.
        """
        if not wanted(pixels, modules):
            return function(pixels)
        backends = tuple(requested(op) for op in OPERATIONS)
        key = (pixels.shape, pixels.dtype, pixels.device, backends, settings)
        with self._lock:
            if not self._unchanged(modules):
                return function(pixels)
            if key not in self._replays:
                self._replays[key] = None
                if len(self._replays) > SHAPES:
                    self._replays.popitem(last=False)
                return function(pixels)
            self._replays.move_to_end(key)
            replay = self._replays[key]
            if replay is None:
                try:
                    replay = self._capture(function, pixels)
                except RuntimeError as error:
                    logger.warning("the vision tower runs without a CUDA graph: %s", str(error).split("\n")[0])
                    replay = function
                self._replays[key] = replay
            return replay(pixels)

    def _unchanged(self, roots: Sequence[nn.Module]) -> bool:
        """Drop all graphs if modules or parameters have changed; True if these modules can be captured."""
        if self._state is None or state(self._modules) != self._state or self._modules[: len(roots)] != list(roots):
            self._replays.clear()
            below = [module for root in roots for module in root.modules() if module is not root]
            self._modules = [*roots, *below]
            self._state = state(self._modules) if all(map(capturable, self._modules)) else None
        return self._state is not None


def wanted(pixels: torch.Tensor, modules: Sequence[nn.Module]) -> bool:
    """Whether a graph may be used: inference on few images on a GPU, outside of autocast, torch.compile and capture."""
    return (
        pixels.is_cuda
        and 0 < pixels.shape[0] <= MOST_IMAGES
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not any(module.training for module in modules)
        and not torch.is_autocast_enabled("cuda")
        and not torch.cuda.is_current_stream_capturing()
    )


def capturable(module: nn.Module) -> bool:
    """Whether a module's class is from this library, PyTorch or transformers' activations, and it has no hooks."""
    kind = type(module)
    known = ("llava_fast.", "torch.nn.modules.", "transformers.activations")
    return kind.__module__.startswith(known) and is_plain(module, kind)


def state(modules: Sequence[nn.Module]) -> list[int]:
    """Changes when a parameter moves in memory, a module is replaced, or a hook or a `forward` is added."""
    return [
        *(id(child) for module in modules for child in module._modules.values()),
        *(t.data_ptr() for module in modules for t in module._parameters.values() if t is not None),
        *(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m.__dict__) for m in modules),
    ]


def capture_graph(function: Function, pixels: torch.Tensor) -> Function:
    """Capture `function` for pixels of this shape; the graph has its own input and output buffers."""
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(pixels.device):
        given = torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device)
        given.copy_(pixels)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(given)  # warm-up: kernels are compiled and workspaces allocated before capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may use the GPU during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function(given)

    done = torch.cuda.Event()

    def replay(pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(pixels.device):
            done.wait()  # the previous call, perhaps on another stream, uses the same buffers
            given.copy_(pixels)
            graph.replay()
            copy = result.clone()
            done.record()
            return copy

    return replay
