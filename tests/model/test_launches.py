"""How many kernels a pass launches, counted dry and so without a GPU; the tower is as deep as LLaVA-1.5's."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks import budgets
from benchmarks.records import DEVICE
from llava_fast.backend import use_backend
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.ops._launch import recorded
from llava_fast.ops.attention import KeyRanges
from llava_fast.ops.attention import ranges as module


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return budgets.tiny_llava(layers=4)


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was worked out of key ranges, each time that it was."""
    calls: list[str] = []
    for name in ("_first_of_sample", "_seen_by", "_groups_of"):
        real = getattr(module, name)

        def spy(ranges: KeyRanges, keys: int, name: str = name, real=real):
            calls.append(name)
            return real(ranges, keys)

        monkeypatch.setattr(module, name, spy)
    yield calls


def launches_of_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> list[str]:
    with torch.no_grad():
        return budgets.launches(lambda: model.model._encode(pixels, model.model._settings(pixels, None, None, False)))


@pytest.mark.parametrize("images", [1, 3])
def test_a_captured_tower_launches_no_more_than_an_eager_one(
    model: LlavaForConditionalGeneration, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.zeros(images, 28, 28, 3, dtype=torch.uint8, device=DEVICE)
    eager = launches_of_features(model, pixels)
    monkeypatch.setattr(KeyRanges, "_capturing", lambda self: True)
    captured = launches_of_features(model, pixels)
    assert captured == eager
    assert len(eager) <= budgets.BUDGETS["tower and projector"]
    assert eager.count("_attention_fwd_kernel") == 23


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("capturing", [False, True])
def test_ranges_are_worked_out_once_for_all_layers(
    model: LlavaForConditionalGeneration, mode, capturing: bool, worked_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeyRanges, "_capturing", lambda self: capturing)
    ids = torch.ones(2, 9, dtype=torch.int64, device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with mode(), use_backend("triton"), recorded(dry=True):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert worked_out == ["_first_of_sample"]


def test_training_works_out_once_which_queries_see_a_key(
    model: LlavaForConditionalGeneration, worked_out: list[str]
) -> None:
    ids = torch.ones(2, 9, dtype=torch.int64, device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with use_backend("triton"), recorded(dry=True) as launched:
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden.sum().backward()
    model.zero_grad()
    assert sorted(worked_out) == ["_first_of_sample", "_seen_by"]
    assert [launch.name for launch in launched].count("_attention_bwd_dkdv_kernel") == 4
