"""Key ranges from the host and from the device say the same, and always in canonical form."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fast.sequence import key_ranges, pack

CPU = torch.device("cpu")
quick = settings(max_examples=150, deadline=None, derandomize=True)


def assert_canonical(start: torch.Tensor, end: torch.Tensor, keys: int, past: int = 0) -> None:
    """int32, never decreasing, inside the keys; an empty row has start = end = its own index."""
    assert start.dtype == end.dtype == torch.int32
    assert start.shape == end.shape
    assert (start.diff(dim=1) >= 0).all()
    assert (end.diff(dim=1) >= 0).all()
    assert (start >= 0).all()
    assert (start <= end).all()
    assert (end <= keys).all()
    index = (torch.arange(start.shape[1]) + past).expand_as(start)
    empty = start == end
    assert torch.equal(start[empty], index[empty].int())


def visible(start: torch.Tensor, end: torch.Tensor, keys: int) -> torch.Tensor:
    """[B, T, S] bool, key by key."""
    key = torch.arange(keys)
    return (key >= start[..., None]) & (key < end[..., None])


@st.composite
def samples(draw: st.DrawFn) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Lengths of samples and the image spans in each, touching or apart, at the edges or inside."""
    lengths, spans = [], []
    tokens = draw(st.integers(1, 5))
    for _ in range(draw(st.integers(1, 6))):
        length, inside = 0, []
        for kind in draw(st.lists(st.sampled_from(["text", "image"]), min_size=1, max_size=5)):
            if kind == "image":
                inside.append((length, tokens))
                length += tokens
            else:
                length += draw(st.integers(1, 6))
        lengths.append(length)
        spans.append(inside)
    return lengths, spans


def dense(lengths: list[int], spans: list[list[tuple[int, int]]], bidirectional: bool) -> torch.Tensor:
    """[T, T] bool by the definition: causal inside each sample, and an image sees all of itself."""
    total = sum(lengths)
    mask = torch.zeros(total, total, dtype=torch.bool)
    offset = 0
    for length, inside in zip(lengths, spans, strict=True):
        mask[offset : offset + length, offset : offset + length] = torch.ones(length, length).tril().bool()
        for first, count in inside if bidirectional else ():
            image = slice(offset + first, offset + first + count)
            mask[image, image] = True
        offset += length
    return mask


@given(samples(), st.booleans())
@quick
def test_pack_is_the_dense_mask(drawn: tuple, bidirectional: bool) -> None:
    lengths, spans = drawn
    packed = pack(lengths, spans, bidirectional_images=bidirectional)
    total = sum(lengths)
    assert packed.lengths == (None if bidirectional else tuple(lengths))
    assert_canonical(packed.key_start, packed.key_end, total)
    assert torch.equal(visible(packed.key_start, packed.key_end, total)[0], dense(lengths, spans, bidirectional))
    assert packed.position_ids.dtype == torch.int64
    assert packed.position_ids.tolist() == [[i for length in lengths for i in range(length)]]


@given(samples(), st.booleans())
@quick
def test_positions_on_the_device_give_the_same_as_the_host(drawn: tuple, bidirectional: bool) -> None:
    lengths, spans = drawn
    packed = pack(lengths, spans, bidirectional_images=bidirectional)
    total = sum(lengths)
    image_mask, image_tokens = None, 1
    if bidirectional:
        image_mask = torch.zeros(1, total, dtype=torch.bool)
        for first, inside in zip(accumulate([0, *lengths[:-1]]), spans, strict=True):
            for start, count in inside:
                image_mask[0, first + start : first + start + count] = True
                image_tokens = count
    start, end = key_ranges(
        1, total, CPU, position_ids=packed.position_ids, image_mask=image_mask, image_tokens=image_tokens
    )
    assert torch.equal(start, packed.key_start)
    assert torch.equal(end, packed.key_end)


@given(
    rows=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    extra=st.integers(0, 4),
    side=st.sampled_from(["left", "right"]),
    window=st.none() | st.integers(1, 14),
    past=st.integers(0, 8),
    data=st.data(),
)
@quick
def test_padding_windows_and_caches_are_the_dense_mask(
    rows: list[int], extra: int, side: str, window: int | None, past: int, data: st.DataObject
) -> None:
    """Query t of row b has index past + t; it sees real keys up to itself, at most `window` of them."""
    keys = max(max(rows) + extra, past + 1)
    mask = torch.zeros(len(rows), keys, dtype=torch.int64)
    for row, count in enumerate(rows):
        mask[row, slice(keys - count, keys) if side == "left" else slice(0, count)] = 1
    tokens = keys - past
    kind = data.draw(st.sampled_from([torch.int64, torch.bool, torch.float32]))
    start, end = key_ranges(len(rows), tokens, CPU, past=past, attention_mask=mask.to(kind), sliding_window=window)
    assert_canonical(start, end, keys, past)
    query, key = torch.arange(past, keys)[:, None], torch.arange(keys)
    expected = (key <= query) & (key > query - (window or keys + 1))
    expected = expected & mask.bool()[:, None, :] & mask.bool()[:, past:, None]
    assert torch.equal(visible(start, end, keys), expected)
    # A cache of known length and one whose length is a tensor agree.
    as_tensor = key_ranges(
        len(rows), tokens, CPU, past=torch.tensor(past), attention_mask=mask.to(kind), sliding_window=window
    )
    assert torch.equal(as_tensor.start, start)
    assert torch.equal(as_tensor.end, end)


