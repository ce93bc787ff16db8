"""On a GPU plain ranges go to PyTorch's kernels, all others to ours. CPU tensors stand in for those of a GPU here."""

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from kit import run
from stand_ins import STAND_INS, Recorder

from llava_fast import backend, doctor
from llava_fast.backend import use_backend
from llava_fast.ops import attention as module
from llava_fast.ops._launch import recorded
from llava_fast.ops.attention import KeyRanges, attention, peers, plain, range_attention
from llava_fast.sequence import key_ranges, pack

CPU = torch.device("cpu")
BF16, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32


def packed(*lengths: int, kind: Literal["causal", "full"] | None = "causal") -> KeyRanges:
    """A pack as the collator makes it; `kind` None: the host is not told."""
    made, sizes = pack(lengths), torch.tensor(lengths)
    end = torch.repeat_interleave(sizes.cumsum(0), sizes)[None].int() if kind == "full" else made.key_end
    return KeyRanges(made.key_start, end, kind, lengths=made.lengths if kind else None)


def images_that_see_themselves() -> KeyRanges:
    made = pack([40, 30], [[(2, 9)], []], bidirectional_images=True)
    assert made.lengths is None
    return KeyRanges(made.key_start, made.key_end)


def causal(batch: int = 1, tokens: int = 70, **options: Any) -> KeyRanges:
    return key_ranges(batch, tokens, CPU, **options)


# ranges, number of keys if it is not the number of queries, what else -> who computes on sm_80, and on sm_90
GRADIENT, LSE, DETERMINISTIC, CAPTURE = "gradient", "lse", "deterministic", "capture"
TABLE: dict[str, tuple[KeyRanges, dict[str, Any], str, str]] = {
    "one causal sample": (causal(), {}, "sdpa_flash", "sdpa_flash"),
    "one causal sample per row": (causal(3), {}, "sdpa_flash", "sdpa_flash"),
    "one causal sample, trained": (causal(), {GRADIENT: True}, "sdpa_flash", "sdpa_flash"),
    "a pack of one sample": (packed(70), {}, "sdpa_flash", "sdpa_flash"),
    "tower": (KeyRanges.full(2, 577, CPU), {"dim": 64}, "sdpa_flash", "sdpa_cudnn"),
    "tower, trained": (KeyRanges.full(2, 577, CPU), {GRADIENT: True}, "sdpa_flash", "sdpa_cudnn"),
    "tower, captured": (KeyRanges.full(2, 577, CPU), {CAPTURE: True}, "sdpa_flash", "sdpa_cudnn"),
    "tower, captured, cuDNN refuses": (KeyRanges.full(2, 577, CPU), {"dim": 72}, "sdpa_flash", "sdpa_flash"),
    "pack": (packed(30, 1, 20), {}, "varlen", "varlen"),
    "pack, trained": (packed(30, 1, 20), {GRADIENT: True}, "varlen", "varlen"),
    "pack of equal samples": (packed(20, 20), {}, "varlen", "varlen"),
    "pack of full samples": (packed(30, 1, 20, kind="full"), {}, "varlen", "varlen"),
    "grouped heads": (packed(30, 20), {"key_heads": 1, GRADIENT: True}, "varlen", "varlen"),
    "float16": (causal(), {"dtype": HALF}, "sdpa_flash", "sdpa_flash"),
    "head dimension 256": (packed(30, 20), {"dim": 256}, "varlen", "varlen"),
    "head dimension 96": (causal(), {"dim": 96}, "sdpa_flash", "sdpa_flash"),
    "head dimension 20 of a pack": (packed(30, 20), {"dim": 20}, "triton", "triton"),
    "float32": (causal(), {"dtype": SINGLE}, "triton", "triton"),
    "float32 pack": (packed(30, 20), {"dtype": SINGLE}, "triton", "triton"),
    "a pack the host was not told of": (packed(30, 20, kind=None), {}, "triton", "triton"),
    "a captured pack": (packed(30, 20), {CAPTURE: True}, "triton", "triton"),
    "padded": (causal(2, 5, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1] * 5])), {}, "triton", "triton"),
    "images that see themselves": (images_that_see_themselves(), {}, "triton", "triton"),
    "a window": (causal(sliding_window=9), {}, "triton", "triton"),
    "after a prefix in the cache": (causal(past=30), {"keys": 100}, "triton", "triton"),
    "a static cache": (causal(), {"keys": 100}, "triton", "triton"),
    "the last rows of a causal sample": (causal().last(20), {"keys": 70}, "triton", "triton"),
    "decoding": (causal(2, 1, past=69), {"keys": 70}, "triton", "triton"),
    "decoding, a mask": (causal(2, 1, past=69, attention_mask=torch.ones(2, 70)), {"keys": 70}, "triton", "triton"),
    "a prompt of two tokens": (causal(1, 2), {}, "triton", "triton"),
    "LSE": (causal(), {LSE: True}, "triton", "triton"),
    "deterministic": (causal(), {DETERMINISTIC: True}, "triton", "triton"),
    "deterministic, trained": (packed(30, 20), {DETERMINISTIC: True, GRADIENT: True}, "triton", "triton"),
}


