"""Chooses which implementation of an operation runs, and says why; `is_plain`: may an operation replace a module call?
`differentiated`, `observed`: must autograd, or a tracer, see an operation?

Every operation registers its implementations by name ("reference", "triton", "cuda") and asks `choose`
for one at each call. The requested name comes from `use_backend(...)`, else from the environment variable
`LLAVA_FAST_BACKEND`, else it is "auto": the first of triton, cuda, reference that supports the tensors.
An explicit request that cannot be met raises and says why; "auto" falls back and logs it once.

An operation may also have peers: other libraries that compute the same, each under its own name (`register_peer`). A
peer runs only if `use_backend(name, operation)` names both, or if the operation itself hands a call over to it
(attention does, see `ops/attention/plain.py`); "auto" and the environment variable never choose one.

The request is one plain global of the process. A ContextVar or a thread-local would be lost when autograd recomputes a
checkpointed forward (on CUDA in a thread of its own), and torch.compile cannot guard on either: it would refuse to
trace a ContextVar, and keep using a stale value of a thread-local.

Only this file loads the compiled extension `llava_fast._cuda`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "triton", "cuda")
ENVIRONMENT_VARIABLE = "LLAVA_FAST_BACKEND"

# What "auto" tries, in order. Where a stored benchmark shows the CUDA implementation of an operation to be faster,
# Triton's `supports` refuses those shapes.
_PREFERENCE = ("triton", "cuda", "reference")

Supports = Callable[..., bool | str]  # True, or one line saying why not


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot run the operation here; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation. `supports(*tensors)` is True, or one line saying why not.

    peer: for a peer, a function that says why it cannot run on this machine at all; an empty string if it can.
    """

    op: str
    name: str
    fn: Callable[..., Any]
    supports: Supports | None = None
    peer: Callable[[], str] | None = None

    def refusal(self, tensors: tuple[Any, ...]) -> str:
        """Why these tensors cannot be taken here; an empty string when they can."""
        missing = self.peer() if self.peer else unavailable(self.name)
        if missing or self.supports is None or not tensors:
            return missing
        answer = self.supports(*tensors)
        return "" if answer is True else str(answer or "the implementation does not support these tensors")


_registry: dict[str, dict[str, Implementation]] = {}
_lock = threading.Lock()
_entered: list[tuple[object, str, tuple[str, ...]]] = []  # the `use_backend` blocks that are open, oldest first
_environment = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
_request: dict[str | None, str] = {None: _environment}  # by operation; None: all other operations
# By operation: the implementation that the request prefers and this machine can run. Replaced after each new request.
_preferred: dict[str, Implementation] = {}
_logged: set[tuple[str, str, str]] = set()


def register(
    op: str,
    name: str,
    fn: Callable[..., Any],
    supports: Supports | None = None,
) -> Callable[..., Any]:
    """Make `fn` the implementation of `op` on backend `name` and return it.

    `supports(*tensors)` gets the tensors handed to `choose` and returns True, or one line saying why
    not. A second registration under the same names is an error, unless it is the same function of a
    module that was reloaded.
    """
    if name not in _PREFERENCE:
        raise ValueError(f"backend {name!r} of operation {op!r} is not one of {', '.join(_PREFERENCE)}")
    _add(Implementation(op, name, fn, supports))
    return fn


def register_peer(
    op: str,
    name: str,
    fn: Callable[..., Any],
    supports: Supports,
    missing: Callable[[], str],
) -> None:
    """Make `fn` an implementation of `op` that runs only when `use_backend(name, op)` asks for it.

    `missing()` returns why it cannot run on this machine at all, or an empty string; it is called only when the peer
    is requested or listed. `supports` and a second registration are as for `register`.
    """
    if name in BACKENDS:
        raise ValueError(f"peer {name!r} of operation {op!r} has the name of a backend of all operations")
    _add(Implementation(op, name, fn, supports, missing))


def _add(new: Implementation) -> None:
    known = _registry.setdefault(new.op, {}).get(new.name)
    if known and (known.fn.__module__, known.fn.__qualname__) != (new.fn.__module__, new.fn.__qualname__):
        raise ValueError(f"operation {new.op!r} already has a {new.name!r} implementation: {known.fn.__qualname__}")
    _registry[new.op][new.name] = new
    _preferred.pop(new.op, None)


def peers(op: str) -> dict[str, Implementation]:
    """What can be asked for with `use_backend(name, op)` beyond `BACKENDS`, by name."""
    return {name: implementation for name, implementation in _implementations(op).items() if implementation.peer}


def _checked(name: str, ops: tuple[str, ...]) -> str:
    if name in BACKENDS or (ops and all(name in peers(op) for op in ops)):
        return name
    own = "".join(f"; with operation {op!r} named also {', '.join(peers(op))}" for op in sorted(_registry) if peers(op))
    raise ValueError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}{own}")


