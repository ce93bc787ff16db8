"""Rotated keys straight into the cache: by the kit's rules in float, within half a step in int8."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import DEVICES, DTYPES, check_kernel, poisoned

from benchmarks import tune
from llava_fast.backend import BackendUnavailable, use_backend
from llava_fast.ops import cache_write as module
from llava_fast.ops._launch import recorded, tile
from llava_fast.ops.cache_write import dequantise, quantise_reference, write_cache
from llava_fast.ops.rotary import rotary_reference

SLOTS = 9
KERNEL = ["cache_write_kernel"]
# batch, tokens, query heads, key heads, head dimension, first slot
SHAPES = [(1, 1, 1, 1, 2, 0), (2, 5, 6, 2, 10, 3), (1, 3, 33, 17, 64, 6), (2, 1, 0, 3, 160, 8)]


def inputs(shape: tuple, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    batch, tokens, heads, key_heads, dim, at = shape
    angle = torch.rand(batch, tokens, dim) * 6
    tensors = {
        "q": torch.randn(batch, tokens, heads, dim),
        # Keys and values as slices of one projection.
        "kv": torch.randn(batch, tokens, 2 * key_heads, dim),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "keys": torch.randn(batch, key_heads, SLOTS, dim),
        "values": torch.randn(batch, key_heads, SLOTS, dim),
    }
    return {**{k: x.to(device, dtype) for k, x in tensors.items()}, "at": torch.tensor(at, device=device)}


def write(q, kv, cos, sin, keys, values, at) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = keys.clone(), values.clone()
    k, v = kv.chunk(2, 2)
    return write_cache(q, k, v, cos, sin, at, keys, values), keys, values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: tuple, device: str) -> None:
    for dtype in DTYPES:
        draws = [inputs(shape, dtype, device) for _ in range(8 if shape[1] == 1 else 1)]
        frozen = tuple(draws[0])
        check_kernel(write, *draws, op="cache_write", kernels=KERNEL, frozen=frozen)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_new(device: str) -> None:
    tensors = inputs((2, 0, 4, 2, 16, 0), torch.float32, device)
    check_kernel(write, tensors, op="cache_write", kernels=[], frozen=tuple(tensors))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_quantisation_is_within_half_a_step(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    stored, scale = quantise_reference(x)
    assert stored.abs().max() <= 127
    error = (dequantise(stored, scale, torch.float64) - x.double()).abs().max()
    tiny = float(torch.tensor(module.TINY))  # in float32, which is more
    assert error <= float(scale) * 0.50001 + tiny
    assert (x.abs().max() <= module.TINY) == (scale == 0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(shape: tuple, device: str, backend: str) -> None:
    tensors = inputs(shape, torch.float32, device)
    k, v = tensors["kv"].chunk(2, 2)
    k[0, 0, 0] = 0  # a vector of zeros has no scale
    at, tokens = int(tensors["at"]), k.shape[1]
    keys, values = (tensors[name].to(torch.int8) for name in ("keys", "values"))
    scales = [torch.rand(keys.shape[:3], device=device) for _ in range(2)]
    before = [x.clone() for x in (keys, values, *scales)]
    with use_backend(backend, "cache_write"), recorded() as launched, poisoned():
        q = write_cache(
            *(tensors["q"], k, v, tensors["cos"], tensors["sin"], tensors["at"], keys, values),
            key_scales_BGS=scales[0],
            value_scales_BGS=scales[1],
        )
    assert [launch.name.strip("_") for launch in launched] == (KERNEL if backend == "triton" else [])
    exact_q, exact_k = rotary_reference(*(x.double() for x in (tensors["q"], k, tensors["cos"], tensors["sin"])))
    torch.testing.assert_close(q.double(), exact_q, rtol=1e-6, atol=1e-6)
    new = slice(at, at + tokens)
    for exact, cache, scale in ((exact_k, keys, scales[0]), (v.double(), values, scales[1])):
        step = exact.abs().amax(-1) / 127
        torch.testing.assert_close(scale[:, :, new].transpose(1, 2).double(), step, rtol=1e-6, atol=1e-9)
        error = (dequantise(cache, scale, torch.float64)[:, :, new].transpose(1, 2) - exact).abs()
        assert (error <= 0.5001 * step[..., None] + 1e-9).all()
    for now, then in zip((keys, values, *scales), before, strict=True):
        now[:, :, new] = then[:, :, new]
        assert torch.equal(now, then), "a slot was written to that is not new"


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_past_the_last_slot_is_not_written(device: str) -> None:
    tensors = inputs((1, 3, 1, 2, 8, 0), torch.float32, device)
    room = torch.zeros(1, 2, SLOTS + 3, 8, device=device)
    tensors["keys"] = room[:, :, :SLOTS]
    tensors["at"].fill_(SLOTS - 1)
    k, v = tensors["kv"].chunk(2, 2)
    with use_backend("triton", "cache_write"):
        write_cache(
            tensors["q"], k, v, tensors["cos"], tensors["sin"], tensors["at"], tensors["keys"], tensors["values"]
        )
    assert room[:, :, SLOTS - 1].any()
    assert not room[:, :, SLOTS:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device: str) -> None:
    q, kv, cos, sin, keys, values, at = inputs((2, 3, 4, 2, 16, 1), torch.float32, device).values()
    k, v = kv.chunk(2, 2)
    scales = torch.zeros(2, 2, SLOTS, device=device)
    arguments = (q, k, v, cos, sin, at)
    torch.library.opcheck(module._cache_write_op, (*arguments, keys, values, None, None))
    int8 = keys.to(torch.int8), values.to(torch.int8), scales, scales.clone()
    torch.library.opcheck(module._cache_write_op, (*arguments, *int8))
    with use_backend("triton", "cache_write"):
        expected = write(q, kv, cos, sin, keys, values, at)
        compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, kv, cos, sin, keys, values, at), expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_graph_replays_as_the_cache_fills() -> None:
    q, kv, cos, sin, keys, values, at = inputs((1, 1, 4, 2, 64, 0), torch.float16, "cuda").values()
    k, v = kv.chunk(2, 2)
    with use_backend("triton", "cache_write"):
        write_cache(q, k, v, cos, sin, at, keys, values)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            write_cache(q, k, v, cos, sin, at, keys, values)
    for slot in range(SLOTS):
        at.fill_(slot)
        graph.replay()
    assert torch.equal(keys, keys[:, :, :1].expand_as(keys))


def test_what_is_refused() -> None:
    q, kv, cos, sin, keys, values, at = inputs((1, 2, 2, 2, 4, 0), torch.float32, "cpu").values()
    k, v = kv.chunk(2, 2)
    with pytest.raises(ValueError, match="do not fit a cache"):
        write_cache(q, k, v, cos, sin, at, keys[:, :1], values)
    with pytest.raises(ValueError, match="2 tokens for a cache of 1 slots"):
        write_cache(q, k, v, cos, sin, at, keys[:, :, :1], values[:, :, :1])
    with pytest.raises(ValueError, match="an int8 cache, and no other"):
        write_cache(q, k, v, cos, sin, at, keys.to(torch.int8), values)
    with pytest.raises(ValueError, match="head dimension 4 must be even and that of the angles"):
        write_cache(q, k, v, cos[..., :2], sin[..., :2], at, keys, values)
    for bad, why in ((q.requires_grad_(), "not differentiated"), (q.detach().double(), "float64")):
        with use_backend("triton", "cache_write"), pytest.raises(BackendUnavailable, match=why):
            write_cache(bad, k, v, cos, sin, at, keys, values)


def test_tiles_on_offer_to_the_tuner_agree() -> None:
    device = torch.device("cpu")
    for e in module.examples(device, torch.float32):
        assert tune.verified(e.kernel, e.call, tile(e.kernel, e.key, device), e.tiles[::7]) == [*e.tiles[::7]]