def draw(ranges: KeyRanges, keys: int | None, heads: int, key_heads: int, dim: int, dtype: torch.dtype):
    batch, tokens = ranges.shape
    q = torch.randn(batch, tokens, heads, dim, dtype=dtype)
    return q, *torch.randn(2, batch, tokens if keys is None else keys, key_heads, dim, dtype=dtype).unbind(0)


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Tensors pass for those of a GPU, whose PyTorch has all its kernels."""
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "_no_gpu", lambda: "")
    monkeypatch.setattr(backend, "_preferred", {})
    monkeypatch.setattr(module, "takes", lambda *_: True)
    monkeypatch.setattr(peers, "_on_gpu", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: True)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda p: p.query.shape[-1] in (64, 128))
    monkeypatch.setattr(peers, "_arguments_of_varlen", lambda: ("window_size", "enable_gqa"))
    monkeypatch.setattr(plain, "_chosen", {})
    return monkeypatch


@pytest.fixture
def who(on_a_card: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that calls attention and returns the name of the implementation that would have computed it."""
    called: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        def noted(q, k, v, ranges, scale, return_lse):
            called.append(name)
            return q, None

        return noted

    implementations = backend._registry["attention"]
    instead = {name: dataclasses.replace(found, fn=noting(name)) for name, found in implementations.items()}
    on_a_card.setitem(backend._registry, "attention", instead)
    on_a_card.setattr(module, "_attention_triton", instead["triton"].fn)

    def call(
        ranges, architecture="sm_80", *, dtype=BF16, dim=128, key_heads=2, keys=None,
        gradient=False, lse=False, deterministic=False, capture=False,
    ) -> str:  # fmt: skip
        q, k, v = draw(ranges, keys, 2, key_heads, dim, dtype)
        q.requires_grad_(gradient)
        on_a_card.setattr(plain, "_capturing", lambda _: capture)
        on_a_card.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
        with recorded(architecture=architecture):
            if lse:
                attention(q, k, v, *ranges, return_lse=True)
            else:
                range_attention(q, k, v, ranges)
        return called.pop()

    return call


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", TABLE)
def test_who_computes(case: str, architecture: str, who: Callable[..., str]) -> None:
    ranges, options, on_a100, on_h100 = TABLE[case]
    plain._chosen.clear()
    expected = on_a100 if architecture == "sm_80" else on_h100
    assert [who(ranges, architecture, **options) for _ in range(2)] == [expected] * 2


def test_a_request_by_name_is_not_replaced(who: Callable[..., str]) -> None:
    tower, samples = KeyRanges.full(2, 577, CPU), packed(30, 20)
    for request in (("triton",), ("triton", "attention"), ("reference",), ("varlen", "attention")):
        with use_backend(*request):
            assert who(tower) == who(samples, gradient=True) == request[0]
    with use_backend("triton"), use_backend("auto", "attention"):
        assert (who(tower), who(samples)) == ("sdpa_flash", "varlen")


