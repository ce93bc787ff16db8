"""The reference RMSNorm and LayerNorm, with and without a residual, against float64 and transformers."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llava_fast.backend import use_backend
from llava_fast.ops.norm import layer_norm, rms_norm

SHAPES = [(1, 5), (17, 24), (2, 5, 123), (3, 1, 577), (0, 8)]


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with use_backend("reference"):
        yield


def exact(kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    if kind == "rms_norm":
        return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + bias


def run(kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual=None) -> tuple:
    if kind == "rms_norm":
        return rms_norm(x, weight, eps=eps, residual=residual)
    return layer_norm(x, weight, bias, eps=eps, residual=residual)


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_values_and_gradients(kind: str, shape: tuple, with_residual: bool, eps: float) -> None:
    names = ["x", "weight", "bias", *(["residual"] if with_residual else [])]
    tensors = {name: torch.randn(shape if name in ("x", "residual") else shape[-1:]) for name in names}
    ours = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    reference = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    y, total = run(kind, ours["x"], ours["weight"], ours["bias"], eps, ours.get("residual"))
    expected_total = reference["x"] + reference.get("residual", 0)
    expected = exact(kind, expected_total, reference["weight"], reference["bias"], eps)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), expected_total.double(), rtol=1e-6, atol=1e-6)
    assert total is ours["x"] or with_residual

    # Both results are used, as in a residual stream.
    dy, dtotal = torch.randn(shape), torch.randn(shape)
    (y * dy + total * dtotal).sum().backward()
    (expected * dy.double() + expected_total * dtotal.double()).sum().backward()
    for name in names:
        if reference[name].grad is not None:
            scale = float(reference[name].grad.abs().max()) if reference[name].numel() else 0.0
            torch.testing.assert_close(ours[name].grad.double(), reference[name].grad, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(40, eps=1e-5)
    norm.weight.data = torch.randn(40)
    norm = norm.to(dtype)
    x = (3 * torch.randn(2, 7, 40)).to(dtype)
    y, _ = rms_norm(x, norm.weight, eps=1e-5)
    assert y.dtype == dtype
    assert torch.equal(y, norm(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_in_other_dtypes(dtype: torch.dtype) -> None:
    x, residual, weight, bias = (torch.randn(s).to(dtype) for s in ((5, 40), (5, 40), (40,), (40,)))
    y, total = layer_norm(x, weight, bias, eps=1e-5, residual=residual)
    assert y.dtype == total.dtype == dtype
    assert torch.equal(total, x + residual)
    expected = exact("layer_norm", total.double(), weight.double(), bias.double(), 1e-5)
    stock = F.layer_norm(total, (40,), weight, bias, 1e-5)
    assert (y.double() - expected).abs().max() <= 2 * (stock.double() - expected).abs().max()


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_inputs_are_left_alone_and_may_be_strided(kind: str) -> None:
    wide = torch.randn(6, 5, 48)
    x, residual = wide[::2, :, 4:44], torch.randn(5, 3, 40).transpose(0, 1)
    weight, bias = torch.randn(40), torch.randn(40)
    kept = [tensor.clone() for tensor in (wide, residual, weight, bias)]
    y, total = run(kind, x, weight, bias, 1e-5, residual)
    expected = exact(kind, (x + residual).double(), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, x + residual)
    for before, after in zip(kept, (wide, residual, weight, bias), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_a_row_of_zeros_gives_no_nan(kind: str) -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y, _ = run(kind, x, torch.ones(8), torch.zeros(8), 1e-6)
    y.sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()
