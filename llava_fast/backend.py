"""Which implementation of an operation runs here, and why.

Every operation registers its implementations by name ("reference", "triton", "cuda") and asks `choose`
for one at each call. What is asked for comes from `use_backend(...)`, else from the environment variable
`LLAVA_FAST_BACKEND`, else it is "auto": the first of triton, cuda, reference that supports the tensors.
An explicit request that cannot be met raises and says why; "auto" falls back and logs it once.

Only this file loads the compiled extension `llava_fast._cuda`.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "triton", "cuda")
ENVIRONMENT_VARIABLE = "LLAVA_FAST_BACKEND"

# What "auto" tries, in order. The CUDA twin of an operation goes before Triton only where a stored
# benchmark shows it ahead: its `supports` then says yes and Triton's says no for those shapes.
_PREFERENCE = ("triton", "cuda", "reference")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot run the operation here; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation. `supports(*tensors)` is True, or one line saying why not."""

    op: str
    name: str
    fn: Callable[..., Any]
    supports: Callable[..., Literal[True] | str] | None = None

    def refusal(self, tensors: tuple[Any, ...]) -> str:
        """Why these tensors cannot be taken here; an empty string when they can."""
        missing = unavailable(self.name)
        if missing or self.supports is None or not tensors:
            return missing
        answer = self.supports(*tensors)
        return "" if answer is True else answer or "the implementation does not support these tensors"


_registry: dict[str, dict[str, Implementation]] = {}
_requested: ContextVar[str | None] = ContextVar("llava_fast_backend", default=None)
_logged: set[tuple[str, str, str]] = set()


def register(
    op: str,
    name: str,
    fn: Callable[..., Any],
    supports: Callable[..., Literal[True] | str] | None = None,
) -> Callable[..., Any]:
    """Make `fn` the implementation of `op` on backend `name` and return it.

    `supports(*tensors)` gets the tensors handed to `choose` and returns True, or one line saying why
    not. A second registration under the same names is an error, unless it is the same function of a
    module that was reloaded.
    """
    if name not in _PREFERENCE:
        raise ValueError(f"backend {name!r} of operation {op!r} is not one of {', '.join(_PREFERENCE)}")
    known = _registry.setdefault(op, {}).get(name)
    if known and (known.fn.__module__, known.fn.__qualname__) != (fn.__module__, fn.__qualname__):
        raise ValueError(f"operation {op!r} already has a {name!r} implementation: {known.fn.__qualname__}")
    _registry[op][name] = Implementation(op, name, fn, supports)
    return fn


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; it must be one of {', '.join(BACKENDS)}")
    return name


def requested() -> str:
    """What is asked for here and now: "auto", "reference", "triton" or "cuda"."""
    name = _requested.get()
    if name is not None:
        return name
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for a backend by name inside a `with` block: auto, reference, triton or cuda.

    It holds for the current thread (or task) only. Set `LLAVA_FAST_BACKEND` for a whole process.
    """
    token = _requested.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def choose(op: str, *tensors: Any) -> Callable[..., Any]:
    """The implementation of `op` to call with these tensors.

    Raises `BackendUnavailable` when a backend was asked for by name and cannot take them, and
    `KeyError` for an operation that nobody registered.
    """
    return _choose(op, tensors)[0].fn


def _choose(op: str, tensors: tuple[Any, ...]) -> tuple[Implementation, str]:
    """The chosen implementation and the reason, in one line."""
    if op not in _registry:
        raise KeyError(f"no operation {op!r} is registered; known: {', '.join(sorted(_registry)) or 'none'}")
    implementations = _registry[op]
    name = requested()
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
        if refusal:
            passed_over.append(f"{candidate}: {refusal}")
            continue
        reason = "; ".join(passed_over) or (
            "first choice" if len(implementations) > 1 else "the only implementation"
        )
        if passed_over:
            _log_once(op, candidate, reason, tensors)
        return implementations[candidate], reason
    raise BackendUnavailable(f"no implementation of {op!r} can run: {'; '.join(passed_over)}")


def _log_once(op: str, name: str, reason: str, tensors: tuple[Any, ...]) -> None:
    if (op, name, reason) in _logged:
        return
    _logged.add((op, name, reason))
    # On a GPU a fallback costs speed that somebody expects; on a CPU it is the normal course.
    on_gpu = any(getattr(tensor, "is_cuda", False) for tensor in tensors)
    logger.log(logging.WARNING if on_gpu else logging.INFO, "%s runs on %s (%s)", op, name, reason)


def status() -> dict[str, dict[str, Any]]:
    """For every registered operation: the backend that would run here, why, and what else there is.

    `{"norm": {"backend": "reference", "reason": "...", "registered": ["reference"]}}`; `backend` is None
    when an explicit request cannot be met.
    """
    report = {}
    for op in sorted(_registry):
        try:
            implementation, reason = _choose(op, ())
            name: str | None = implementation.name
        except BackendUnavailable as error:
            name, reason = None, str(error)
        report[op] = {"backend": name, "reason": reason, "registered": list(_registry[op])}
    return report


@cache
def unavailable(name: str) -> str:
    """Why the backend cannot run anything on this machine; an empty string when it can."""
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return ""
        return _no_gpu()
    if name == "cuda":
        module, why = _load_extension()
        return why if module is None else _no_gpu()
    return ""


def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device is visible to PyTorch"


@cache
def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("llava_fast._cuda"), ""
    except ModuleNotFoundError as error:
        if error.name != "llava_fast._cuda":
            raise
        return None, "the CUDA extension is not built (LLAVA_FAST_CUDA=1 pip install .)"
    except ImportError as error:
        return None, f"the CUDA extension does not load: {error}"


def extension() -> ModuleType:
    """The compiled extension `llava_fast._cuda`; raises `BackendUnavailable` saying why there is none."""
    module, why = _load_extension()
    if module is None:
        raise BackendUnavailable(why)
    return module
