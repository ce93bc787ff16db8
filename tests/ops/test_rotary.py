"""Rotary positions: the reference as a rotation of complex pairs, the kernel by the kit's rules."""

from collections.abc import Iterator

import pytest
import torch
from kit import ALSO_HALF, DEVICES, DTYPES, check_kernel
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llava_fast.backend import BackendUnavailable, use_backend
from llava_fast.ops import rotary as module
from llava_fast.ops.rotary import rotary

# batch, tokens, query heads, key heads, head dimension
SHAPES = [(1, 1, 1, 1, 2), (1, 17, 4, 4, 64), (2, 5, 6, 2, 10), (2, 3, 33, 1, 128), (1, 2, 3, 3, 160)]


def inputs(shape, dtype, device, *, shared: bool = False) -> dict[str, torch.Tensor]:
    batch, tokens, heads, key_heads, dim = shape
    angle = torch.rand(1 if shared else batch, tokens, dim) * 6
    tensors = {
        "q_BTHd": torch.randn(batch, tokens, heads, dim),
        "k_BTGd": torch.randn(batch, tokens, key_heads, dim),
        "cos_BTd": angle.cos(),
        "sin_BTd": angle.sin(),
    }
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


FROZEN = ("cos_BTd", "sin_BTd")


def test_the_reference_turns_complex_numbers():
    q, k = torch.randn(2, 2, 5, 3, 8, dtype=torch.float64)
    angle = torch.rand(2, 5, 4, dtype=torch.float64)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None]
    for x, found in zip((q, k), rotary(q, k, cos, sin)):
        turned = torch.complex(*x.chunk(2, -1)) * turn
        torch.testing.assert_close(found, torch.cat((turned.real, turned.imag), -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, device):
    for dtype in DTYPES:
        draws = [inputs(shape, dtype, device) for _ in range(8 if shape[1] == 1 else 1)]
        check_kernel(rotary, *draws, op="rotary", kernels=["rotary_kernel"] * 2, frozen=FROZEN)


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_shared_angles_and_strided_heads(dtype, device):
    tensors = inputs((3, 4, 5, 2, 16), dtype, device, shared=True)
    # Queries and keys as slices of one projection, and tokens behind heads in memory.
    both = torch.randn(3, 4, 7, 16, device=device, dtype=dtype)
    tensors["q_BTHd"], tensors["k_BTGd"] = both[:, :, :5], both[:, :, 5:].transpose(1, 2).contiguous().transpose(1, 2)
    check_kernel(rotary, tensors, op="rotary", kernels=["rotary_kernel"] * 2, frozen=FROZEN)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device):
    check_kernel(rotary, inputs((2, 0, 4, 2, 16), torch.float32, device), op="rotary", kernels=[], frozen=FROZEN)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device):
    tensors = list(inputs((2, 3, 4, 2, 16), torch.float32, device).values())
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    for transposed in (False, True):
        torch.library.opcheck(module._rotary_op, (*tensors, transposed))
    with use_backend("triton", "rotary"):
        found = torch.compile(rotary, fullgraph=True, backend="aot_eager")(*tensors)
        torch.testing.assert_close(found, rotary(*tensors))


def test_what_is_refused():
    q, k, cos, sin = inputs((1, 2, 2, 2, 258), torch.float32, "cpu").values()
    with use_backend("triton", "rotary"), pytest.raises(BackendUnavailable, match="head dimension 258 is over 256"):
        rotary(q, k, cos, sin)
    with pytest.raises(ValueError, match="head dimension 3 must be even"):
        rotary(q[..., :3], k[..., :3], cos[..., :3], sin[..., :3])
    with pytest.raises(ValueError, match="the angles require a gradient"):
        rotary(q, k, cos.requires_grad_(), sin)


# ---- the reference, by itself


@pytest.fixture
def by_reference() -> Iterator[None]:
    with use_backend("reference"):
        yield


def angles(positions: torch.Tensor, dim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, T, d] by the definition, theta = 10000."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions[..., None].double() * frequency
    return torch.cat((angle.cos(),) * 2, -1).to(dtype), torch.cat((angle.sin(),) * 2, -1).to(dtype)


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The same as a product of complex numbers: (x[i], x[i + d/2]) is turned by position · frequency_i."""
    dim = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions[..., None].double() * frequency
    turn = torch.polar(torch.ones_like(angle), angle)[..., None, :]
    product = torch.complex(*x.double().chunk(2, -1)) * turn
    return torch.cat((product.real, product.imag), -1)


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("dim", [2, 12, 64, 80])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "key_heads"), [(1, 1, 1, 1), (2, 17, 4, 2), (3, 5, 6, 1), (2, 0, 4, 4)]
)
def test_values_and_gradients(batch: int, tokens: int, heads: int, key_heads: int, dim: int) -> None:
    positions = torch.randint(0, 600, (batch, tokens))
    q = torch.randn(batch, tokens, heads, dim, requires_grad=True)
    k = torch.randn(batch, tokens, key_heads, dim, requires_grad=True)
    cos, sin = angles(positions, dim)
    for x, actual in zip((q, k), rotary(q, k, cos, sin), strict=True):
        torch.testing.assert_close(actual.double(), rotated(x, positions), rtol=1e-5, atol=1e-5)
        weight = torch.randn_like(x)
        actual.backward(weight, retain_graph=True)
        # The transpose of a rotation turns the other way.
        torch.testing.assert_close(x.grad.double(), rotated(weight, -positions), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("by_reference")
def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 2, 16).double(), torch.randn(1, 1, 2, 16).double()
    scores = []
    for shift in (0, 5, 400):
        at_q, _ = rotary(q, q, *angles(torch.tensor([[7 + shift]]), 16, torch.float64))
        at_k, _ = rotary(k, k, *angles(torch.tensor([[3 + shift]]), 16, torch.float64))
        scores.append((at_q * at_k).sum(-1))
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_as_transformers(dtype: torch.dtype) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    positions = torch.stack((torch.arange(9), torch.arange(9) + 3))
    q, k = torch.randn(2, 9, 4, 16, dtype=dtype), torch.randn(2, 9, 2, 16, dtype=dtype)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    kept = q.clone(), k.clone()
    actual = rotary(q, k, cos, sin)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for x, ours, theirs in zip((q, k), actual, expected, strict=True):
        assert ours.dtype == dtype
        assert ours.data_ptr() != x.data_ptr()
        assert torch.equal(ours, theirs)
    assert torch.equal(q, kept[0])
    assert torch.equal(k, kept[1])


@pytest.mark.usefixtures("by_reference")
def test_angles_shared_by_the_rows_and_strided_inputs() -> None:
    q, k = torch.randn(3, 4, 7, 16).transpose(1, 2), torch.randn(3, 2, 7, 16).transpose(1, 2)
    cos, sin = angles(torch.arange(7)[None], 16)
    shared = rotary(q, k, cos, sin)
    copied = rotary(q.contiguous(), k.contiguous(), cos.expand(3, -1, -1), sin.expand(3, -1, -1))
    for actual, expected in zip(shared, copied, strict=True):
        assert torch.equal(actual, expected)
