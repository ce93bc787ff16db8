"""Image features written over the embeddings of the image tokens."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fast.backend import use_backend
from llava_fast.ops.merge import merge


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with use_backend("reference"):
        yield


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans(), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_values_and_gradients(
    batch: int, tokens: int, width: int, by_slots: bool, strided: bool, data: st.DataObject
) -> None:
    flat = data.draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))
    mask = torch.tensor(flat).view(batch, tokens)
    count = int(mask.sum())
    embeds = torch.randn(tokens, batch, width).transpose(0, 1) if strided else torch.randn(batch, tokens, width)
    features = torch.randn(count, width)
    ours = [embeds.clone().requires_grad_(), features.clone().requires_grad_()]
    where = {"slots_M": mask.flatten().nonzero().flatten()} if by_slots else {"mask_BT": mask}
    actual = merge(*ours, **where)
    expected = embeds.clone()
    rows = iter(features)
    for b in range(batch):
        for t in range(tokens):
            if mask[b, t]:
                expected[b, t] = next(rows)
    assert torch.equal(actual, expected)
    assert torch.equal(ours[0], embeds)  # not written to

    weight = torch.randn(actual.shape)
    actual.backward(weight)
    assert torch.equal(ours[0].grad, weight.masked_fill(mask[..., None], 0))
    if count:
        assert torch.equal(ours[1].grad, weight[mask])


def test_slots_in_any_order() -> None:
    features = torch.randn(3, 4)
    out = merge(torch.zeros(2, 5, 4), features, slots_M=torch.tensor([7, 0, 3]))
    assert torch.equal(out.view(10, 4)[[7, 0, 3]], features)
    assert int((out != 0).any(-1).sum()) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_the_embeddings(dtype: torch.dtype) -> None:
    features = torch.randn(2, 4, dtype=dtype)
    mask = torch.tensor([[True, False, True]])
    out = merge(torch.zeros(1, 3, 4), features, mask_BT=mask)
    assert out.dtype == torch.float32
    assert torch.equal(out[mask], features.float())


@pytest.mark.parametrize("features", [0, 1, 3])
def test_counts_that_differ(features: int) -> None:
    embeds = torch.zeros(1, 4, 8)
    message = f"tokens: 2, features: {features}"
    with pytest.raises(ValueError, match=message):
        merge(embeds, torch.zeros(features, 8), mask_BT=torch.tensor([[True, True, False, False]]))
    with pytest.raises(ValueError, match=message):
        merge(embeds, torch.zeros(features, 8), slots_M=torch.tensor([0, 3]))


def test_no_images_at_all() -> None:
    embeds = torch.randn(2, 3, 4)
    nothing = torch.zeros(0, 4)
    assert torch.equal(merge(embeds, nothing, mask_BT=torch.zeros(2, 3, dtype=torch.bool)), embeds)
    assert torch.equal(merge(embeds, nothing, slots_M=torch.zeros(0, dtype=torch.int64)), embeds)
