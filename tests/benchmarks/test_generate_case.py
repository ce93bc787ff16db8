"""The benchmark of inference: both models compute the same, and a provider whose result is wrong is not timed."""

from functools import partial

import pytest
import torch

from benchmarks import harness
from benchmarks.test_generate import THREADS, cases, decoding, generate, prefill

CASES = {
    "prefill": partial(prefill, "demo", 2),
    "decoding": partial(decoding, "demo", 2),
    "generate": partial(generate, "demo", 2, images=False),
    "generate_image": partial(generate, "demo", 2, images=True),
}


@pytest.mark.parametrize("op", CASES)
def test_both_compute_the_same(op: str):
    case = CASES[op](torch.get_num_threads())
    torch.manual_seed(0)
    inputs = case.inputs()
    verdicts = harness.verify(case, inputs, harness.draw_cotangents(case, inputs))
    assert verdicts.keys() == {"hf", "reference"}
    assert all(isinstance(error, float) and error < 1e-5 for error in verdicts.values()), verdicts
    assert case.op == op
    if op.startswith("generate"):
        assert verdicts == {"hf": 0, "reference": 0}
        (tokens,) = case.providers["reference"](inputs)()
        assert tokens.shape == (2, inputs["input_ids"].shape[1] + 32)
        assert len({tuple(row) for row in tokens[:, -32:].tolist()}) == 2, "the prompts do not matter"


def test_another_answer_is_not_timed():
    case = decoding("demo", 2, 1)
    right = case.providers["hf"]
    case.providers["reference"] = lambda tensors: right({**tensors, "input_ids": tensors["input_ids"] + 1})
    inputs = case.inputs()
    inputs["input_ids"].clamp_(max=80)
    verdict = harness.verify(case, inputs, harness.draw_cotangents(case, inputs))["reference"]
    assert isinstance(verdict, AssertionError) and "not timed" in str(verdict)


def test_every_case_has_a_name_of_its_own():
    found = [tuple(case.identity.values()) for case in cases(gpu=False)]
    assert len(found) == len(set(found))
    assert {name[0].split("_", 1)[0] for name in found} == {"prefill", "decoding", "generate"}
    assert {threads for name in found for threads in THREADS.values() if name[0].endswith(threads)} == {
        *THREADS.values()
    }
    assert cases(gpu=True) == []
