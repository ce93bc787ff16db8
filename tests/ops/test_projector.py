"""The projector: linear layers with exact GELU between them."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from llava_fast.backend import use_backend
from llava_fast.ops.projector import projector


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with use_backend("reference"):
        yield


def exact(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> torch.Tensor:
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if i:
            x = x * (1 + torch.erf(x / 2**0.5)) / 2
        x = x @ weight.T
        x = x if bias is None else x + bias
    return x


def layers(widths: list[int], bias: bool) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    weights = [torch.randn(out, into) * into**-0.5 for into, out in pairwise(widths)]
    return weights, [torch.randn(out) if bias else None for out in widths[1:]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [[24, 32], [24, 32, 32], [1, 7, 5], [17, 12, 12, 9]], ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 577), (3, 5), (0, 4)], ids=str)
def test_values_and_gradients(shape: tuple[int, ...], widths: list[int], bias: bool) -> None:
    weights, biases = layers(widths, bias)
    x = torch.randn(*shape, widths[0])
    given = [x, *weights, *(b for b in biases if b is not None)]
    ours = [tensor.clone().requires_grad_() for tensor in given]
    reference = [tensor.double().requires_grad_() for tensor in given]
    count = len(weights)

    def split(tensors: list[torch.Tensor]) -> tuple:
        return tensors[0], tensors[1 : 1 + count], tensors[1 + count :] or [None] * count

    actual, expected = projector(*split(ours)), exact(*split(reference))
    assert actual.shape == (*shape, widths[-1])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(actual.shape)
    actual.backward(weight)
    expected.backward(weight.double())
    for tensor, wanted in zip(ours, reference, strict=True):
        scale = float(wanted.grad.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(tensor.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5 * scale)


def test_no_layers_are_the_identity() -> None:
    x = torch.randn(2, 9, 24)
    assert torch.equal(projector(x, [], []), x)


def test_frozen_weights_get_no_gradient() -> None:
    weights, biases = layers([8, 6, 4], True)
    weights[1].requires_grad_()
    projector(torch.randn(3, 8), weights, biases).sum().backward()
    assert weights[1].grad is not None
    assert all(tensor.grad is None for tensor in (weights[0], *biases))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weights, biases = layers([24, 32, 32], True)
    x, weights, biases = torch.randn(5, 24).to(dtype), [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    actual = projector(x, weights, biases)
    assert actual.dtype == dtype
    expected = exact(x.double(), [w.double() for w in weights], [b.double() for b in biases])
    error = (actual.double() - expected).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_as_many_biases_as_weights() -> None:
    weights, biases = layers([8, 6, 4], True)
    with pytest.raises(ValueError, match="zip"):
        projector(torch.randn(3, 8), weights, biases[:1])
