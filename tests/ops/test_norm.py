"""RMSNorm and LayerNorm: the reference by its definition, the kernels by the kit's rules."""

from collections.abc import Iterator

import pytest
import torch
from kit import ALSO_HALF, DEVICES, DTYPES, check_kernel, poisoned
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llava_fast.backend import BackendUnavailable, use_backend
from llava_fast.ops import norm
from llava_fast.ops._launch import recorded
from llava_fast.ops.norm import layer_norm, rms_norm

NORMS = {"rms_norm": rms_norm, "layer_norm": layer_norm}
# Odd row counts and widths; a single row, a single column, more rows than programs.
SHAPES = [(1, 1), (1, 17), (17, 64), (5, 123), (577, 48), (2, 3, 1030)]


def inputs(shape, dtype, device, *, bias: bool, residual: bool) -> dict[str, torch.Tensor]:
    def draw(*size, shift=0.0):
        return (torch.randn(size) + shift).to(device, dtype)

    tensors = {"x": draw(*shape, shift=0.5), "weight": draw(shape[-1], shift=1.0)}
    if bias:
        tensors["bias"] = draw(shape[-1])
    if residual:
        tensors["residual"] = draw(*shape)
    return tensors


def function(op: str, residual: bool):
    """Outputs that matter: the normalised tensor, and the sum where there is a residual."""

    def call(**tensors):
        y, s = NORMS[op](**tensors, eps=1e-5)
        return (y, s) if residual else y

    return call


