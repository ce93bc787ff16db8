"""Decoding against the reference: keys split over programs, caches where they lie, parts merged by their LSE."""

import random

import pytest
import torch
from kit import DEVICES, check_kernel, in_every_dtype, poisoned

from benchmarks import tune
from llava_fast.backend import use_backend
from llava_fast.ops._launch import forced_tile, recorded, tile
from llava_fast.ops.attention import KeyRanges, attention, range_attention
from llava_fast.ops.attention import decode as module
from tests.ops.attention.test_attention import dense_attention

SMALL = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}


def cache(batch: int, key_heads: int, slots: int, dim: int, device: str, dtype=torch.float32) -> torch.Tensor:
    """As transformers keeps it, [B, G, S, d], seen as [B, S, G, d]."""
    return torch.randn(batch, key_heads, slots, dim).to(device, dtype).transpose(1, 2)


# (start, end) of each query by batch row, slots, query heads, key heads, head dimension
CASES = {
    "filled to different lengths": ([[(0, 5)], [(3, 40)], [(0, 64)]], 64, 4, 2, 16),
    "several tokens": ([[(0, 38), (0, 39), (0, 40)]], 70, 2, 1, 16),
    "window": ([[(30, 50), (31, 51)]], 60, 3, 1, 16),
    "one key": ([[(0, 1)]], 1, 2, 2, 24),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("name", "dtype"), in_every_dtype(CASES, half=("several tokens", "one key")))
def test_kernels(name: str, dtype: torch.dtype, parts: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges, slots, heads, key_heads, dim = CASES[name]
    monkeypatch.setattr(module, "splits_of", lambda q, k: parts)
    start, end = torch.tensor(ranges, dtype=torch.int32, device=device).unbind(-1)
    q = torch.randn(*start.shape, heads, dim).to(device, dtype)
    k, v = (cache(len(ranges), key_heads, slots, dim, device, dtype) for _ in range(2))
    kernels = ["decode_attention_kernel"]
    tensors = {"q_BTHd": q, "k_BSGd": k, "v_BSGd": v, "start_BT": start, "end_BT": end}
    with forced_tile("decode_attention", SMALL):
        check_kernel(
            lambda **t: attention(**t, return_lse=True),
            *[{**tensors, "q_BTHd": torch.randn_like(q)} for _ in range(3)],
            op="attention",
            kernels=kernels,
            frozen=("q_BTHd", "k_BSGd", "v_BSGd"),
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 4])
def test_empty_rows_and_a_cache_with_garbage(parts: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "splits_of", lambda q, k: parts)
    start = torch.tensor([[2, 2], [7, 7]], dtype=torch.int32, device=device)
    end = torch.tensor([[9, 10], [7, 7]], dtype=torch.int32, device=device)
    q = torch.randn(2, 2, 2, 16, device=device)
    k, v = (cache(2, 1, 30, 16, device) for _ in range(2))
    expected, expected_lse = dense_attention(*(x.double().cpu() for x in (q, k, v)), start, end, 0.25)
    for x in (k, v):
        x[:, 10:] = float("nan")
    with use_backend("triton", "attention"), forced_tile("decode_attention", SMALL), poisoned():
        out, lse = attention(q, k, v, start, end, return_lse=True)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-5, atol=1e-5)
    assert not out[1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 3])
def test_nothing_is_read_past_the_last_slot(parts: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A static cache that is full: more tokens have come than were written."""
    monkeypatch.setattr(module, "splits_of", lambda q, k: parts)
    start = torch.zeros(1, 2, dtype=torch.int32, device=device)
    end = torch.tensor([[42, 43]], dtype=torch.int32, device=device)
    q = torch.randn(1, 2, 2, 16, device=device)
    room = cache(2, 1, 60, 16, device)
    room[:, 40:] = float("nan")
    k, v = room[:, :40].split(1)
    with use_backend("triton", "attention"), forced_tile("decode_attention", SMALL), poisoned():
        out = attention(q, k, v, start, end)
        assert torch.equal(out, attention(q, k, v, start, end.clamp(max=40)))
    assert out.isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_the_program_that_finishes_last_merges(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in any order give the same bits, and the counters are zeros again: one object serves several calls."""
    from triton.runtime.interpreter import interpreter_builder

    splits, key_heads, batch = 5, 2, 2
    order = [(x, y, z) for x in range(splits) for y in range(key_heads) for z in range(batch)]
    shuffled = dict(zip(order, random.Random(seed).sample(order, len(order)), strict=True))
    place = interpreter_builder.set_grid_idx
    start = torch.zeros(batch, 2, dtype=torch.int32)
    ranges = KeyRanges(start, torch.tensor([[69, 70], [40, 41]], dtype=torch.int32))
    q, (k, v) = torch.randn(batch, 2, 4, 16), (cache(batch, key_heads, 80, 16, "cpu") for _ in range(2))
    expected, _ = dense_attention(*(x.double() for x in (q, k, v)), *ranges, 0.25)
    monkeypatch.setattr(module, "splits_of", lambda q, k: splits)
    with use_backend("triton", "attention"), forced_tile("decode_attention", SMALL), poisoned(), torch.no_grad():
        in_order = range_attention(q, k, v, ranges)
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *at: place(*shuffled[at]))
        for _ in range(2):
            assert torch.equal(range_attention(q, k, v, ranges), in_order)
    assert not module.finished_of(ranges, k, splits).any()
    torch.testing.assert_close(in_order.double(), expected, rtol=1e-5, atol=1e-6)


