"""Where kernels are launched."""

from types import SimpleNamespace

import pytest
import torch

from llava_fast.ops._launch import launch, multiprocessors, recorded, tile, tile_table


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


def test_records_of_blocks_in_blocks() -> None:
    """Each has its own, also where both hold the same launches when the inner one ends."""

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: None

    kernel, x = Kernel(), torch.ones(1)
    with recorded() as outer:
        with recorded() as inner:
            launch(kernel, (1,), x, tile={"num_warps": 4})
        launch(kernel, (1,), x, tile={"num_warps": 4})
    assert (len(inner), len(outer)) == (1, 2)


@pytest.mark.parametrize(("architecture", "count"), [("sm_80", 108), ("sm_90", 132)])
def test_tensors_without_memory_stand_for_a_gpu(architecture: str, count: int) -> None:
    """So a dry run launches as many programs, and with the tiles, that a GPU of the architecture would see."""
    device = torch.device("meta")
    with recorded(dry=True, architecture=architecture):
        assert multiprocessors(device) == count
        assert tile("norm_fwd", 4096, device) == tile_table("norm_fwd")[architecture]["tiles"]["4096"]
