"""The projector: the reference by its definition, the kernels and the library's GEMM by the kit's rules."""

from itertools import pairwise

import pytest
import torch
from kit import ALSO_HALF, DEVICES, DTYPES, check_kernel

from llava_fast.backend import use_backend
from llava_fast.ops import projector as module
from llava_fast.ops._launch import forced_tile, tile_table
from llava_fast.ops.projector import projector

FUSED = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "LIBRARY": 0, "num_warps": 4, "num_stages": 2}
LIBRARY = {**FUSED, "LIBRARY": 1}
ROWS = {"BLOCK_R": 16, "BLOCK_D": 32, "num_warps": 4, "num_stages": 1}
FWD, BWD, GELU = "projector_fwd_kernel", "projector_bwd_kernel", "activation_fwd_kernel"


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
    with pytest.raises(ValueError, match="2 weights, 1 biases"):
        projector(torch.randn(3, 8), weights, biases[:1])


def inputs(widths: list[int], biases: list[bool], shape: tuple[int, ...], dtype, device) -> dict[str, torch.Tensor]:
    """x, then w0, w1 …, and b0, b1 … where there is a bias."""
    tensors = {"x": torch.randn(*shape, widths[0])}
    for i, (into, out) in enumerate(pairwise(widths)):
        tensors[f"w{i}"] = torch.randn(out, into) * into**-0.5
        if biases[i]:
            tensors[f"b{i}"] = torch.randn(out)
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


def call(x: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
    weights = [tensor for name, tensor in parameters.items() if name[0] == "w"]
    return projector(x, weights, [parameters.get(f"b{i}") for i in range(len(weights))])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "widths", "biases", "tile"),
    [
        ((1,), [16, 32, 32], [True, True], FUSED),
        ((17,), [16, 48, 33], [True, True], FUSED),
        ((17,), [16, 48, 33], [True, True], LIBRARY),
        ((577,), [16, 16, 9], [False, False], FUSED),
        ((2, 33), [32, 16, 16, 9], [True, False, True], FUSED),
        ((2, 9), [32, 16, 16, 9], [True, False, True], LIBRARY),
        ((3, 5), [16, 5], [True], FUSED),
        ((40,), [32, 7], [False], FUSED),
    ],
    ids=str,
)
def test_kernel(shape, widths, biases, tile, device):
    hidden = len(widths) - 2  # layers
    kernels = [FWD] * (hidden + 1) if tile is FUSED else [GELU] * hidden
    for dtype in DTYPES:
        few = torch.Size(shape).numel() < 20
        draws = [inputs(widths, biases, shape, dtype, device) for _ in range(1 + 4 * few)]
        with forced_tile("projector_fwd", tile), forced_tile("projector_bwd", ROWS):
            check_kernel(call, *draws, op="projector", kernels=kernels + [BWD] * hidden)


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("frozen", "kernels"),
    [
        ({"x"}, [FWD, FWD, BWD]),
        ({"x", "w0"}, [FWD, FWD, BWD]),
        ({"w1", "b1", "b0"}, [FWD, FWD, BWD]),
        # Only the last layer learns: its input is recomputed, and nothing goes further back.
        ({"x", "w0", "b0"}, [FWD, FWD, GELU]),
        ({"x", "w0", "b0", "w1"}, [FWD, FWD]),
        ({"x", "w0", "b0", "w1", "b1"}, [FWD, FWD]),
    ],
    ids=lambda value: "-".join(sorted(value)),
)
def test_frozen(frozen, kernels, dtype, device):
    draws = [inputs([16, 32, 9], [True, True], (18,), dtype, device) for _ in range(3)]
    with forced_tile("projector_fwd", FUSED):
        check_kernel(call, *draws, op="projector", kernels=kernels, frozen=frozen)


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_widths_that_are_no_whole_steps_are_left_to_the_library(dtype, device):
    draws = [inputs([17, 32, 5], [True, True], (33,), dtype, device) for _ in range(4)]
    with forced_tile("projector_fwd", FUSED):
        check_kernel(call, *draws, op="projector", kernels=[GELU, FWD, BWD])


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_strided(dtype, device):
    """Patches behind a CLS token, columns of a wider tensor, rows in another order; weights stored transposed."""
    tensors = inputs([16, 32, 9], [True, True], (), dtype, device)
    tensors["w0"] = tensors["w0"].t().contiguous().t()
    tensors["b0"] = torch.randn(32, 2, device=device, dtype=dtype)[:, 0]
    wide = torch.randn(3, 19, 24, device=device, dtype=dtype)
    for x in (wide[:, 1:, :16], wide[0, :, 4:20], wide[..., :16].transpose(0, 1), wide.transpose(1, 2)[:, :9, :16]):
        with forced_tile("projector_fwd", FUSED):
            check_kernel(call, {**tensors, "x": x}, op="projector", kernels=[FWD, FWD, BWD])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [FUSED, LIBRARY], ids=["fused", "library"])