def test_one_launch_at_the_shape_of_llava_7b() -> None:
    """32 heads of 128 over 768 keys, on an H100: the splits of a head are merged in the same launch."""
    meta = torch.device("meta")
    q, k = torch.empty(1, 1, 32, 128, device=meta), torch.empty(1, 1200, 32, 128, device=meta)
    ranges = KeyRanges(*torch.zeros(2, 1, 1, dtype=torch.int32, device=meta))
    with recorded(dry=True, architecture="sm_90") as launched:
        assert module.splits_of(q, k) == 9
        for _ in range(2):
            module.decode_attention(q, k, k, ranges, 0.1)
    assert [launch.name for launch in launched] == ["_decode_attention_kernel"] * 2
    counters = [launch.args[launch.kernel.arg_names.index("finished_ptr")] for launch in launched]
    assert counters[0] is counters[1]  # filled with zeros once a pass


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [32, 8])
def test_kernels_at_the_sizes_of_models(key_heads: int, dtype: torch.dtype) -> None:
    start = torch.tensor([[0], [100]], device="cuda", dtype=torch.int32)
    end = torch.tensor([[768], [1500]], device="cuda", dtype=torch.int32)
    q = torch.randn(2, 1, 32, 128, device="cuda", dtype=dtype)
    k, v = (cache(2, key_heads, 2048, 128, "cuda", dtype) for _ in range(2))
    tensors = {"q_BTHd": q, "k_BSGd": k, "v_BSGd": v, "start_BT": start, "end_BT": end}
    kernels = ["decode_attention_kernel"]
    check_kernel(
        lambda **t: attention(**t), tensors, op="attention", kernels=kernels, frozen=("q_BTHd", "k_BSGd", "v_BSGd")
    )


@pytest.mark.gpu
def test_a_graph_replays_as_the_cache_fills() -> None:
    q = torch.randn(1, 1, 8, 64, device="cuda", dtype=torch.float16)
    k, v = (cache(1, 8, 1024, 64, "cuda", torch.float16) for _ in range(2))
    start = torch.zeros(1, 1, device="cuda", dtype=torch.int32)
    end = torch.full_like(start, 10)
    with use_backend("triton", "attention"), torch.no_grad():
        attention(q, k, v, start, end)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(q, k, v, start, end)
        for filled in (10, 500, 1024):
            end.fill_(filled)
            graph.replay()
            assert torch.equal(out, attention(q, k, v, start, end))


@pytest.mark.parametrize("device", DEVICES)
def test_who_decodes(device: str) -> None:
    """Few queries without gradients; with them, or more queries, the ordinary kernels run."""
    k = cache(1, 1, 20, 16, device)
    for tokens, requires_grad, expected in (
        (1, False, "decode"),
        (4, False, "decode"),
        (5, False, "fwd"),
        (1, True, "fwd"),
    ):
        q = torch.randn(1, tokens, 1, 16, device=device, requires_grad=requires_grad)
        ranges = torch.zeros(1, tokens, device=device).int(), torch.full((1, tokens), 20, device=device).int()
        with use_backend("triton", "attention"), recorded() as launched:
            attention(q, k, k, *ranges)
        assert expected in launched[0].name


def test_parts_fill_the_device_and_are_not_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "multiprocessors", lambda device: 100)
    q = torch.empty(1, 1, 32, 128)
    for batch, slots, expected in ((1, 2048, 7), (1, 512, 4), (1, 100, 1), (8, 2048, 1), (0, 2048, 16)):
        k = torch.empty(batch, slots, 32, 128, device="meta")
        assert module.splits_of(q, k) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    q, k = torch.randn(1, 1, 2, 16, device=device), cache(1, 1, 5, 16, device)
    ranges = torch.zeros(1, 1, device=device).int(), torch.full((1, 1), 5, device=device).int()
    torch.library.opcheck(module._decode_op, (q, k, k, *ranges, 0.25))


def test_tiles_on_offer_to_the_tuner_agree() -> None:
    device = torch.device("cpu")
    for e in module.examples(device, torch.float32):
        assert tune.verified(e.kernel, e.call, tile(e.kernel, e.key, device), e.tiles[::7]) == [*e.tiles[::7]]
