"""The attention kernels by the kit's rules: forward, log-sum-exp and all gradients against float64.

In the interpreter tiles are 16 × 16, so that short sequences have several; a GPU runs the tiles that ship.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from kit import ALSO_HALF, DEVICES, check_kernel, in_every_dtype, poisoned, run, vectors

from benchmarks import tune
from llava_fast.backend import BackendUnavailable, use_backend
from llava_fast.ops import attention as module
from llava_fast.ops._launch import forced_tile, recorded, tile
from llava_fast.ops.attention import KeyRanges, attention
from llava_fast.sequence import pack

FORWARD = ["attention_fwd_kernel"]
KERNELS = [*FORWARD, "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel"]
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
# Tiles whose last rows may be few.
TALL = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
# Keys in tiles wider than a head, as they ship for heads of 32.
WIDE = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
CPU = torch.device("cpu")


@contextmanager
def all_tiles(tile: dict[str, int]) -> Iterator[None]:
    with ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(forced_tile(kernel.removesuffix("_kernel"), tile))
        yield


@pytest.fixture(autouse=True)
def _small_tiles() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with nullcontext() if torch.cuda.is_available() else all_tiles(SMALL):
        yield
    torch.set_num_threads(threads)


def padded(*rows: tuple[int, int, int]) -> torch.Tensor:
    """Attention mask of rows that are (left padding, real tokens, right padding)."""
    return torch.tensor([[0] * left + [1] * real + [0] * right for left, real, right in rows])


def of_pack(lengths, spans=None) -> tuple[torch.Tensor, torch.Tensor]:
    packed = pack(lengths, spans, bidirectional_images=spans is not None)
    return packed.key_start, packed.key_end


def whole(batch: int, tokens: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(batch, tokens).int(), torch.full((batch, tokens), keys).int()


# name: (start and end, keys, query heads, key heads, head dimension)
CASES = {
    "causal": (vectors(2, 37, CPU), 37, 2, 2, 16),
    "window": (vectors(1, 50, CPU, sliding_window=19), 50, 2, 1, 16),
    "padded": (vectors(3, 35, CPU, attention_mask=padded((13, 22, 0), (0, 18, 17), (0, 35, 0))), 35, 1, 1, 16),
    "packed": (of_pack([5, 33, 1, 1, 17]), 57, 2, 1, 16),
    "images": (of_pack([30, 24], [[(3, 20)], [(0, 4), (10, 14)]]), 54, 2, 1, 16),
    "gqa": (of_pack([20, 3]), 23, 6, 2, 16),
    "cached": (vectors(2, 19, CPU, past=23), 42, 2, 1, 16),
    "few keys": (whole(2, 33, 3), 3, 1, 1, 16),
    "single": (whole(3, 1, 1), 1, 2, 1, 16),
    "tower": (whole(1, 37, 37), 37, 2, 2, 24),
    "odd dimension": (of_pack([9, 18]), 27, 1, 1, 5),
    "two blocks of columns": (of_pack([9, 18]), 27, 1, 1, 72),
    "wide": (whole(1, 5, 5), 5, 1, 1, 136),
}


def inputs(case: str | tuple, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    (start, end), keys, heads, key_heads, dim = CASES[case] if isinstance(case, str) else case
    batch, tokens = start.shape
    shapes = {"q": (tokens, heads), "k": (keys, key_heads), "v": (keys, key_heads)}
    tensors = {name: torch.randn(batch, *shape, dim).to(device, dtype) for name, shape in shapes.items()}
    return {**tensors, "start": start.to(device), "end": end.to(device)}


def with_lse(**tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return attention(**rename(tensors), return_lse=True)


def without_lse(**tensors: torch.Tensor) -> torch.Tensor:
    return attention(**rename(tensors))


def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"q": "q_BTHd", "k": "k_BSGd", "v": "v_BSGd", "start": "start_BT", "end": "end_BT"}
    return {names[name]: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), in_every_dtype(CASES, half=("gqa", "cached", "two blocks of columns")))
def test_kernels(name: str, dtype: torch.dtype, device: str) -> None:
    draws = [inputs(name, dtype, device) for _ in range(3)]  # largest errors of small tensors are luck
    empty = (draws[0]["end"] <= draws[0]["start"]).any()
    check_kernel(without_lse if empty else with_lse, *draws, op="attention", kernels=KERNELS)


TAILS = {
    "tower": (whole(2, 65, 65), 65, 1, 1, 16),  # as 577 is 9 · 64 + 1
    "some rows": (whole(1, 42, 42), 42, 2, 1, 24),
    "too many rows": (whole(1, 51, 51), 51, 1, 1, 16),
    "packed": (of_pack([33, 1, 37]), 71, 2, 1, 16),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), in_every_dtype(TAILS, half=("some rows",)))
def test_what_is_left_of_a_walk(name: str, dtype: torch.dtype, device: str) -> None:
    with all_tiles(TALL):
        check_kernel(with_lse, inputs(TAILS[name], dtype, device), op="attention", kernels=KERNELS)


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [84, 100])
def test_keys_that_are_left_where_tiles_are_wider_than_heads(tokens: int, dtype: torch.dtype, device: str) -> None:
    case = whole(1, 17, tokens), tokens, 1, 1, 24
    with all_tiles(WIDE):
        check_kernel(with_lse, inputs(case, dtype, device), op="attention", kernels=KERNELS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 32, 64, 72, 80, 96, 128, 160, 192, 256])
def test_kernels_at_the_sizes_of_models(dim: int, dtype: torch.dtype) -> None:
    """Packs of 832-token samples with images, padded batches and 577-token towers."""
    spans = [[(35, 576)], [(35, 576)], []]
    for ranges in (of_pack([832, 640, 17], spans), vectors(2, 832, CPU), whole(2, 577, 577)):
        start, end = (x.cuda() for x in ranges)
        q, k, v = (torch.randn(*start.shape, heads, dim, device="cuda", dtype=dtype) for heads in (8, 4, 4))
        tensors = {"q": q, "k": k, "v": v, "start": start, "end": end}
        check_kernel(with_lse, tensors, op="attention", kernels=KERNELS)


@st.composite
def canonical_ranges(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Whatever the contract allows: neither vector ever decreases; T and S differ; samples, spans, empty rows."""
    tokens, keys = draw(st.integers(1, 36)), draw(st.integers(1, 40))
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, keys), min_size=2 * tokens, max_size=2 * tokens)))
        shift = draw(st.integers(0, tokens))
        return torch.tensor([cuts[:tokens]]).int(), torch.tensor([cuts[shift : shift + tokens]]).int(), keys
    start, end = torch.arange(tokens), torch.arange(tokens)
    at = 0
    while at < tokens:
        length = draw(st.integers(1, tokens - at))
        sample, kind = slice(at, at + length), draw(st.sampled_from(["causal", "full", "image", "window", "empty"]))
        index = torch.arange(at, at + length)
        if kind != "empty":
            start[sample], end[sample] = at, index + 1
        if kind == "full":
            end[sample] = at + length
        if kind == "image":
            first = draw(st.integers(0, length - 1))
            last = draw(st.integers(first, length - 1))
            end[at + first : at + last + 1] = at + last + 1
        if kind == "window":
            start[sample] = (index - draw(st.integers(1, 20))).clamp(min=at)
        at += length
    return start[None].int(), end[None].int(), tokens


