"""Attention to an int8 cache against float64 attention to what the cache stands for."""

import pytest
import torch
from kit import DEVICES, check_kernel, in_every_dtype

from llava_fast.backend import BackendUnavailable, use_backend
from llava_fast.ops._launch import forced_tile, recorded
from llava_fast.ops.attention import KeyRanges
from llava_fast.ops.attention import int8 as module
from tests.ops.attention.test_decode import CASES, SMALL

CASES = {**CASES, "two blocks of columns": ([[(2, 20)]], 25, 2, 1, 72)}


def inputs(name: str, device: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    ranges, slots, heads, key_heads, dim = CASES[name]
    start, end = torch.tensor(ranges, dtype=torch.int32, device=device).unbind(-1)
    cache = (len(ranges), key_heads, slots)
    return {
        "q_BTHd": torch.randn(*start.shape, heads, dim).to(device, dtype),
        **{f"{x}_BSGd": torch.randint(-127, 128, (*cache, dim)).to(device, torch.int8).transpose(1, 2) for x in "kv"},
        # Of every size, as some tokens' keys are far larger than others'.
        **{f"{x}_scale_BGS": (0.03 * torch.rand(cache) ** 3).to(device) for x in "kv"},
        "start_BT": start,
        "end_BT": end,
    }


def int8_attention(start_BT: torch.Tensor, end_BT: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
    return module.int8_attention(**tensors, ranges=KeyRanges(start_BT, end_BT))


FROZEN = ("q_BTHd", "k_scale_BGS", "v_scale_BGS")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("name", "dtype"), in_every_dtype(CASES, half=("several tokens", "two blocks of columns")))
def test_kernels(name: str, dtype: torch.dtype, parts: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "splits_of", lambda q, k: parts)
    kernels = ["decode_attention_kernel"]
    draws = [inputs(name, device, dtype) for _ in range(3)]
    with forced_tile("decode_attention", SMALL):
        check_kernel(lambda **t: int8_attention(**t), *draws, op="int8_attention", kernels=kernels, frozen=FROZEN)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_at_the_sizes_of_models(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "large", ([[(0, 768)], [(100, 1500)]], 2048, 32, 8, 128))
    check_kernel(
        lambda **t: int8_attention(**t),
        inputs("large", "cuda", dtype),
        op="int8_attention",
        kernels=["decode_attention_kernel"],
        frozen=FROZEN,
    )


def test_more_queries_see_a_dequantised_copy() -> None:
    tensors = inputs("several tokens", "cpu")
    many = {
        **tensors,
        "q_BTHd": torch.randn(1, 6, 2, 16),
        "start_BT": torch.zeros(1, 6).int(),
        "end_BT": torch.arange(40, 46).int()[None],
    }
    with use_backend("triton", "attention"), recorded() as launched:
        found = int8_attention(**many)
    assert [launch.name for launch in launched] == ["_attention_fwd_kernel"]
    one = {
        **many,
        "q_BTHd": many["q_BTHd"][:, :1],
        "start_BT": many["start_BT"][:, :1],
        "end_BT": many["end_BT"][:, :1],
    }
    torch.testing.assert_close(found[:, :1], int8_attention(**one))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    torch.library.opcheck(module._int8_attention_op, (*inputs("one key", device).values(), 0.25))


def test_what_is_refused() -> None:
    tensors = inputs("one key", "cpu")
    with pytest.raises(ValueError, match="expected int8"):
        int8_attention(**{**tensors, "k_BSGd": tensors["k_BSGd"].float()})
    with pytest.raises(ValueError, match="expected int8"):
        int8_attention(**{**tensors, "v_scale_BGS": tensors["v_scale_BGS"][:, :1]})
    with use_backend("triton", "int8_attention"), pytest.raises(BackendUnavailable, match="no backward"):
        int8_attention(**{**tensors, "q_BTHd": tensors["q_BTHd"].requires_grad_()})
