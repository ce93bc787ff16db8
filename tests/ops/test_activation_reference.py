"""The reference activations against their formulas in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch

from llava_fast.backend import use_backend
from llava_fast.ops.activation import gelu, quick_gelu, swiglu

FORMULAS: dict[Callable, Callable] = {
    swiglu: lambda gate, up: gate / (1 + (-gate).exp()) * up,
    quick_gelu: lambda x: x / (1 + (-1.702 * x).exp()),
    gelu: lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
}
cases = pytest.mark.parametrize("op", FORMULAS, ids=lambda op: op.__name__)


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with use_backend("reference"):
        yield


def inputs(op: Callable, shape: tuple[int, ...]) -> list[torch.Tensor]:
    return [4 * torch.randn(shape) for _ in range(2 if op is swiglu else 1)]


@cases
@pytest.mark.parametrize("shape", [(1,), (17, 3), (2, 5, 123), (0, 4)], ids=str)
def test_values_and_gradients(op: Callable, shape: tuple[int, ...]) -> None:
    tensors = inputs(op, shape)
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    actual, expected = op(*ours), FORMULAS[op](*exact)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(shape)
    actual.backward(weight)
    expected.backward(weight.double())
    for x, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(op: Callable, dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in inputs(op, (40, 33))]
    actual = op(*tensors)
    assert actual.dtype == dtype
    expected = FORMULAS[op](*(tensor.double() for tensor in tensors))
    # Rounded at most three times.
    torch.testing.assert_close(actual.double(), expected, rtol=3 * torch.finfo(dtype).eps, atol=1e-3)


@cases
def test_far_from_zero(op: Callable) -> None:
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    y = op(x, torch.ones(4)) if op is swiglu else op(x)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 100.0, 1e4]))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.0, 1.0, 1.0]))


@cases
def test_strided_inputs_are_left_alone(op: Callable) -> None:
    tensors = [torch.randn(9, 14).t()[::2, 1:] for _ in inputs(op, (1,))]
    kept = [tensor.clone() for tensor in tensors]
    torch.testing.assert_close(op(*tensors), op(*kept))
    for tensor, before in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, before)
