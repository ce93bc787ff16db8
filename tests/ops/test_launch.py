"""Where kernels are launched."""

from types import SimpleNamespace

import pytest
import torch

from llava_fast.ops._launch import launch


def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which is another one in a model that is spread over several."""
    current = [0]

    def exchange(device: int) -> int:
        before = current[0]
        current[0] = device
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    ran_on = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: ran_on.append(current[0])

    on_the_second = SimpleNamespace(is_cuda=True, get_device=lambda: 1)
    launch(Kernel(), (1,), on_the_second, 3, tile={"BLOCK": 16, "num_warps": 4})
    assert (ran_on, current) == ([1], [0])