@given(
    rows=st.lists(st.lists(st.sampled_from(["text", "image"]), min_size=1, max_size=6), min_size=1, max_size=4),
    image_tokens=st.integers(1, 4),
    side=st.sampled_from(["left", "right"]),
)
@quick
def test_bidirectional_images_in_padded_batches(rows: list[list[str]], image_tokens: int, side: str) -> None:
    pieces = [[image_tokens if kind == "image" else 2 for kind in row] for row in rows]
    longest = max(sum(row) for row in pieces)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    images = torch.zeros(len(rows), longest, dtype=torch.bool)
    expected = torch.zeros(len(rows), longest, longest, dtype=torch.bool)
    for b, (row, lengths) in enumerate(zip(rows, pieces, strict=True)):
        at = first = longest - sum(lengths) if side == "left" else 0
        mask[b, first : first + sum(lengths)] = 1
        inside = []
        for kind, length in zip(row, lengths, strict=True):
            if kind == "image":
                images[b, at : at + length] = True
                inside.append((at - first, length))
            at += length
        expected[b, first:at, first:at] = dense([at - first], [inside], True)
    start, end = key_ranges(len(rows), longest, CPU, attention_mask=mask, image_mask=images, image_tokens=image_tokens)
    assert_canonical(start, end, longest)
    assert torch.equal(visible(start, end, longest), expected)


@given(samples(), st.integers(1, 9))
@quick
def test_sliding_window_in_packs(drawn: tuple, window: int) -> None:
    lengths, spans = drawn
    total = sum(lengths)
    start, end = key_ranges(1, total, CPU, position_ids=pack(lengths).position_ids, sliding_window=window)
    assert_canonical(start, end, total)
    index = torch.arange(total)
    expected = dense(lengths, spans, False) & (index > index[:, None] - window)
    assert torch.equal(visible(start, end, total)[0], expected)


def test_causal_without_anything() -> None:
    start, end = key_ranges(2, 5, CPU)
    assert start.tolist() == [[0] * 5] * 2
    assert end.tolist() == [[1, 2, 3, 4, 5]] * 2


def test_several_packed_rows() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    start, _ = key_ranges(2, 5, CPU, position_ids=positions)
    assert start.tolist() == [[0, 0, 0, 3, 3], [0, 1, 1, 1, 1]]


def test_positions_shared_by_the_rows() -> None:
    start, end = key_ranges(3, 4, CPU, position_ids=torch.arange(4)[None])
    assert start.shape == end.shape == (3, 4)
    assert not start.any()


def test_positions_do_not_start_documents_once_something_is_cached() -> None:
    positions = torch.tensor([[3, 3, 4]])
    start, end = key_ranges(1, 3, CPU, past=4, position_ids=positions)
    assert not start.any()
    assert end.tolist() == [[5, 6, 7]]


def test_positions_that_start_anywhere_are_one_document() -> None:
    start, _ = key_ranges(1, 4, CPU, position_ids=torch.tensor([[7, 8, 9, 10]]))
    assert not start.any()


def test_an_image_longer_than_what_is_left_of_the_row_stays_inside() -> None:
    image_mask = torch.tensor([[False, True, True]])
    for past in (0, 4):
        _, end = key_ranges(1, 3, CPU, past=past, image_mask=image_mask, image_tokens=5)
        assert end.tolist() == [[past + 1, past + 3, past + 3]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 0, 1], [1, 1, 1]]), "padding between real tokens"),
        (torch.ones(3, 3), r"attention_mask has shape \(3, 3\); expected \[2, tokens\]"),
        (torch.ones(2, 1, 3, 3), "4-D masks are not accepted"),
        (torch.ones(2, 2), "attention_mask covers 2 tokens, but 0 cached \\+ 3 new were given"),
    ],
)
def test_masks_that_are_refused(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        key_ranges(2, 3, CPU, attention_mask=mask)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lengths", "spans", "message"),
    [
        ([3, 0], None, "sample 1 has length 0"),
        ([3, -2], None, "sample 1 has length -2"),
        ([3], None, "needs image_spans"),
        ([3, 4], [[]], "one entry per sample"),
        ([3, 4], [[], [(2, 3)]], r"image span \(2, 3\) is not inside sample 1 of 4 tokens"),
        ([3], [[(-1, 2)]], "is not inside sample 0"),
        ([3], [[(1, 0)]], "is not inside sample 0"),
    ],
)
def test_packs_that_are_refused(lengths: list[int], spans: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(lengths, spans, bidirectional_images=True)


def test_an_empty_pack() -> None:
    packed = pack([])
    assert packed.position_ids.shape == packed.key_start.shape == packed.key_end.shape == (1, 0)


def test_key_ranges_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(key_ranges, fullgraph=True, backend="eager")
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    for actual, expected in zip(
        compiled(2, 4, CPU, attention_mask=mask, sliding_window=2),
        key_ranges(2, 4, CPU, attention_mask=mask, sliding_window=2),
        strict=True,
    ):
        assert torch.equal(actual, expected)
