"""What every kernel is tested with, in Triton's interpreter on a CPU and, the same cases, on a GPU.

A kernel is asked for by name and must have been launched; memory it does not write is NaN; and its error against
float64, outputs and gradients alike, is at most twice that of PyTorch in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from llava_fast.backend import use_backend
from llava_fast.ops._launch import recorded
from llava_fast.sequence import key_ranges

Tensors = Mapping[str, torch.Tensor]
Function = Callable[..., torch.Tensor | Sequence[torch.Tensor]]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# For what hardly depends on the dtype: masks, strides, frozen inputs.
ALSO_HALF = (torch.float32, *(pytest.param(dtype, marks=pytest.mark.exhaustive) for dtype in DTYPES[1:]))
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def in_every_dtype(cases: Iterable[str], half: Collection[str]) -> list[Any]:
    """Parameters (name, dtype). In float16 only the cases in `half` are not marked `exhaustive`: what is particular to
    half precision, bfloat16 shows, too."""
    return [
        pytest.param(
            name,
            dtype,
            id=f"{name}-{dtype}".replace("torch.", ""),
            marks=pytest.mark.exhaustive if dtype == torch.float16 and name not in half else (),
        )
        for name in cases
        for dtype in DTYPES
    ]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty is NaN inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(
    function: Function, inputs: Tensors, cotangents: Sequence[torch.Tensor], frozen: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Outputs ("out0", …) of `function(**inputs)` and the gradient ("d" + name) of each input that is not frozen."""
    leaves = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point() and name not in frozen)
        for name, tensor in inputs.items()
    }
    outputs = function(**leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    results = {f"out{i}": output.detach() for i, output in enumerate(outputs)}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if wanted:
        gradients = torch.autograd.grad(outputs, list(wanted.values()), list(cotangents), allow_unused=True)
        for (name, leaf), gradient in zip(wanted.items(), gradients):
            results[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def check_kernel(
    function: Function,
    *draws: Tensors,
    op: str,
    kernels: Sequence[str],
    frozen: Sequence[str] = (),
    backend: str = "triton",
) -> dict[str, torch.Tensor]:
    """Run `function(**inputs)` and its backward by kernel, by PyTorch, and by PyTorch in float64, and compare.

    Args:
        function: calls the public function of operation `op`; returns a tensor or several.
        draws: inputs by name; floating ones are differentiated unless `frozen`. The error is the largest over all
            draws: of a tensor of a few elements, PyTorch's own error is luck unless there are several.
        kernels: names of the kernels that must be launched for each draw, in order.

    Returns:
        The kernel's results for the last draw, as `run` names them.
    """
    by_name: dict[str, list[tuple[float, float, float]]] = {}
    for inputs in draws:
        with use_backend("reference"), torch.no_grad():
            outputs = function(**inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        cotangents = [torch.randn(o.shape).to(o.device, o.dtype) for o in outputs]

        with use_backend("reference"):
            doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
            truth = run(function, doubles, [c.double() for c in cotangents], frozen)
            torchs = run(function, inputs, cotangents, frozen)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        with use_backend(backend, op), recorded() as launched, poisoned():
            found = run(function, inputs, cotangents, frozen)

        assert [launch.name.strip("_") for launch in launched] == list(kernels)
        for name, tensor in inputs.items():
            assert torch.equal(tensor, before[name]), f"{name} was written to"
        assert found.keys() == truth.keys()
        for name, value in found.items():
            assert value.dtype == torchs[name].dtype and value.shape == torchs[name].shape, name
            assert torch.isfinite(value).all(), f"{name} is not finite (was everything written?)"
            by_name.setdefault(name, []).append(errors(value, torchs[name], truth[name]))
    for name, of_draws in by_name.items():
        ours, theirs, ulp = (max(column) for column in zip(*of_draws))
        dtype = found[name].dtype
        assert ours <= 2 * theirs + ulp, f"{name}: error {ours:.3e}, PyTorch's in {dtype} is {theirs:.3e}"
    return found


def errors(found: torch.Tensor, torchs: torch.Tensor, truth: torch.Tensor) -> tuple[float, float, float]:
    """Our largest error, PyTorch's, and a unit in the last place of the largest value."""
    if found.numel() == 0:
        return 0.0, 0.0, 0.0
    ours, theirs = (float((t.double() - truth).abs().max()) for t in (found, torchs))
    return ours, theirs, torch.finfo(found.dtype).eps * float(truth.abs().max())


def vectors(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`key_ranges` as start and end."""
    start, end = key_ranges(*arguments, **options)
    return start, end