def test_no_rows(tile, device):
    tensors = inputs([16, 32, 9], [True, True], (0, 4), torch.float32, device)
    with forced_tile("projector_fwd", tile):
        check_kernel(call, tensors, op="projector", kernels=[])


@pytest.mark.parametrize("tile", [FUSED, LIBRARY], ids=["fused", "library"])
def test_one_buffer_is_saved_for_a_hidden_layer(tile):
    """PyTorch saves GELU's input and its output."""
    tensors = {
        name: t.requires_grad_() for name, t in inputs([16, 32, 9], [True, True], (6,), torch.float32, "cpu").items()
    }
    sizes: dict[str, list[int]] = {}
    for backend in ("reference", "triton"):
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with use_backend(backend, "projector"), forced_tile("projector_fwd", tile):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                call(**tensors)
        sizes[backend] = sorted(t.numel() for t in saved.values() if t.numel() == 6 * 32)
    assert sizes == {"reference": [192, 192], "triton": [192]}


def test_every_tile_that_ships_says_whose_gemm_it_is():
    for part in tile_table("projector_fwd").values():
        assert part["tiles"].keys() == {"half_few", "half_many", "single_few", "single_many"}
        assert {tile["LIBRARY"] for tile in part["tiles"].values()} <= {0, 1}
        assert "not measured" not in part["source"] or all(tile["LIBRARY"] for tile in part["tiles"].values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [FUSED, LIBRARY], ids=["fused", "library"])
def test_opcheck(tile, device):
    x, *parameters = inputs([16, 32, 9], [True, False], (6,), torch.float32, device).values()
    x, w0, b0, w1 = (tensor.requires_grad_() for tensor in (x, *parameters))
    with forced_tile("projector_fwd", tile):
        for save in (True, False):
            with torch.set_grad_enabled(save):
                torch.library.opcheck(module._projector_op, (x, [w0, w1], [b0], [True, False], save))
        with torch.no_grad():
            wanted = [True, False, True, True, False]
            dy, h = torch.randn(6, 9, device=device), torch.randn(6, 32, device=device)
            torch.library.opcheck(module._projector_backward_op, (dy, x, [h], [w0, w1], wanted))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    tensors = inputs([16, 32, 9], [True, False], (2, 6), torch.float32, device)
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    with use_backend("triton", "projector"), forced_tile("projector_fwd", FUSED):
        expected = call(**tensors)
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(**tensors)
        torch.testing.assert_close(found, expected)
        cotangent = torch.randn_like(found)
        for ours, theirs in zip(
            *(torch.autograd.grad(y, list(tensors.values()), cotangent) for y in (found, expected))
        ):
            torch.testing.assert_close(ours, theirs)


def test_autocast_casts_as_a_linear_layer_does():
    tensors = inputs([16, 32, 9], [True, False], (6,), torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        found = call(**tensors)
        weights, biases = [tensors["w0"], tensors["w1"]], [tensors["b0"], None]
        expected = module.projector_reference(tensors["x"], weights, biases)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
