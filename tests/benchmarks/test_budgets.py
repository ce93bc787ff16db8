"""No pass launches more kernels than its budget, and no budget is wider than the count."""

from benchmarks import budgets


def test_budgets_are_the_counts():
    assert budgets.counted() == budgets.BUDGETS