def test_ours_takes_what_pytorch_cannot(who: Callable[..., str], on_a_card: pytest.MonkeyPatch) -> None:
    on_a_card.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: False)
    on_a_card.setattr(peers, "_missing_varlen", lambda: "no varlen")
    on_a_card.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert who(causal()) == who(packed(30, 20)) == "triton"


def test_ours_takes_grouped_heads_where_varlen_has_no_argument_for_them(
    who: Callable[..., str], on_a_card: pytest.MonkeyPatch
) -> None:
    """PyTorch 2.11."""
    on_a_card.setattr(peers, "_arguments_of_varlen", lambda: ("window_size",))
    assert (who(packed(30, 20)), who(packed(30, 20), key_heads=1)) == ("varlen", "triton")


def test_a_measurement_decides(who: Callable[..., str], on_a_card: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fastest = {
        plain.case_of("full", False, 128, 577): "triton",
        plain.case_of("causal pack", True, 128, 30): "triton",
        plain.case_of("causal", False, 128, 70): "sdpa_cudnn",
        plain.case_of("causal", False, 64, 70): "sdpa_cudnn",
    }
    file = tmp_path / "plain.json"
    file.write_text(json.dumps({"sm_80": {"source": "a test", "fastest": fastest}, "sm_90": plain.table()["sm_90"]}))
    on_a_card.setattr(plain, "FILE", file)
    plain.table.cache_clear()
    try:
        tower, samples = KeyRanges.full(2, 577, CPU), packed(30, 20)
        assert (who(tower), who(tower, gradient=True), who(tower, dim=64)) == ("triton", "sdpa_flash", "sdpa_flash")
        assert who(KeyRanges.full(1, 512, CPU)) == "sdpa_flash"  # another length
        assert (who(samples, gradient=True), who(samples)) == ("triton", "varlen")
        assert who(packed(40, 20), gradient=True) == "varlen"
        assert (who(causal()), who(causal(), dim=64)) == ("sdpa_cudnn", "sdpa_cudnn")
        on_a_card.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda _: False)
        plain._chosen.clear()
        assert who(causal()) == "sdpa_flash"
        report = plain.explained()
        assert report["full"] == ("sdpa_flash", "a test")
        assert report["causal, forward, d 128, up to 128"] == ("sdpa_cudnn", "a test")
    finally:
        plain.table.cache_clear()


def test_choices_are_looked_up_and_do_not_pile_up(who: Callable[..., str], on_a_card: pytest.MonkeyPatch) -> None:
    asked = []
    real = plain._choose
    on_a_card.setattr(plain, "_choose", lambda *a: asked.append(1) or real(*a))
    for _ in range(3):
        assert who(packed(30, 20)) == who(packed(31, 2, 17)) == "varlen"  # both up to 32
    assert len(asked) == 1
    on_a_card.setattr(plain, "MOST_CHOICES", 4)
    for tokens in range(70, 80):
        assert who(causal(1, tokens)) == "sdpa_flash"
    assert len(plain._chosen) <= 4


def test_compiled_code_is_ours(on_a_card: pytest.MonkeyPatch) -> None:
    """A peer would break the graph."""
    torch._dynamo.reset()
    on_a_card.setattr(torch.cuda, "is_available", lambda: False)  # the compiler would ask it for a device
    on_a_card.setattr(module, "peer_for", lambda *_: pytest.fail("a peer was looked for"))
    ranges = causal()
    q, k, v = draw(ranges, None, 2, 2, 16, SINGLE)
    compiled = torch.compile(lambda q, k, v: range_attention(q, k, v, ranges), fullgraph=True, backend="aot_eager")
    with recorded(dry=True) as launched:
        compiled(q, k, v)
    assert [launch.name for launch in launched] == ["_attention_fwd_kernel"]


