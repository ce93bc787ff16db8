"""The benchmark of a training step: everybody computes the same, and the count of operations is what is done."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.test_train_step import STAGES, Size, cases, step_case

TINY = Size(2, 12, 48, 96, 3, 4, 200, (32, 64, 3, 2), image_tokens=16)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products as small as these take many times as long where two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("stage", STAGES)
def test_everybody_computes_the_same(stage: str):
    case = step_case(stage, TINY, torch.float32)
    torch.manual_seed(0)
    inputs = case.inputs()
    verdicts = harness.verify(case, inputs, harness.draw_cotangents(case, inputs))
    assert set(verdicts) >= {"hf", "hf_rows"} and len(verdicts) >= 3
    assert all(isinstance(error, float) and error < 1e-4 for error in verdicts.values()), verdicts


def test_another_loss_is_not_timed():
    case = step_case("projector", TINY, torch.float32)
    right = case.providers["hf"]
    case.providers.clear()
    case.providers["wrong"] = lambda tensors: right({**tensors, "labels": tensors["labels"].roll(1, 0)})
    inputs = case.inputs()
    verdict = harness.verify(case, inputs, harness.draw_cotangents(case, inputs))["wrong"]
    assert isinstance(verdict, AssertionError) and "not timed" in str(verdict)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_trained_and_counted(stage: str):
    case = next(case for case in cases(gpu=False) if case.op.endswith(stage))
    provider = case.providers["triton" if torch.cuda.is_available() else "reference"]
    call = provider(case.inputs())
    with FlopCounterMode(display=False) as counter:
        results = call()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    # The counter does not see into the loss, nor into attention on a CPU.
    head = 2 * {"projector": 2, "full": 3}[stage] * 64 * 32000 * 512
    attention = 2 * 7 * 512 * (8 * 640 * 641 - 576 * 577) // 2
    assert counted + head + attention == pytest.approx(case.flops, rel=0.02)
    assert len(results) == 1 + {"projector": 4, "full": 4 + 9 * 8 + 3}[stage]