@given(canonical_ranges(), st.sampled_from([(1, 1), (2, 1)]), st.booleans(), st.sampled_from([SMALL, TALL]))
@example((torch.tensor([[0, 0, 2]]).int(), torch.tensor([[1, 3, 3]]).int(), 3), (2, 1), True, SMALL)
@example((torch.tensor([[7, 7]]).int(), torch.tensor([[7, 7]]).int(), 9), (1, 1), False, SMALL)
# A failing example is small already, and the interpreter too slow to shrink it.
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
def test_any_ranges(ranges: tuple, heads: tuple[int, int], strided: bool, tiles: dict[str, int]) -> None:
    start, end, keys = ranges
    device = "cuda" if torch.cuda.is_available() else "cpu"
    end = torch.maximum(start, end)

    def tensor(length: int, count: int) -> torch.Tensor:
        wide = torch.randn(1, count, length + 3, 16, device=device)  # as transformers' caches lie
        return wide[:, :, 2 : 2 + length].transpose(1, 2) if strided else wide[:, :, :length].transpose(1, 2).clone()

    q, k, v = tensor(start.shape[1], heads[0]), tensor(keys, heads[1]), tensor(keys, heads[1])
    tensors = {"q": q, "k": k, "v": v, "start": start.to(device), "end": end.to(device)}
    gradient = torch.randn(q.shape, device=device)
    own_tiles = nullcontext() if device == "cuda" else all_tiles(tiles)
    with use_backend("triton", "attention"), own_tiles, recorded() as launched, poisoned():
        found = run(without_lse, tensors, [gradient])
    assert [launch.name.strip("_") for launch in launched] == KERNELS
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    for name, expected in run(without_lse, doubles, [gradient.double()]).items():
        torch.testing.assert_close(
            found[name].double(), expected, rtol=1e-5, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    empty = tensors["end"] <= tensors["start"]
    assert not found["out0"][empty].any()
    assert not found["dq"][empty].any()


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_row_has_no_lse(device: str) -> None:
    tensors = inputs("padded", torch.float32, device)
    with use_backend("triton", "attention"):
        _, lse = with_lse(**tensors)
    _, expected = with_lse(**tensors)
    empty = tensors["end"] <= tensors["start"]
    assert torch.equal((lse == float("-inf")).any(1), empty)
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("length", "spans", "tiles"),
    [(37, None, SMALL), (37, [(2, 20)], SMALL), (33, None, TALL), (33, [(0, 33)], TALL)],
    ids=["causal", "image", "causal, a row left", "image, a row left"],
)
def test_a_sample_is_the_same_bits_in_every_pack(length: int, spans: list | None, tiles: dict, device: str) -> None:
    heads = (2, 1, 1)
    own = [torch.randn(1, length, count, 16, device=device) for count in heads]
    own_gradient = torch.randn(1, length, 2, 16, device=device)

    def results(before: list[int], after: list[int]) -> list[torch.Tensor]:
        lengths, first = [*before, length, *after], sum(before)
        every = None if spans is None else [[]] * len(before) + [spans] + [[]] * len(after)
        start, end = (x.to(device) for x in of_pack(lengths, every))
        place = slice(first, first + length)

        def among(part: torch.Tensor) -> torch.Tensor:
            full = torch.randn(1, sum(lengths), *part.shape[2:], device=device)
            full[:, place] = part
            return full

        q, k, v = (among(part).requires_grad_() for part in own)
        with use_backend("triton", "attention"), nullcontext() if device == "cuda" else all_tiles(tiles):
            out, lse = attention(q, k, v, start, end, return_lse=True)
            gradients = torch.autograd.grad((out, lse), (q, k, v), (among(own_gradient), torch.ones_like(lse)))
        return [x[:, place] for x in (out, lse.transpose(1, 2), *gradients)]

    alone = results([], [])
    for before, after in (([5], []), ([16], [3]), ([20, 1, 9], [21])):
        for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), alone, results(before, after), strict=True):
            assert torch.equal(one, other), f"{name} after {before} and before {after}"


