"""No pass launches more kernels than its budget, and no budget is wider than the count."""

import pytest

from benchmarks import budgets
from llava_fast.ops.attention import KeyRanges


@pytest.mark.parametrize("capturing", [False, True])
def test_budgets_are_the_counts(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CUDA graph, too: tensors derived from key ranges are kept there only if the ranges belong to the graph."""
    monkeypatch.setattr(KeyRanges, "_capturing", lambda self: capturing)
    assert budgets.counted() == budgets.BUDGETS
