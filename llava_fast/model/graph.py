"""CUDA graphs of tower and projector: at inference on few images, kernel launches take longer than the kernels.

The first call with a shape captures a graph: one pass to warm up, and one that is recorded. Later calls replay it. A
graph reads parameters at the addresses of its capture, so all graphs are dropped if a parameter has moved; `train()`
drops them for the sake of memory. A graph cannot run hooks or replaced modules, so a model that has any gets no graph.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map

from llava_fast.backend import is_plain, observed, requested

logger = logging.getLogger(__name__)

T = TypeVar("T")  # a tree of tensors: tuples, lists and dicts of them
Replay = Callable[[torch.Tensor], Any]

# With more images the GPU is busy for longer with each kernel than a launch takes.
MOST_IMAGES = 8
# Every number of images has its graph: shapes that drop each other in turn would be captured at each call.
SHAPES = MOST_IMAGES
OPERATIONS = ("patch_embed", "layer_norm", "attention", "quick_gelu", "gelu", "projector")


class VisionGraphs:
    """CUDA graphs of a function of images, one per shape.

    Attributes:
        replays: an LRU cache of `SHAPES` graphs; `clear()` frees their memory.
    """

    def __init__(self, capture: Callable[[Replay, torch.Tensor], Replay] | None = None):
        self._capture = capture or capture_graph
        self.replays: OrderedDict[Any, Replay] = OrderedDict()
        self._state: State | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple]:
        """Graphs are not copied or pickled with the model; the copy captures its own."""
        return type(self), (self._capture,)

    def __len__(self) -> int:
        return len(self.replays)

    def __call__(
        self, function: Callable[..., T], pixels: torch.Tensor, modules: Sequence[nn.Module], *settings: Any
    ) -> T:
        """function(pixels, *settings), replayed from a CUDA graph where one can be used.

        Args:
            function: its results depend on the pixels, the parameters of `modules` and `settings` only.
            settings: hashable; with shape, dtype, device and backends they are the key of the graph.

        Returns:
            Tensors that no later call writes to.
        """
        if wanted(pixels, modules):
            backends = tuple(requested(op) for op in OPERATIONS)
            key = (pixels.shape, pixels.dtype, pixels.device, backends, settings)
            with self._lock:
                if self._capturable(modules):
                    return self._replay(key, lambda pixels: function(pixels, *settings), pixels)(pixels)
        return function(pixels, *settings)

    def _replay(self, key: Any, function: Replay, pixels: torch.Tensor) -> Replay:
        """The graph of this key, captured if there is none; `function` itself if it cannot be captured."""
        replay = self.replays.pop(key, None)
        if replay is None:
            try:
                replay = self._capture(function, pixels)
            except RuntimeError as error:
                logger.warning("the vision tower runs without a CUDA graph: %s", str(error).split("\n")[0])
                replay = function
            if len(self.replays) == SHAPES:
                self.replays.popitem(last=False)
        self.replays[key] = replay
        return replay

    def _capturable(self, roots: Sequence[nn.Module]) -> bool:
        """Whether these modules can be captured; drops all graphs if modules or parameters have changed."""
        if self._state is None or not self._state.unchanged(roots):
            self.replays.clear()
            fit = all(capturable(module) for root in roots for module in root.modules())
            self._state = State(roots) if fit else None
        return self._state is not None


class State:
    """Where modules have their parameters, children and hooks: read once, then compared at each call, without a loop
    over modules in Python."""

    def __init__(self, roots: Sequence[nn.Module]):
        modules = [module for root in roots for module in root.modules()]
        self._roots = list(roots)
        self._parameters = [module._parameters for module in modules]
        self._children = [module._modules for module in modules]
        self._sizes = [x for m in modules for x in (m._forward_hooks, m._forward_pre_hooks, m.__dict__)]
        self._found = self._read()

    def unchanged(self, roots: Sequence[nn.Module]) -> bool:
        """False if a parameter has moved in memory, a module was replaced, or a hook or a `forward` added."""
        return self._roots == list(roots) and self._found == self._read()

    def _read(self) -> tuple[list[int], list[nn.Module | None], list[int]]:
        parameters = chain.from_iterable(map(dict.values, self._parameters))
        return (
            [x.data_ptr() for x in parameters if x is not None],
            list(chain.from_iterable(map(dict.values, self._children))),
            list(map(len, self._sizes)),
        )


def wanted(pixels: torch.Tensor, modules: Sequence[nn.Module]) -> bool:
    """Whether a graph may be used: inference on few images on a GPU, outside of autocast and capture, and with nobody
    watching the operators (torch.compile, a dispatch mode)."""
    return (
        pixels.is_cuda
        and 0 < pixels.shape[0] <= MOST_IMAGES
        and not torch.is_grad_enabled()
        and not observed()
        and not any(module.training for module in modules)
        and not torch.is_autocast_enabled("cuda")
        and not torch.cuda.is_current_stream_capturing()
    )


def capturable(module: nn.Module) -> bool:
    """Whether a module's class is from this library, PyTorch or transformers' activations, and it has no hooks."""
    kind = type(module)
    known = ("llava_fast.", "torch.nn.modules.", "transformers.activations")
    return kind.__module__.startswith(known) and is_plain(module, kind)


def capture_graph(function: Replay, pixels: torch.Tensor) -> Replay:
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
            results = function(given)

    done = torch.cuda.Event()

    def replay(pixels: torch.Tensor) -> Any:
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(pixels.device):
            done.wait()  # the previous call, perhaps on another stream, uses the same buffers
            given.copy_(pixels)
            graph.replay()
            copies = tree_map(torch.clone, results)
            done.record()
            return copies

    return replay
