"""SwiGLU, quick-GELU and GELU: the references by their definitions, the kernels by the kit's rules."""

from collections.abc import Callable, Iterator

import pytest
import torch
from kit import DEVICES, DTYPES, check_kernel

from llava_fast.backend import use_backend
from llava_fast.ops import activation
from llava_fast.ops.activation import gelu, quick_gelu, swiglu

FUNCTIONS = {"swiglu": swiglu, "quick_gelu": quick_gelu, "gelu": gelu}
KERNELS = ["activation_fwd_kernel", "activation_bwd_kernel"]
SHAPES = [(1, 1), (1, 17), (5, 123), (577, 48), (2, 3, 1030)]


def inputs(op: str, shape, dtype, device) -> dict[str, torch.Tensor]:
    names = ("gate", "up") if op == "swiglu" else ("x",)
    return {name: (2 * torch.randn(shape)).to(device, dtype) for name in names}


def test_the_references_are_the_definitions():
    x, up = torch.randn(2, 1000, dtype=torch.float64) * 3
    torch.testing.assert_close(swiglu(x, up), x / (1 + torch.exp(-x)) * up)
    torch.testing.assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))
    torch.testing.assert_close(gelu(x), x * torch.distributions.Normal(0.0, 1.0).cdf(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(op, shape, device):
    for dtype in DTYPES:
        few = torch.Size(shape).numel() < 100
        draws = [inputs(op, shape, dtype, device) for _ in range(1 + 15 * few)]
        check_kernel(FUNCTIONS[op], *draws, op=op, kernels=KERNELS)


@pytest.mark.parametrize("device", DEVICES)
def test_gate_and_up_in_one_tensor(device):
    gate, up = torch.randn(7, 200, device=device).chunk(2, dim=-1)
    check_kernel(swiglu, {"gate": gate, "up": up}, op="swiglu", kernels=KERNELS)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's remark on a sigmoid that is 0
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_large_values_and_no_values(op, device):
    names = ("gate", "up") if op == "swiglu" else ("x",)
    values = torch.tensor([[-80.0, -20.0, -0.0, 0.0, 20.0, 80.0]], device=device)
    check_kernel(FUNCTIONS[op], dict.fromkeys(names, values), op=op, kernels=KERNELS)
    check_kernel(FUNCTIONS[op], dict.fromkeys(names, values[:0]), op=op, kernels=[])


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    dy, x, up = (torch.randn(6, 40, device=device, requires_grad=True) for _ in range(3))
    torch.library.opcheck(activation._swiglu_op, (x, up))
    for kind in ("quick_gelu", "gelu"):
        torch.library.opcheck(activation._activation_op, (x, kind))
    with torch.no_grad():
        torch.library.opcheck(activation._swiglu_backward_op, (dy, x, up))
        torch.library.opcheck(activation._activation_backward_op, (dy, x, "gelu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_compiles_without_a_graph_break(op, device):
    tensors = list(inputs(op, (6, 40), torch.float32, device).values())
    with use_backend("triton", op):
        found = torch.compile(FUNCTIONS[op], fullgraph=True, backend="aot_eager")(*tensors)
        torch.testing.assert_close(found, FUNCTIONS[op](*tensors))


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"gate is torch\.float32 \(2, 3\), up is torch\.float32 \(2, 4\)"):
        swiglu(torch.ones(2, 3), torch.ones(2, 4))


# ---- the reference, by itself


@pytest.fixture
def by_reference() -> Iterator[None]:
    with use_backend("reference"):
        yield


FORMULAS: dict[Callable, Callable] = {
    swiglu: lambda gate, up: gate / (1 + (-gate).exp()) * up,
    quick_gelu: lambda x: x / (1 + (-1.702 * x).exp()),
    gelu: lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
}
cases = pytest.mark.parametrize("op", FORMULAS, ids=lambda op: op.__name__)


def reference_inputs(op: Callable, shape: tuple[int, ...]) -> list[torch.Tensor]:
    return [4 * torch.randn(shape) for _ in range(2 if op is swiglu else 1)]


@pytest.mark.usefixtures("by_reference")
@cases
@pytest.mark.parametrize("shape", [(1,), (17, 3), (2, 5, 123), (0, 4)], ids=str)
def test_values_and_gradients(op: Callable, shape: tuple[int, ...]) -> None:
    tensors = reference_inputs(op, shape)
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    actual, expected = op(*ours), FORMULAS[op](*exact)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(shape)
    actual.backward(weight)
    expected.backward(weight.double())
    for x, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("by_reference")
@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(op: Callable, dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in reference_inputs(op, (40, 33))]
    actual = op(*tensors)
    assert actual.dtype == dtype
    expected = FORMULAS[op](*(tensor.double() for tensor in tensors))
    # Rounded at most three times.
    torch.testing.assert_close(actual.double(), expected, rtol=3 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.usefixtures("by_reference")
@cases
def test_far_from_zero(op: Callable) -> None:
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    y = op(x, torch.ones(4)) if op is swiglu else op(x)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 100.0, 1e4]))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.usefixtures("by_reference")
@cases
def test_strided_inputs_are_left_alone(op: Callable) -> None:
    tensors = [torch.randn(9, 14).t()[::2, 1:] for _ in reference_inputs(op, (1,))]
    kept = [tensor.clone() for tensor in tensors]
    torch.testing.assert_close(op(*tensors), op(*kept))
    for tensor, before in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, before)