# ---- results


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize(
    "name", ["tower", "one causal sample per row", "a pack of one sample", "pack", "grouped heads"]
)
def test_results_and_gradients(name: str, heads: tuple[int, int], on_a_card: pytest.MonkeyPatch) -> None:
    """By PyTorch's flash kernel for CPUs, and by the stand-in for varlen; with nothing read from the ranges."""
    recorder, ranges = Recorder(), TABLE[name][0]
    told = KeyRanges(ranges.start, ranges.end, ranges.kind, ranges.keys, ranges.lengths)
    path, functions = STAND_INS["varlen"]
    for function, stand_in in functions(recorder).items():
        on_a_card.setattr(importlib.import_module(path), function, stand_in)
    on_a_card.setattr(peers, "_tensors", lambda *_: True)
    on_a_card.setattr(peers, "_missing_varlen", lambda: "")
    peers.register_peers()
    try:
        q, k, v = draw(ranges, None, *heads, 16, torch.float64)
        cotangents = [torch.randn_like(q)]
        tensors = {"q": q, "k": k, "v": v}
        with use_backend("reference"):
            expected = run(lambda q, k, v: range_attention(q, k, v, ranges), tensors, cotangents)
        with recorded() as launched:
            found = run(lambda q, k, v: range_attention(q, k, v, told), tensors, cotangents)
    finally:
        on_a_card.undo()
        peers.register_peers()
    assert not launched and bool(recorder.calls) == (ranges.lengths is not None)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "ranges", [packed(3, 1, 5), packed(3, 1, 5, kind="full"), packed(4, 4), causal(2, 7), KeyRanges.full(3, 5, CPU)]
)
def test_what_the_host_was_told_is_what_it_would_have_read(ranges: KeyRanges) -> None:
    keys = ranges.shape[1]
    read = KeyRanges(ranges.start, ranges.end)
    assert peers.samples_of(ranges, keys) == peers.samples_of(read, keys)
    assert torch.equal(ranges.first_BT, read.first_BT) and torch.equal(ranges.seen_by(keys), read.seen_by(keys))
    for found, expected in zip(peers.running_sums(ranges, keys), peers.running_sums(read, keys), strict=True):
        assert found.dtype == torch.int32 and found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["pack", "pack of full samples", "tower", "one causal sample per row"])
def test_nothing_is_read_from_the_device(name: str) -> None:
    """The device "meta" has no values to read."""
    ranges = TABLE[name][0].to("meta")
    keys = ranges.shape[1]
    samples = peers.samples_of(ranges, keys)
    assert samples.queries_N == (ranges.lengths or (keys,) * len(ranges.start))
    assert [len(sums) for sums in peers.running_sums(ranges, keys)] == [len(samples.queries_N) + 1] * 2
    with pytest.raises(NotImplementedError):
        peers.samples_of(KeyRanges(*ranges), keys)


# ---- what doctor says


def test_doctor_shows_the_choice(on_a_card: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = "not measured: PyTorch's kernels until a timing shows ours ahead"
    on_a_card.setattr(torch.cuda, "device_count", lambda: 0)
    on_a_card.setattr(plain, "table", lambda: {here: {"source": source, "fastest": {}} for here in plain.UNMEASURED})
    report = doctor.diagnose()
    assert report["backend"]["plain"] == {
        "full": ("sdpa_flash", source),
        "causal": ("sdpa_flash", source),
        "full pack": ("varlen", source),
        "causal pack": ("varlen", source),
    }
    doctor.show(report)
    assert "attention, causal pack" in capsys.readouterr().out
    on_a_card.setattr(peers, "_missing_varlen", lambda: "no varlen")
    peers.register_peers()
    try:
        with recorded(architecture="sm_90"):
            found = plain.explained()
    finally:
        on_a_card.undo()
        peers.register_peers()
    assert found["full"][0] == "sdpa_cudnn"
    assert found["full pack"] == ("triton", f"varlen: no varlen; {source}")
    assert plain.explained() == {}  # here is no GPU
