"""The benchmarks of the vision path: in the interpreter, by the same functions that a GPU times."""

import pytest
import torch

from benchmarks import harness
from benchmarks import test_image_rows as image_rows
from benchmarks import test_merge as merge
from benchmarks import test_projector as projector
from benchmarks import test_tower as tower
from benchmarks.harness import Case, function


def verified(case: Case) -> set[str]:
    """The providers, all of which must be right."""
    inputs = case.inputs()
    found = harness.verify(case, inputs, harness.draw_cotangents(case, inputs))
    assert all(isinstance(error, float) for error in found.values()), found
    return set(found)


@pytest.mark.parametrize("backward", [False, True])
def test_projector(backward: bool, monkeypatch: pytest.MonkeyPatch):
    ours = {"triton": projector._triton, "triton-fused": projector._triton_fused}
    monkeypatch.setattr(projector, "providers", lambda: {"torch": projector._torch, **ours})
    case = projector.projector_case(9, 32, 48, torch.float32, backward)
    assert verified(case) == {"torch", "triton", "triton-fused"}


@pytest.mark.parametrize("backward", [False, True])
def test_merge(backward: bool, monkeypatch: pytest.MonkeyPatch):
    ours = {"triton": merge._ours("triton", by_slots=False), "triton-slots": merge._ours("triton", by_slots=True)}
    monkeypatch.setattr(merge, "providers", lambda: {"hf": merge._hf, **ours})
    case = merge.merge_case(2, 4, 8, 16, torch.float32, backward)
    assert verified(case) == {"hf", "triton", "triton-slots"}


def test_tower(monkeypatch: pytest.MonkeyPatch):
    """What a GPU compiles is, as it stands, the same computation."""
    monkeypatch.setattr(torch, "compile", lambda fn: fn)
    case = tower.tower_case(1, torch.float32, large=False)
    case.providers["compile"] = function(tower._compiled(False))
    assert verified(case) == {"hf", "reference", "compile"}


@pytest.mark.parametrize("images", [1, 3])
def test_image_rows(images: int):
    case = image_rows.rows_case(images, torch.float32, large=False)
    case.providers["device"] = image_rows._ours("reference", large=False, on_device=True)
    assert verified(case) == {"hf", "reference", "device"}
