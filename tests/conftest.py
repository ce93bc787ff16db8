"""What all tests share: no downloads, fixed seeds, and the `gpu` mark."""

import os
from collections.abc import Iterator

# Before anything imports transformers: nothing here may go looking for a model on a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; PyTorch sees none"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state, whichever tests ran before."""
    torch.manual_seed(0)
    np.random.seed(0)
    yield
