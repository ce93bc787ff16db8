"""Rotary positions: the reference as a rotation of complex pairs, the kernel by the kit's rules."""

import pytest
import torch
from kit import DEVICES, DTYPES, check_kernel

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
    for dtype in (*DTYPES, torch.bfloat16):
        draws = [inputs(shape, dtype, device) for _ in range(8 if shape[1] == 1 else 1)]
        check_kernel(rotary, *draws, op="rotary", kernels=["rotary_kernel"] * 2, frozen=FROZEN)


@pytest.mark.parametrize("device", DEVICES)
def test_shared_angles_and_strided_heads(device):
    tensors = inputs((3, 4, 5, 2, 16), torch.float32, device, shared=True)
    # Queries and keys as slices of one projection, and tokens behind heads in memory.
    both = torch.randn(3, 4, 7, 16, device=device)
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