@pytest.mark.parametrize("residual", [False, True])
def test_the_reference_is_the_definition(residual: bool):
    tensors = inputs((7, 33), torch.float64, "cpu", bias=True, residual=residual)
    s = tensors["x"] + tensors.get("residual", 0)
    centred = s - s.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * tensors["weight"] + tensors["bias"]
    y, total = layer_norm(**tensors, eps=1e-5)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(total, s)
    del tensors["bias"]
    expected = s / (s.square().mean(-1, keepdim=True) + 1e-5).sqrt() * tensors["weight"]
    y, total = rms_norm(**tensors, eps=1e-5)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(total, s)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(op, shape, residual, device):
    for dtype in DTYPES:
        few = torch.Size(shape).numel() < 100
        draws = [inputs(shape, dtype, device, bias=op == "layer_norm", residual=residual) for _ in range(1 + 15 * few)]
        found = check_kernel(function(op, residual), *draws, op=op, kernels=["norm_fwd_kernel", "norm_bwd_kernel"])
        if residual:
            torch.testing.assert_close(found["dresidual"], found["dx"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", NORMS)
def test_kernel_with_frozen_weights(op, dtype, device):
    tensors = inputs((9, 130), dtype, device, bias=op == "layer_norm", residual=True)
    check_kernel(
        function(op, True), tensors, op=op, kernels=["norm_fwd_kernel", "norm_bwd_kernel"], frozen=("weight", "bias")
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_frozen_weight_costs_no_gradient(device):
    tensors = inputs((9, 130), torch.float32, device, bias=False, residual=False)
    tensors["x"].requires_grad_()
    with use_backend("triton", "rms_norm"), recorded() as launched:
        rms_norm(**tensors, eps=1e-5)[0].sum().backward()
    assert [launch.constexprs.get("WANT_DWEIGHT") for launch in launched] == [None, False]


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", NORMS)
def test_kernel_on_strided_inputs(op, dtype, device):
    wide = inputs((6, 2, 400), dtype, device, bias=op == "layer_norm", residual=True)
    tensors = {name: t[::2] if t.dim() == 1 else t.transpose(0, 1)[:, ::2, 100:300] for name, t in wide.items()}
    assert not tensors["x"].is_contiguous()
    check_kernel(function(op, True), tensors, op=op, kernels=["norm_fwd_kernel", "norm_bwd_kernel"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", NORMS)
def test_kernel_on_no_rows(op, device):
    tensors = inputs((0, 64), torch.float32, device, bias=op == "layer_norm", residual=True)
    found = check_kernel(function(op, True), tensors, op=op, kernels=[])
    assert found["out0"].shape == (0, 64)
    assert torch.equal(found["dweight"], torch.zeros(64, device=device))


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_only_one_output_used(dtype, device):
    """A gradient for the sum alone, or for the normalised tensor alone."""
    tensors = inputs((5, 40), dtype, device, bias=False, residual=True)
    for i in (0, 1):
        kernels = ["norm_fwd_kernel", "norm_bwd_kernel"] if i == 0 else ["norm_fwd_kernel"]
        check_kernel(lambda i=i, **t: rms_norm(**t, eps=1e-5)[i], tensors, op="rms_norm", kernels=kernels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("centred", [False, True])
def test_opcheck(centred, device):
    x, residual = (torch.randn(6, 40, device=device, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(40, device=device, requires_grad=True) for _ in range(2))
    for r in (None, residual):
        torch.library.opcheck(norm._norm_op, (x, r, weight, bias if centred else None, 1e-5))
    rstd = torch.rand(6, device=device)
    mean = rstd if centred else rstd[:0]
    for want in (False, True):
        with torch.no_grad():
            torch.library.opcheck(norm._norm_backward_op, (x, residual, x, weight, mean, rstd, centred, want))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    tensors = inputs((6, 40), torch.float32, device, bias=False, residual=True)

    def step(x, residual, weight):
        y, s = rms_norm(x, weight, eps=1e-5, residual=residual)
        return (y * s).sum()

    with use_backend("triton", "rms_norm"), poisoned():
        expected = step(**tensors)
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(**tensors)
    torch.testing.assert_close(found, expected)


def test_what_the_kernel_does_not_take():
    with use_backend("triton", "rms_norm"):
        with pytest.raises(BackendUnavailable, match=r"the weight is torch\.float32, the input torch\.float16"):
            rms_norm(torch.ones(2, 8, dtype=torch.float16), torch.ones(8), eps=1e-5)
        with pytest.raises(BackendUnavailable, match=r"the residual is torch\.float32, the input torch\.float16"):
            x = torch.ones(2, 8, dtype=torch.float16)
            rms_norm(x, x[0], eps=1e-5, residual=x.float())
        with pytest.raises(BackendUnavailable, match="width 8193 is over 8192"):
            rms_norm(torch.ones(2, 8193), torch.ones(8193), eps=1e-5)
        with pytest.raises(BackendUnavailable, match=r"torch\.float64 is not one of"):
            rms_norm(torch.ones(2, 8).double(), torch.ones(8).double(), eps=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_twin(shape, residual):
    """Forward only, so nothing requires a gradient."""
    for dtype in DTYPES:
        few = torch.Size(shape).numel() < 100
        draws = [inputs(shape, dtype, "cuda", bias=False, residual=residual) for _ in range(1 + 15 * few)]
        check_kernel(
            function("rms_norm", residual), *draws, op="rms_norm", kernels=[], frozen=tuple(draws[0]), backend="cuda"
        )


def test_the_cuda_twin_refuses_what_it_cannot_do():
    x = torch.ones(2, 8)
    assert norm._supports_cuda(x, x[0]) == "the tensors are on cpu"
    assert norm._supports_cuda(x, x[0], torch.ones(2, 8, requires_grad=True)) == "the CUDA kernel has no backward"
    assert norm._supports_cuda(x.requires_grad_(), x[0].detach()) == "the CUDA kernel has no backward"


# ---- the reference, by itself


@pytest.fixture
def by_reference() -> Iterator[None]:
    with use_backend("reference"):
        yield


REFERENCE_SHAPES = [(1, 5), (17, 24), (2, 5, 123), (3, 1, 577), (0, 8)]


def exact(kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    if kind == "rms_norm":
        return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + bias


def normed(kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual=None) -> tuple:
    if kind == "rms_norm":
        return rms_norm(x, weight, eps=eps, residual=residual)
    return layer_norm(x, weight, bias, eps=eps, residual=residual)


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("eps", [1e-6, 1e-1])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", REFERENCE_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_values_and_gradients(kind: str, shape: tuple, with_residual: bool, eps: float) -> None:
    names = ["x", "weight", "bias", *(["residual"] if with_residual else [])]
    tensors = {name: torch.randn(shape if name in ("x", "residual") else shape[-1:]) for name in names}
    ours = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    reference = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    y, total = normed(kind, ours["x"], ours["weight"], ours["bias"], eps, ours.get("residual"))
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


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(40, eps=1e-5)
    norm.weight.data = torch.randn(40)
    norm = norm.to(dtype)
    x = (3 * torch.randn(2, 7, 40)).to(dtype)
    y, _ = rms_norm(x, norm.weight, eps=1e-5)
    assert y.dtype == dtype
    assert torch.equal(y, norm(x))


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_in_other_dtypes(dtype: torch.dtype) -> None:
    x, residual, weight, bias = (torch.randn(s).to(dtype) for s in ((5, 40), (5, 40), (40,), (40,)))
    y, total = layer_norm(x, weight, bias, eps=1e-5, residual=residual)
    assert y.dtype == total.dtype == dtype
    assert torch.equal(total, x + residual)
    expected = exact("layer_norm", total.double(), weight.double(), bias.double(), 1e-5)
    stock = F.layer_norm(total, (40,), weight, bias, 1e-5)
    assert (y.double() - expected).abs().max() <= 2 * (stock.double() - expected).abs().max()


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_inputs_are_left_alone_and_may_be_strided(kind: str) -> None:
    wide = torch.randn(6, 5, 48)
    x, residual = wide[::2, :, 4:44], torch.randn(5, 3, 40).transpose(0, 1)
    weight, bias = torch.randn(40), torch.randn(40)
    kept = [tensor.clone() for tensor in (wide, residual, weight, bias)]
    y, total = normed(kind, x, weight, bias, 1e-5, residual)
    expected = exact(kind, (x + residual).double(), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, x + residual)
    for before, after in zip(kept, (wide, residual, weight, bias), strict=True):
        assert torch.equal(before, after)


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_a_row_of_zeros_gives_no_nan(kind: str) -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y, _ = normed(kind, x, torch.ones(8), torch.zeros(8), 1e-6)
    y.sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()
