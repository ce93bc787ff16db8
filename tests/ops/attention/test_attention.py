"""Attention by key ranges against a dense mask in float64, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit import vectors

from llava_fast.backend import use_backend
from llava_fast.ops import attention as module
from llava_fast.ops.attention import KeyRanges, attention, attention_weights_reference
from llava_fast.sequence import key_ranges, pack

quick = settings(max_examples=120, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with use_backend("reference"):
        yield
    torch.set_num_threads(threads)


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, end: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, T, H, d] and LSE [B, H, T], query by query."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=q.dtype)
    rows = []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            keys = slice(int(start[b, t]), int(end[b, t]))
            if keys.stop > keys.start:
                scores = torch.einsum("hd,shd->hs", q[b, t], k[b, keys]) * scale
                lse[b, :, t] = scores.logsumexp(-1).detach()
                rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[b, keys]))
            else:
                rows.append(0 * q[b, t])
    return torch.stack(rows).view_as(out) if rows else out, lse


@contextmanager
def path_taken() -> Iterator[list[str]]:
    """Which way attention went inside the block: "masked", or the kind of each SDPA call of a plan."""
    taken: list[str] = []
    masked, sdpa = module._masked_attention, module._sdpa

    def spy_masked(*args: object) -> torch.Tensor:
        taken.append("masked")
        return masked(*args)

    def spy_sdpa(q, k, v, mask, causal, scale) -> torch.Tensor:
        taken.append("causal" if causal else "full" if mask is None else "ranges")
        return sdpa(q, k, v, mask, causal, scale)

    module._masked_attention, module._sdpa = spy_masked, spy_sdpa
    try:
        yield taken
    finally:
        module._masked_attention, module._sdpa = masked, sdpa


def check(
    start: torch.Tensor,
    end: torch.Tensor,
    keys: int,
    *,
    heads: int = 4,
    key_heads: int = 2,
    dim: int = 8,
    scale: float | None = None,
    strided: bool = False,
    seed: int = 0,
) -> list[str]:
    """Forward, LSE and gradients against the dense oracle; returns the path taken."""
    batch, tokens = start.shape
    generator = torch.Generator().manual_seed(seed)

    def tensor(length: int, count: int) -> torch.Tensor:
        if strided:  # as transformers' caches have it: [B, G, S, d], with room to spare
            wide = torch.randn(batch, count, length + 3, dim, generator=generator)
            return wide[:, :, 2 : 2 + length].transpose(1, 2)
        return torch.randn(batch, length, count, dim, generator=generator)

    q, k, v = tensor(tokens, heads), tensor(keys, key_heads), tensor(keys, key_heads)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    with path_taken() as taken:
        out, lse = attention(*inputs, start, end, scale=scale, return_lse=True)
    plain = attention(*inputs, start, end, scale=scale)
    assert torch.equal(plain, out)
    expected, expected_lse = dense_attention(*exact, start, end, scale if scale is not None else dim**-0.5)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    empty = end <= start
    assert not out[empty].any()

    weight = torch.randn(out.shape, generator=generator)
    out.backward(weight)
    expected.backward(weight.double())
    for x, reference in zip(inputs, exact, strict=True):
        wanted = torch.zeros_like(reference) if reference.grad is None else reference.grad
        torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-4, atol=5e-6)
        assert x.grad.isfinite().all()
    assert not inputs[0].grad[empty].any()
    unseen = torch.ones(batch, keys, dtype=torch.bool)
    for b in range(batch):
        for t in range(tokens):
            unseen[b, int(start[b, t]) : int(end[b, t])] = False
    assert not inputs[1].grad[unseen].any()
    assert not inputs[2].grad[unseen].any()
    return taken


@st.composite
def packs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of samples, each causal, full or with an image that sees itself, with empty rows between them."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    start = torch.arange(tokens, dtype=torch.int32).repeat(batch, 1)
    end = start.clone()
    for b in range(batch):
        at = 0
        while at < tokens:
            length = draw(st.integers(1, min(9, tokens - at)))
            kind = draw(st.sampled_from(["causal", "causal", "full", "image", "empty"]))
            sample = slice(at, at + length)
            if kind != "empty":
                start[b, sample] = at
                end[b, sample] = torch.arange(at + 1, at + length + 1)
            if kind == "full":
                end[b, sample] = at + length
            if kind == "image":
                first = draw(st.integers(0, length - 1))
                last = draw(st.integers(first, length - 1))
                end[b, at + first : at + last + 1] = at + last + 1
            at += length
    return start, end


@st.composite
def any_ranges(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Whatever the contract allows: neither vector ever decreases; T and S differ."""
    batch, tokens, keys = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 16))
    bounds = st.lists(st.integers(0, keys), min_size=tokens, max_size=tokens)
    a = torch.tensor([sorted(draw(bounds)) for _ in range(batch)], dtype=torch.int32)
    b = torch.tensor([sorted(draw(bounds)) for _ in range(batch)], dtype=torch.int32)
    return torch.minimum(a, b), torch.maximum(a, b), keys


heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)])


@given(packs(), heads, st.booleans(), st.sampled_from([1, 8, 12]))
@quick
def test_packs(ranges: tuple, heads: tuple[int, int], strided: bool, dim: int) -> None:
    start, end = ranges
    taken = check(start, end, start.shape[1], heads=heads[0], key_heads=heads[1], dim=dim, strided=strided)
    if start.shape[1] > 1 and (end > start).any():
        assert "masked" not in taken


@given(any_ranges(), heads, st.booleans())
@example((torch.zeros(1, 1).int(), torch.zeros(1, 1).int(), 1), (1, 1), False)
@example((torch.tensor([[0, 0, 2]]).int(), torch.tensor([[1, 3, 3]]).int(), 3), (4, 2), True)
@quick
def test_any_ranges(ranges: tuple, heads: tuple[int, int], strided: bool) -> None:
    start, end, keys = ranges
    check(start, end, keys, heads=heads[0], key_heads=heads[1], strided=strided)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 0), (0, 3)])
def test_without_queries_gradients_are_zeros(batch: int, tokens: int) -> None:
    q, k, v = (torch.randn(batch, n, 2, 8, requires_grad=True) for n in (tokens, 5, 5))
    ranges = torch.zeros(batch, tokens, dtype=torch.int32)
    out, lse = attention(q, k, v, ranges, ranges, return_lse=True)
    assert out.shape == q.shape and lse.shape == (batch, 2, tokens)
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad.shape == x.shape and not x.grad.any()


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("tokens", [256, 257, 385, 768, 769])
def test_causal_attention_in_blocks(tokens: int, key_heads: int) -> None:
    shapes = [(1, tokens, heads, 8) for heads in (4, key_heads, key_heads)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    dout, ranges = torch.randn(shapes[0], dtype=torch.float64), key_ranges(1, tokens, torch.device("cpu"))
    ours = [x.float().requires_grad_() for x in tensors]
    truth = [x.requires_grad_() for x in tensors]
    found = attention(*ours, *ranges)
    weights, _ = attention_weights_reference(*truth[:2], ranges, 8**-0.5)
    values = truth[2].repeat_interleave(4 // key_heads, dim=2)
    expected = torch.einsum("bhts,bshd->bthd", weights, values)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found.backward(dout.float())
    expected.backward(dout)
    for x, reference in zip(ours, truth, strict=True):
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


def test_each_path_is_taken() -> None:
    causal = vectors(2, 7, torch.device("cpu"))
    assert check(*causal, 7) == ["causal"]  # whole rows
    full = torch.zeros(2, 7).int(), torch.full((2, 7), 7).int()
    assert check(*full, 7) == ["full"]
    packed = pack([5, 4, 9])  # one call for samples of similar length
    assert check(packed.key_start, packed.key_end, 18) == ["causal", "causal"]
    with_image = pack([8, 4], [[(2, 3)], []], bidirectional_images=True)
    assert sorted(check(with_image.key_start, with_image.key_end, 12)) == ["causal", "ranges"]
    two_images = torch.tensor([[0, 0, 0, 3, 3]]).int(), torch.tensor([[3, 3, 3, 5, 5]]).int()
    assert check(*two_images, 5) == ["full", "full"]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert check(*vectors(2, 6, torch.device("cpu"), attention_mask=mask), 6) == ["causal"]
    window = vectors(1, 9, torch.device("cpu"), sliding_window=3)
    assert check(*window, 9) == ["masked", "ranges"]
    step = torch.zeros(2, 1).int(), torch.full((2, 1), 5).int()
    assert check(*step, 5) == ["full"]  # decoding: every key is seen
    padded_step = torch.tensor([[2], [0]]).int(), torch.tensor([[5], [5]]).int()
    assert check(*padded_step, 5) == ["masked", "ranges"]
    assert check(torch.zeros(1, 2).int(), torch.tensor([[4, 5]]).int(), 8) == ["masked", "ranges"]
    nothing = torch.arange(4)[None].int()
    assert check(nothing, nothing, 4) == ["masked", "ranges"]


def test_vectors_that_changed_since_the_last_call() -> None:
    packed = pack([5, 4, 9])
    start, end = packed.key_start, packed.key_end
    assert check(start, end, 18) == ["causal", "causal"]
    end[0, :5] = 5  # the first sample becomes an image; the tensors are the same
    assert sorted(check(start, end, 18)) == ["causal", "causal", "full"]
    start[0, :] = 0
    end[0, :] = torch.arange(1, 19)
    assert check(start, end, 18) == ["causal"]


def test_a_sample_does_not_depend_on_the_pack_around_it() -> None:
    lengths = [6, 11, 3]
    packed = pack(lengths)
    q, k, v = (torch.randn(1, 20, n, 16) for n in (4, 2, 2))
    out = attention(q, k, v, packed.key_start, packed.key_end)
    for first, length in zip((0, 6, 17), lengths, strict=True):
        part = slice(first, first + length)
        alone = pack([length])
        expected = attention(q[:, part], k[:, part], v[:, part], alone.key_start, alone.key_end)
        torch.testing.assert_close(out[:, part], expected, rtol=1e-6, atol=1e-6)


def test_keys_out_of_sight_may_hold_anything() -> None:
    """A static cache has garbage behind its filled length; samples of a pack may be infinite."""
    q, k, v = (torch.randn(1, 3, 2, 8) for _ in range(3))
    k2, v2 = (torch.cat((x, torch.full((1, 4, 2, 8), 1e30)), 1) for x in (k, v))
    start, end = torch.zeros(1, 3).int(), torch.tensor([[1, 2, 3]]).int()
    expected = attention(q, k, v, start, end)
    torch.testing.assert_close(attention(q, k2, v2, start, end), expected)
    packed = pack([3, 4])
    q2 = torch.cat((q, torch.full((1, 4, 2, 8), float("nan"))), 1)
    k2, v2 = (torch.cat((x, torch.full((1, 4, 2, 8), float("nan"))), 1) for x in (k, v))
    torch.testing.assert_close(attention(q2, k2, v2, packed.key_start, packed.key_end)[:, :3], expected)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_scale(scale: float) -> None:
    packed = pack([5, 4])
    check(packed.key_start, packed.key_end, 9, scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    packed = pack([5, 4, 9])
    q, k, v = (torch.randn(1, 18, n, 16, dtype=dtype) for n in (4, 2, 2))
    out = attention(q, k, v, packed.key_start, packed.key_end)
    assert out.dtype == dtype
    exact = (q.double(), k.double(), v.double())
    expected, _ = dense_attention(*exact, packed.key_start, packed.key_end, 0.25)
    error = (out.double() - expected).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize(("batch", "tokens", "keys"), [(0, 3, 3), (2, 0, 4), (2, 0, 0)])
def test_nothing_to_do(batch: int, tokens: int, keys: int) -> None:
    q, k = torch.randn(batch, tokens, 4, 8), torch.randn(batch, keys, 2, 8)
    ranges = torch.zeros(batch, tokens).int()
    out, lse = attention(q, k, k, ranges, ranges, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (batch, 4, tokens)


def test_weights_by_the_definition() -> None:
    packed = pack([3, 4])
    empty = torch.arange(7)[None].int()
    q, k = torch.randn(1, 7, 4, 8), torch.randn(1, 7, 2, 8)
    weights, lse = attention_weights_reference(q, k, KeyRanges(packed.key_start, packed.key_end), 0.5)
    assert weights.shape == (1, 4, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 7))
    v = torch.randn(1, 7, 2, 8)
    out = torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, attention(q, k, v, packed.key_start, packed.key_end, scale=0.5))
    weights, lse = attention_weights_reference(q, k, KeyRanges(empty, empty), 0.5)
    assert not weights.any()
    assert (lse == float("-inf")).all()


def test_shapes_that_do_not_fit() -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8)
    ranges = torch.zeros(2, 3).int()
    for bad_k, bad_v in ((k, k[:, 1:]), (k[:1], k[:1]), (k[..., :4], k[..., :4])):
        with pytest.raises(ValueError, match="do not fit"):
            attention(q, bad_k, bad_v, ranges, ranges)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3 key heads"):
        attention(q, torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8), ranges, ranges)
    for bad in (ranges[:1], ranges[:, :2], torch.zeros(2, 5).int()):
        with pytest.raises(ValueError, match="key ranges"):
            attention(q, k, k, bad, ranges)
        with pytest.raises(ValueError, match="key ranges"):
            attention(q, k, k, ranges, bad)


def test_compiles() -> None:
    torch._dynamo.reset()
    packed = pack([3, 4])
    q, k, v = (torch.randn(1, 7, n, 8) for n in (4, 2, 2))
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(q, k, v, packed.key_start, packed.key_end), attention(q, k, v, packed.key_start, packed.key_end)
    )
