"""The attention benchmarks: what is counted is what is there, everybody verifies, and who cannot is skipped."""

import pytest
import torch

from benchmarks import attention_providers, harness, test_attention, test_decode_attention
from benchmarks.harness import Case, Measurement, verify
from llava_fast.backend import BackendUnavailable

SMALL = {"heads": 4, "key_heads": 2, "dim": 16, "dtype": torch.float32}
LENGTHS, IMAGE = (23, 9), (12, 4)  # 12 tokens of an image from the fifth on, in the first sample


def small(op: str, backward: bool) -> Case:
    if op == "tower":
        return test_attention.tower_case(2, 13, 2, 16, torch.float32, backward)
    if op == "decode":
        return test_decode_attention.decode_case(2, 24, 17, **SMALL)
    return test_attention.pack_case(op, LENGTHS, backward=backward, image=IMAGE, **SMALL)


def verdicts(case: Case) -> dict:
    inputs = case.inputs()
    return verify(case, inputs, harness.draw_cotangents(case, inputs))


PACKS = ["attention", "attention_images", "attention_gqa", "attention_build", "attention_images_build"]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is measured there and runs here: the kernels in the interpreter, and FlexAttention uncompiled."""
    for module in (attention_providers, test_attention):
        monkeypatch.setattr(module, "names", lambda: ["reference", "triton", "sdpa_flash", "flex"])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", ["tower", *PACKS])
def test_everybody_computes_the_same(op: str, backward: bool, as_on_a_gpu: None):
    found = verdicts(small(op, backward))
    cannot = {"flex"} if backward else set()
    cannot |= set() if op == "tower" else {"sdpa_flash"}
    assert found.keys() == {"torch", "reference", "triton", "sdpa_flash", "flex"}
    for name, error in found.items():
        assert isinstance(error, BackendUnavailable if name in cannot else float), (name, error)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_decoding_verifies(as_on_a_gpu: None):
    found = verdicts(small("decode", False))
    assert found.keys() == {"torch", "reference", "triton", "sdpa_flash", "flex"}
    assert all(isinstance(error, float) for error in found.values()), found


@pytest.mark.parametrize("op", [*PACKS, "tower", "decode"])
def test_useful_operations_are_those_of_pairs_that_see_each_other(op: str):
    forward = small(op, False)
    inputs = forward.inputs()
    q, heads, dim = inputs["q"], inputs["q"].shape[2], inputs["q"].shape[3]
    lengths = LENGTHS if op.startswith("attention") else ()
    pairs = {"tower": 2 * 13 * 13, "decode": 2 * 17}.get(op, sum(n * (n + 1) // 2 for n in lengths))
    if "images" in op:
        pairs += 12 * 11 // 2  # of the image's tokens, those behind each
    assert forward.flops == 2 * 2 * dim * heads * pairs
    if "end" in inputs:
        assert pairs == int((inputs["end"] - inputs["start"]).sum())
    seen = 17 / 24 if op == "decode" else 1
    read = q.nbytes + seen * (inputs["k"].nbytes + inputs["v"].nbytes)
    assert forward.bytes_moved == round(read) + q.nbytes
    if op != "decode":
        both = small(op, True)
        assert both.flops == 3.5 * forward.flops
        # Backward: q, k, v, the output and its gradient are read, three gradients written.
        assert both.bytes_moved == forward.bytes_moved + 4 * q.nbytes + 2 * (inputs["k"].nbytes + inputs["v"].nbytes)


def test_the_cases_of_a_gpu_are_told_apart():
    found = [tuple(case.identity.values()) for m in (test_attention, test_decode_attention) for case in m.cases(True)]
    assert len(found) == len(set(found))
    assert {(op, shape) for op, shape, _, _ in found} >= {
        ("attention_tower", "32x577x16x64"),
        ("attention_sample", "1x832x32x128"),
        ("attention", "1x4160x32x128"),
        ("attention_images", "1x8320x32x128"),
        ("attention_images_build", "1x8320x32x128"),
        ("attention_gqa", "1x4160x32x8x128"),
        ("decode_attention", "32x768x32x128"),
        ("decode_attention_gqa", "8x768x32x8x128"),
    }
    assert {dtype for _, _, dtype, _ in found} == {"bf16"}


def test_who_waits_for_the_gpu_is_not_captured(monkeypatch: pytest.MonkeyPatch):
    build, plain = (small(op, False) for op in ("attention_build", "attention"))
    captured = []
    monkeypatch.setattr(harness, "_captured", captured.append)
    timers = []
    for case in (build, plain):
        with monkeypatch.context() as patch:
            patch.setattr(harness, "DEVICE", torch.device("cuda"))
            timers.append(harness.bursts(case, ["torch", "reference"], 2)[2])
    assert timers == ["cuda events", "cuda graph"]
    assert len(captured) == 2  # the providers of the second


def test_who_says_that_it_cannot_is_skipped():
    found = {"sdpa_flash": BackendUnavailable("no packs")}
    with pytest.raises(pytest.skip.Exception, match="no packs"):
        harness.report(None, small("attention", False), "sdpa_flash", lambda case: found)


def test_a_record_says_how_fast_useful_operations_are():
    case = small("attention", False)
    record = Measurement([2e-3] * 3, 2**20, 1e-6, "cuda graph").record(case, "triton")
    assert record["tflops_per_s"] == pytest.approx(case.flops / 2e-3 / 1e12)