def requested(op: str | None = None) -> str:
    """The requested backend, for `op` or in general: one of `BACKENDS`, or for `op` also one of its peers."""
    if op is not None and op in _request:
        return _request[op]
    if _request[None] not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {_request[None]!r}; it must be one of {', '.join(BACKENDS)}")
    return _request[None]


@contextmanager
def use_backend(name: str, *ops: str) -> Iterator[None]:
    """Ask for a backend by name inside a `with` block: auto, reference, triton or cuda.

    With names of operations, the request applies to them only, and may name one of their peers, as in
    `use_backend("flash_attn", "attention")`. `ValueError` for an unknown backend; `KeyError` for an operation that is
    not registered.
    It applies to the whole process (see the top of this file). Blocks may nest and may be open in several
    threads: the one entered last counts, and each block removes only its own request on exit.
    """
    for op in ops:
        _implementations(op)
    entry = (object(), _checked(name, ops), ops)
    with _lock:
        _entered.append(entry)
        _update_request()
    try:
        yield
    finally:
        with _lock:
            _entered.remove(entry)
            _update_request()


def _update_request() -> None:
    global _request, _preferred
    request: dict[str | None, str] = {None: _environment}
    for _, name, ops in _entered:
        request = {**request, **dict.fromkeys(ops, name)} if ops else {None: name}
    _request = request
    _preferred = {}  # after the request: `choose` reads them in the opposite order


def choose(op: str, *tensors: Any) -> Callable[..., Any]:
    """The implementation of `op` to call with these tensors.

    Raises `BackendUnavailable` when a backend was asked for by name and cannot take them, and
    `KeyError` for an operation that is not registered.
    """
    import torch

    if torch.autograd.forward_ad._current_level >= 0:
        return _differentiable(op, tensors).fn
    if torch.compiler.is_dynamo_compiling():  # it would guard on the table, and recompile when eager calls fill it
        return _choose(op, tensors)[0].fn
    if torch._C._are_functorch_transforms_active():
        return _differentiable(op, tensors).fn
    preferred = _preferred
    known = preferred.get(op)
    if known is not None and (known.supports is None or known.supports(*tensors) is True):
        return known.fn
    chosen = _choose(op, tensors)[0]
    if known is None and (first := _runnable(op)) is not None:
        preferred[op] = first
    return chosen.fn


def _differentiable(op: str, tensors: tuple[Any, ...]) -> Implementation:
    """For `torch.func` and forward-mode AD: kernels have no rules for them, and would silently lose tangents."""
    if requested(op) == "auto":
        return _implementations(op)["reference"]
    chosen = _choose(op, tensors)[0]
    if chosen.name in ("triton", "cuda"):
        reason = "its kernels have no rules for torch.func and forward-mode AD"
        raise BackendUnavailable(f"backend {chosen.name!r} was asked for, but cannot run {op!r}: {reason}")
    return chosen


def _runnable(op: str) -> Implementation | None:
    """What the request prefers of all that this machine can run; None if it is a peer: these can become unavailable."""
    name, implementations = requested(op), _registry[op]
    for candidate in _PREFERENCE if name == "auto" else (name,):
        found = implementations.get(candidate)
        if found is None or found.peer or unavailable(candidate):
            continue
        if not (name == "auto" and candidate == "triton" and interpreting()):
            return found
    return None


def _implementations(op: str) -> dict[str, Implementation]:
    if op not in _registry:
        raise KeyError(f"no operation {op!r} is registered; known: {', '.join(sorted(_registry)) or 'none'}")
    return _registry[op]


def _choose(op: str, tensors: tuple[Any, ...]) -> tuple[Implementation, str]:
    """The chosen implementation and the reason, in one line."""
    implementations = _implementations(op)
    name = requested(op)
    if name != "auto":
        if name not in implementations:
            raise BackendUnavailable(
                f"backend {name!r} was asked for, but operation {op!r} has only: {', '.join(implementations)}"
            )
        refusal = implementations[name].refusal(tensors)
        if refusal:
            raise BackendUnavailable(f"backend {name!r} was asked for, but cannot run {op!r}: {refusal}")
        return implementations[name], "asked for by name"

    passed_over = []
    for candidate in _PREFERENCE:
        if candidate not in implementations:
            continue
        refusal = implementations[candidate].refusal(tensors)
        if candidate == "triton" and not refusal and interpreting():
            refusal = "Triton's interpreter is slow, so it runs only what is asked for by name"
        if refusal:
            passed_over.append(f"{candidate}: {refusal}")
            continue
        reason = "; ".join(passed_over) or ("first choice" if len(implementations) > 1 else "the only implementation")
        if passed_over:
            _log_once(op, candidate, reason, tensors)
        return implementations[candidate], reason
    raise BackendUnavailable(f"no implementation of {op!r} can run: {'; '.join(passed_over)}")


