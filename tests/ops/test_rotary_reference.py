"""The reference rotary positions: a rotation of pairs of numbers, by angles that grow with the position."""

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llava_fast.backend import use_backend
from llava_fast.ops.rotary import rotary


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
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


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 2, 16).double(), torch.randn(1, 1, 2, 16).double()
    scores = []
    for shift in (0, 5, 400):
        at_q, _ = rotary(q, q, *angles(torch.tensor([[7 + shift]]), 16, torch.float64))
        at_k, _ = rotary(k, k, *angles(torch.tensor([[3 + shift]]), 16, torch.float64))
        scores.append((at_q * at_k).sum(-1))
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


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


def test_angles_shared_by_the_rows_and_strided_inputs() -> None:
    q, k = torch.randn(3, 4, 7, 16).transpose(1, 2), torch.randn(3, 2, 7, 16).transpose(1, 2)
    cos, sin = angles(torch.arange(7)[None], 16)
    shared = rotary(q, k, cos, sin)
    copied = rotary(q.contiguous(), k.contiguous(), cos.expand(3, -1, -1), sin.expand(3, -1, -1))
    for actual, expected in zip(shared, copied, strict=True):
        assert torch.equal(actual, expected)