@pytest.mark.parametrize("device", DEVICES)
def test_runs_agree_to_the_bit(device: str) -> None:
    tensors = inputs("gqa", torch.float32, device)
    gradient = [torch.randn_like(tensors["q"])]
    with use_backend("triton", "attention"):
        first, second = (run(without_lse, tensors, gradient) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_frozen_inputs_and_a_gradient_of_the_lse_alone(dtype: torch.dtype, device: str) -> None:
    tensors = inputs("gqa", dtype, device)
    check_kernel(without_lse, tensors, op="attention", kernels=KERNELS, frozen=("k", "v"))
    check_kernel(lambda **t: with_lse(**t)[1], tensors, op="attention", kernels=KERNELS)
    check_kernel(without_lse, tensors, op="attention", kernels=FORWARD, frozen=("q", "k", "v"))


@pytest.mark.parametrize("device", DEVICES)
def test_other_samples_may_hold_anything(device: str) -> None:
    start, end = (x.to(device) for x in of_pack([7, 20]))
    q, k, v = (torch.randn(1, 27, 1, 16, device=device) for _ in range(3))
    with use_backend("triton", "attention"):
        expected = attention(q, k, v, start, end)[:, :7]
        for x in (q, k, v):
            x[:, 7:] = float("nan")
        assert torch.equal(attention(q, k, v, start, end)[:, :7], expected)


def test_what_the_kernels_do_not_take() -> None:
    start, end = whole(1, 3, 3)
    q = torch.randn(1, 3, 1, 16)
    for bad, why in (
        (torch.randn(1, 3, 1, 257), "head dimension 257"),
        (q.double(), "float64"),
        (torch.randn(1, 3, 1, 32)[..., ::2], "not contiguous"),
    ):
        with use_backend("triton", "attention"), pytest.raises(BackendUnavailable, match=why):
            attention(bad, bad, bad, start, end)
    with pytest.raises(ValueError, match="scale is 0"):
        attention(q, q, q, start, end, scale=0)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    start, end = (x.to(device) for x in of_pack([2, 1]))  # opcheck runs the kernels dozens of times
    q, k, v = (torch.randn(1, 3, 1, 8, device=device, requires_grad=True) for _ in range(3))
    ranges = KeyRanges(start, end)
    arguments = (q, k, v, start, end, ranges.first_BT, ranges.seen_by(k.shape[1]), 0.25)
    torch.library.opcheck(module._attention_op, arguments)
    with torch.no_grad():
        out, lse = torch.ops.llava_fast.attention(*arguments)
        for dlse in (None, torch.randn_like(lse)):
            backward = (torch.randn_like(out), dlse, *arguments[:-1], out, lse, 0.25)
            torch.library.opcheck(module._attention_backward_op, backward)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device: str) -> None:
    torch._dynamo.reset()
    tensors = inputs("gqa", torch.float32, device)
    gradient = [torch.randn_like(tensors["q"])]
    with use_backend("triton", "attention"):
        expected = run(without_lse, tensors, gradient)
        with recorded() as launched:
            found = run(torch.compile(without_lse, fullgraph=True, backend="aot_eager"), tensors, gradient)
    assert [launch.name.strip("_") for launch in launched] == KERNELS
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_tiles_on_offer_to_the_tuner_agree() -> None:
    offered = [example for example in module.examples(CPU, torch.float32) if example.tiles]
    assert [(e.kernel, e.key) for e in offered if e.kernel != "decode_attention"] == [
        (kernel.removesuffix("_kernel"), f"{dim} fp32") for dim in (64, 128) for kernel in KERNELS
    ]
    for e in offered[:3]:
        assert tune.verified(e.kernel, e.call, tile(e.kernel, e.key, CPU), e.tiles[::7]) == e.tiles[::7]