def _log_once(op: str, name: str, reason: str, tensors: tuple[Any, ...]) -> None:
    import torch

    if torch.compiler.is_compiling() or (op, name, reason) in _logged:
        return
    _logged.add((op, name, reason))
    # On a GPU a fallback is unexpectedly slow, so it is a warning; on a CPU it is normal.
    on_gpu = any(getattr(tensor, "is_cuda", False) for tensor in tensors)
    logger.log(logging.WARNING if on_gpu else logging.INFO, "%s runs on %s (%s)", op, name, reason)


def status() -> dict[str, dict[str, Any]]:
    """For every registered operation: the backend that would run here, the reason, and the alternatives.

    `{"norm": {"backend": "reference", "reason": "...", "registered": ["reference"], "peers": {}}}`; `backend` is
    None when an explicit request cannot be met. Peers by name: "available", or why not.
    """
    report = {}
    for op in sorted(_registry):
        try:
            implementation, reason = _choose(op, ())
            name: str | None = implementation.name
        except BackendUnavailable as error:
            name, reason = None, str(error)
        of_op = {name: peer.refusal(()) or "available" for name, peer in peers(op).items()}
        registered = [other for other in _registry[op] if other not in of_op]
        report[op] = {"backend": name, "reason": reason, "registered": registered, "peers": of_op}
    return report


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1): for tests."""
    return _INTERPRETED


def unavailable(name: str) -> str:
    """Why the backend cannot run anything on this machine; an empty string when it can."""
    if name == "reference":
        return ""
    if name == "triton":
        if not _HAS_TRITON:
            return "triton is not installed"
        if interpreting():
            return ""
    if name == "cuda" and _extension is None:
        return _extension_error
    return _no_gpu()


def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "PyTorch sees no CUDA device"


def differentiated(*tensors: Any) -> bool:
    """Whether autograd records operations on these tensors (or None)."""
    import torch

    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def observed(*tensors: Any) -> bool:
    """Whether an operation on these tensors (or None) must be called as a registered operator: for autograd, tracing,
    a dispatch mode or a subclass of tensors. Otherwise its kernel is launched directly: 40 to 60 µs less."""
    import torch

    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return True
    known, recording = (torch.Tensor, torch.nn.Parameter), torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (type(x) not in known or (recording and x.requires_grad)):
            return True
    return False


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does exactly what class `kind` does, so that a fused operation may read its parameters
    instead of calling it.

    False for a replacement by PEFT or a quantiser (another class, or parameters that are tensor subclasses), for a
    module with hooks (ZeRO-3 gathers parameters in one, accelerate moves them, PEFT marks embeddings), and for a module
    whose `forward` was replaced.
    """
    import torch

    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    known = torch.nn.Parameter, torch.Tensor, type(None)
    for parameter in module._parameters.values():
        if type(parameter) not in known:
            return False
    return True


def _load_extension() -> tuple[ModuleType | None, bool, str]:
    """The module or None; whether it is built at all; why it could not be loaded.

    A driver runs programs of its own CUDA major version and of older ones; others fail at their first launch.
    """
    try:
        module = importlib.import_module("llava_fast._cuda")
    except ModuleNotFoundError as error:
        if error.name != "llava_fast._cuda":
            raise
        return None, False, "the CUDA extension is not built (LLAVA_FAST_CUDA=1 pip install .)"
    except ImportError as error:
        return None, True, f"the CUDA extension does not load: {error}"
    runtime, driver = module.versions()
    if driver and runtime // 1000 > driver // 1000:
        built, newest = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
        reason = f"the CUDA extension was built with CUDA {built}, but the driver supports no more than {newest}"
        logger.warning("%s; operations run without it", reason)
        return None, True, reason
    return module, True, ""


def extension() -> ModuleType:
    """The compiled extension `llava_fast._cuda`; raises `BackendUnavailable` saying why there is none."""
    if _extension is None:
        raise BackendUnavailable(_extension_error)
    return _extension


def extension_status() -> dict[str, Any]:
    """Whether the extension is built and loads; its architectures, the devices it finds; `reason`: what is wrong."""
    report: dict[str, Any] = {"built": _extension_built, "loaded": _extension is not None}
    if _extension is None:
        return {**report, "reason": _extension_error}
    report["architectures"] = list(_extension.compiled_architectures())
    try:
        return {**report, "devices": _extension.device_count()}
    except RuntimeError as error:
        return {**report, "devices": 0, "reason": f"the CUDA extension finds no device: {error}"}


# Evaluated once, at import, so that `choose` contains only look-ups, which torch.compile can trace.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_extension, _extension_built, _extension_error = _load_extension()
