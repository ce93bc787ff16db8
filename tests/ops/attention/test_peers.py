"""Peers of attention: the same results by the same call where they can, and one line where they cannot.

What a CPU can run is run. The others are given stand-ins with the libraries' own signatures, which compute by the
definition from exactly the arguments they get; on a GPU (mark `gpu`) the real ones run.
"""

import gc
import importlib
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from kit import run, vectors
from stand_ins import STAND_INS, Recorder

from llava_fast import backend
from llava_fast.backend import BackendUnavailable, use_backend
from llava_fast.ops.attention import attention, range_attention
from llava_fast.ops.attention import peers as module
from llava_fast.sequence import key_ranges, pack

CPU = torch.device("cpu")
Ranges = tuple[torch.Tensor, torch.Tensor]


def rows(*of_batch_row: list[tuple[int, int]]) -> Ranges:
    """(start, end) of each query, by batch row."""
    start, end = torch.tensor(of_batch_row, dtype=torch.int32).unbind(-1)
    return start.contiguous(), end.contiguous()


def packed(*lengths: int, images: list | None = None) -> Ranges:
    made = pack(lengths, images, bidirectional_images=images is not None)
    return made.key_start, made.key_end


def padded(*masks: list[int]) -> Ranges:
    return vectors(len(masks), len(masks[0]), CPU, attention_mask=torch.tensor(masks))


# name -> ranges, keys
DENSE = {
    "causal": (vectors(2, 7, CPU), 7),
    "full": (rows([(0, 5)] * 5, [(0, 5)] * 5), 5),
    "the first keys alone": (rows(*[[(0, 3)] * 4] * 2), 6),
    "pack of one sample": (packed(6), 6),
    "pack of equal samples": (packed(4, 4, 4), 12),
    "two packs of equal samples": (rows(*[[(0, 2), (0, 2), (2, 4), (2, 4)]] * 2), 4),
    "single tokens": (packed(1, 1, 1), 3),
    "keys from the middle": (rows([(2, 3), (2, 4)], [(2, 3), (2, 4)]), 6),
    "one query, a cache filled alike": (rows([(1, 6)], [(1, 6)], [(1, 6)]), 9),
}
NOT_SQUARE = {"new queries of a longer text": (vectors(2, 3, CPU, past=4), 7)}
UNIFORM = {
    **DENSE,
    **NOT_SQUARE,
    "pack": (packed(3, 1, 5, 4), 13),
    "images": (rows([(0, 3)] * 3 + [(3, 5)] * 2 + [(5, 6)]), 6),
    "left padding": (padded([0, 0, 1, 1, 1], [1, 1, 1, 1, 1]), 5),
    "right padding": (padded([1, 1, 1, 0, 0], [1, 0, 0, 0, 0]), 5),
    "a row of padding": (padded([0, 0, 0], [0, 1, 1]), 3),
    "empty rows inside a pack": (rows([(0, 1), (0, 2), (2, 2), (3, 3), (4, 5), (4, 6)]), 6),
    "a cache filled to different lengths": (rows([(0, 3)], [(0, 8)]), 8),
    "a left-padded cache": (rows([(3, 7), (3, 8)], [(0, 4), (0, 5)]), 9),
    "a finished row of a cache": (rows([(4, 4)], [(0, 5)]), 6),
    "nothing": (rows([(0, 0), (1, 1)]), 2),
}
OTHER = {
    "an image that sees itself": (packed(8, 4, images=[[(2, 3)], []]), 12),
    "causal and full mixed": (rows([(0, 1), (0, 2), (2, 4), (2, 4)]), 4),
    "a window": (vectors(1, 6, CPU, sliding_window=3), 6),
}
ALL = {**UNIFORM, **OTHER}
HEADS = [(2, 2), (4, 2)]


def draw(ranges: Ranges, keys: int, heads: int, key_heads: int, dtype=torch.float64, dim: int = 8) -> dict[str, Any]:
    batch, tokens = ranges[0].shape
    q = torch.randn(batch, tokens, heads, dim, dtype=dtype)
    k, v = (torch.randn(batch, key_heads, keys, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    return {"q": q, "k": k, "v": v, "start": ranges[0], "end": ranges[1]}


def check(name: str, tensors: dict[str, torch.Tensor], lse: bool = True, frozen: bool = False, rtol: float = 1e-9):
    """Forward, with `lse` (of a call without gradients) and, unless frozen, gradients, as by the reference."""
    cotangents = [torch.randn_like(tensors["q"])]
    names = ("q", "k", "v") if frozen else ()

    def call(q, k, v, start, end, **options):
        return attention(q, k, v, start, end, scale=0.3, **options)

    with use_backend("reference"):
        expected = run(call, tensors, cotangents, names)
        _, expected_lse = call(**tensors, return_lse=True)
    with use_backend(name, "attention"):
        found = run(call, tensors, cotangents, names)
        again, found_lse = call(**tensors, return_lse=True) if lse else (found["out0"], expected_lse)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(
            value, expected[key], rtol=rtol, atol=rtol, msg=lambda text, key=key: f"{key}: {text}"
        )
    torch.testing.assert_close(again, expected["out0"], rtol=rtol, atol=rtol)
    torch.testing.assert_close(found_lse.double(), expected_lse.double(), rtol=1e-5, atol=1e-5)
    assert not found["out0"][tensors["end"] <= tensors["start"]].any()


# ---- what runs here


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", DENSE)
def test_sdpa_flash(case: str, heads: tuple[int, int]) -> None:
    ranges, keys = DENSE[case]
    check("sdpa_flash", draw(ranges, keys, *heads, dtype=torch.float32, dim=16), lse=False, rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in ALL if case not in DENSE])
def test_sdpa_flash_refuses(case: str) -> None:
    ranges, keys = ALL[case]
    reasons = {
        **dict.fromkeys(OTHER, "a sample is neither causal nor full"),
        **dict.fromkeys(NOT_SQUARE, "causal with 3"),
    }
    with use_backend("sdpa_flash", "attention"):
        with pytest.raises(BackendUnavailable, match=reasons.get(case, "need a dense mask")):
            attention(**by_name(draw(ranges, keys, 2, 2)))


def by_name(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(("q_BTHd", "k_BSGd", "v_BSGd", "start_BT", "end_BT"), tensors.values(), strict=True))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", ALL)
def test_flex(case: str) -> None:
    """Any ranges; forward alone, as it has no backward on a CPU."""
    ranges, keys = ALL[case]
    check("flex", draw(ranges, keys, 4, 2, dtype=torch.float32), frozen=True, rtol=1e-5)


# ---- what a library that is not here would be given


@contextmanager
def anywhere(patch: pytest.MonkeyPatch, name: str) -> Iterator[Recorder]:
    """Inside the block the peer is installed, as its stand-in, and takes any tensors on any machine."""
    recorder = Recorder()
    path, functions = STAND_INS[name]
    library = importlib.import_module(path) if path.startswith("torch.") else ModuleType(path)
    patch.setitem(sys.modules, path, library)
    for function, stand_in in functions(recorder).items():
        patch.setattr(library, function, stand_in, raising=False)
    patch.setattr(module, "_missing", lambda *_: "")
    patch.setattr(module, "_missing_varlen", lambda: "")
    patch.setattr(module, "_tensors", lambda *_: True)
    module.register_peers()
    try:
        yield recorder
    finally:
        patch.undo()
        module.register_peers()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", UNIFORM)
@pytest.mark.parametrize("name", STAND_INS)
def test_what_a_library_is_given(name: str, case: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    ranges, keys = UNIFORM[case]
    tensors = draw(ranges, keys, *heads)
    with anywhere(monkeypatch, name) as recorder:
        check(name, tensors, lse=name != "xformers")
        check(name, tensors, lse=name != "xformers", frozen=True)
    assert bool(recorder.calls) == (case != "nothing")
    for call in recorder.calls:
        assert call["scale"] == 0.3


def given(
    name: str, ranges: Ranges, keys: int, patch: pytest.MonkeyPatch, requires_grad: bool = True
) -> dict[str, Any]:
    """The one call of the stand-in."""
    tensors = draw(ranges, keys, 2, 2)
    tensors["q"].requires_grad_(requires_grad)
    with anywhere(patch, name) as recorder, use_backend(name, "attention"):
        attention(**by_name(tensors))
    (call,) = recorder.calls
    return {**call, "tensors": tensors}


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3", "varlen"])
def test_packs_and_padding_by_running_sums(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = given(name, packed(3, 1, 5), 9, monkeypatch)
    assert (call["queries"], call["keys"], call["causal"]) == ([3, 1, 5], [3, 1, 5], True)
    assert call["scale"] == 8**-0.5
    assert call["q"].data_ptr() == call["tensors"]["q"].data_ptr()  # a pack is taken as it is
    call = given(name, padded([0, 1, 1], [1, 1, 0]), 3, monkeypatch)
    assert (call["queries"], call["keys"], call["causal"]) == ([2, 2], [2, 2], True)
    q, k = call["tensors"]["q"], call["tensors"]["k"]
    assert torch.equal(call["q"], torch.cat((q[0, 1:], q[1, :2])))
    assert torch.equal(call["k"], torch.cat((k[0, 1:], k[1, :2])))
    call = given(name, rows([(0, 4)] * 4, [(0, 4)] * 4), 4, monkeypatch)
    assert (call["queries"], call["keys"], call["causal"]) == ([4, 4], [4, 4], False)


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3"])
def test_a_cache_is_read_where_it_lies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = given(name, rows([(0, 3)], [(0, 8)]), 9, monkeypatch, requires_grad=False)
    assert (call["lengths"], call["leftpad"]) == ([3, 8], None)
    assert (
        call["k"].data_ptr() == call["tensors"]["k"].data_ptr() and call["k"].stride() == call["tensors"]["k"].stride()
    )
    call = given(name, rows([(2, 5), (2, 6)], [(0, 7), (0, 8)]), 9, monkeypatch, requires_grad=False)
    assert (call["lengths"], call["leftpad"], call["causal"]) == ([6, 8], [2, 0], True)
    assert "queries" in given(name, rows([(0, 3)], [(0, 8)]), 9, monkeypatch)  # it has no backward for this


def test_masks_of_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    call = given("xformers", packed(3, 1, 5), 9, monkeypatch)
    assert (call["mask"], call["queries"], call["keys"], call["causal"]) == (
        "BlockDiagonalMask",
        [3, 1, 5],
        [3, 1, 5],
        True,
    )
    call = given("xformers", rows([(0, 3)] * 3 + [(3, 5)] * 2), 5, monkeypatch)
    assert (call["mask"], call["queries"], call["causal"]) == ("BlockDiagonalMask", [3, 2], False)
    assert given("xformers", vectors(2, 4, CPU), 4, monkeypatch)["mask"] == "LowerTriangularFromBottomRightMask"
    assert given("xformers", rows([(0, 2)] * 2, [(0, 2)] * 2), 2, monkeypatch)["mask"] == "NoneType"
    cache = rows([(0, 2), (0, 3)], [(0, 7), (0, 8)])
    call = given("xformers", cache, 9, monkeypatch, requires_grad=False)
    assert (call["mask"], call["queries"], call["keys"]) == (
        "BlockDiagonalCausalWithOffsetPaddedKeysMask",
        [2, 2],
        [3, 8],
    )
    call = given("xformers", rows([(0, 3)], [(0, 8)]), 9, monkeypatch, requires_grad=False)
    assert (call["mask"], call["keys"]) == ("BlockDiagonalPaddedKeysMask", [3, 8])
    assert given("xformers", cache, 9, monkeypatch)["mask"] == "BlockDiagonalMask"


def test_sdpa_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's kernel does not run here, so its place is taken by the flash kernel."""
    pinned, ranges = [], vectors(2, 7, CPU)

    class Only(module.only):
        def __init__(self, kernel):
            super().__init__(module.SDPBackend.FLASH_ATTENTION)
            pinned.append(kernel.name)

    monkeypatch.setattr(module, "only", Only)
    monkeypatch.setattr(module, "_missing", lambda *_: "")
    monkeypatch.setattr(module, "_tensors_of_sdpa_cudnn", lambda *_: True)
    module.register_peers()
    try:
        for name in ("sdpa_flash", "sdpa_cudnn"):
            check(name, draw(ranges, 7, 4, 2, dtype=torch.float32), lse=False, rtol=1e-5)
    finally:
        monkeypatch.undo()
        module.register_peers()
    assert pinned == ["FLASH_ATTENTION", "CUDNN_ATTENTION"]


def test_only_one_kernel_is_allowed_and_then_what_was_allowed_before() -> None:
    """As in `torch.nn.attention.sdpa_kernel`."""
    from torch.nn.attention import _cur_sdpa_kernel_backends as allowed
    from torch.nn.attention import sdpa_kernel

    before = allowed()
    for kernel in (module.SDPBackend.FLASH_ATTENTION, module.SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel([module.SDPBackend.MATH, kernel]):
            outside = allowed()
            with pytest.raises(KeyError), module.only(kernel):
                assert allowed() == [kernel]
                raise KeyError
            assert allowed() == outside
    assert allowed() == before and len(before) > 1


@pytest.mark.parametrize("case", ALL)
def test_flex_with_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the compiled kernel: the mask's own function, over all pairs."""
    from torch.nn.attention import flex_attention as library

    ranges, keys = ALL[case]
    empty = ranges[1] <= ranges[0]

    def stand_in(q, k, v, score_mod=None, block_mask=None, scale=None, enable_gqa=False, return_aux=None):
        assert score_mod is None and enable_gqa and block_mask.shape == (len(q), 1, q.shape[2], k.shape[2])
        index = [torch.arange(n) for n in (len(q), q.shape[2], k.shape[2])]
        seen = block_mask.mask_mod(index[0][:, None, None], 0, index[1][:, None], index[2]) | empty[..., None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=True
        ).masked_fill(empty[:, None, :, None], 0)
        return out if return_aux is None else (out, library.AuxOutput(lse=torch.ones(())))

    monkeypatch.setattr(library, "flex_attention", stand_in)
    monkeypatch.setattr(module, "_on_gpu", lambda x: x.dim() == 4)  # q, not the ranges: the mask is not compiled
    monkeypatch.setattr(module, "_compiled", lambda fn: fn)
    check("flex", draw(ranges, keys, 4, 2), lse=False)


# ---- who cannot, and why


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize("name", STAND_INS)
def test_ranges_that_a_library_has_no_words_for(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges, keys = OTHER[case]
    with anywhere(monkeypatch, name) as recorder, use_backend(name, "attention"):
        message = f"backend '{name}' was asked for, but cannot run 'attention': a sample is neither causal nor full"
        with pytest.raises(BackendUnavailable, match=message):
            attention(**by_name(draw(ranges, keys, 2, 2)))
    assert not recorder.calls


def test_lse_that_a_library_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(packed(4), 4, 2, 2, dtype=torch.float32)
    tensors["v"].requires_grad_()
    for name, reason in (
        ("sdpa_flash", "PyTorch's SDPA does not return its LSE"),
        ("xformers", "memory_efficient_attention does not return its LSE"),
        ("flash_attn", "its LSE has no gradient"),
        ("flash_attn_3", "its LSE has no gradient"),
        ("varlen", "its LSE has no gradient"),
    ):
        with anywhere(monkeypatch, name if name in STAND_INS else "varlen"), use_backend(name, "attention"):
            with pytest.raises(BackendUnavailable, match=f"'{name}' was asked for.*: {reason}"):
                attention(**by_name(tensors), return_lse=True)


def test_flex_says_that_it_has_no_backward_here() -> None:
    tensors = draw(packed(4), 4, 2, 2, dtype=torch.float32)
    tensors["k"].requires_grad_()
    with use_backend("flex", "attention"):
        with pytest.raises(BackendUnavailable, match=r"'flex' was asked for.*: FlexAttention has no backward on cpu"):
            attention(**by_name(tensors))


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"flash_attn": "flash-attn", "flash_attn_interface": "FlashAttention-3", "xformers": "xformers"}
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    for path in (*names, "torch.nn.attention.varlen"):
        monkeypatch.delitem(sys.modules, path, raising=False)
    found = backend.status()["attention"]
    assert found["registered"] == ["reference", "triton"]
    peers = found["peers"]
    assert [peers[name] for name in ("flash_attn", "flash_attn_3", "xformers", "varlen")] == [
        *(f"{package} is not installed" for package in names.values()),
        "a PyTorch with torch.nn.attention.varlen is not installed",
    ]
    with use_backend("xformers", "attention"), pytest.raises(BackendUnavailable, match=": xformers is not installed"):
        attention(**by_name(draw(packed(4), 4, 2, 2)))


def test_what_is_installed_but_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("flash_attn", "flash_attn_interface", "xformers"):
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without = backend.status()["attention"]["peers"]
    assert (without.pop("sdpa_flash"), without.pop("flex")) == ("available", "available")
    assert set(without.values()) == {"PyTorch sees no CUDA device"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    ampere = backend.status()["attention"]["peers"]
    assert ampere.pop("flash_attn_3") == "it needs a GPU of compute capability 9.x"
    assert set(ampere.values()) == {"available"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert set(backend.status()["attention"]["peers"].values()) == {"available"}
    monkeypatch.setattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn", lambda q, is_causal: q)
    assert "takes no window_size" in backend.status()["attention"]["peers"]["varlen"]


def test_varlen_of_an_older_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.11: no argument for grouped heads."""
    with anywhere(monkeypatch, "varlen") as recorder, use_backend("varlen", "attention"):
        library = importlib.import_module("torch.nn.attention.varlen")
        newer = library.varlen_attn

        def varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
        ):
            sums = cu_seq_q, cu_seq_k, max_q, max_k
            return newer(query, key, value, *sums, return_aux=return_aux, scale=scale, window_size=window_size)

        monkeypatch.setattr(library, "varlen_attn", varlen_attn)
        check("varlen", draw(packed(3, 1, 5), 9, 2, 2), lse=False)
        assert recorder.calls
        with pytest.raises(BackendUnavailable, match="takes no grouped heads"):
            attention(**by_name(draw(packed(3, 1, 5), 9, 4, 2)))


def test_tensors_that_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 2, 2, 8, dtype=torch.float16)
    assert module._tensors(x, x, x) == module._tensors_of_sdpa_cudnn(x, x, x) == "the tensors are on cpu"
    half = "q is torch.float16, k torch.float32, v torch.float16"
    assert module._tensors_of_sdpa_flash(x, x.float(), x) == module._same_dtype(x, x.float(), x) == half
    monkeypatch.setattr(module, "_on_gpu", lambda _: True)
    assert module._tensors(x, x, x) is True
    assert module._tensors(x, x.float(), x) == half
    assert module._tensors(*[x.float()] * 3) == "torch.float32 is not one of float16, bfloat16"
    wide = torch.zeros(1, 1, 1, 264, dtype=torch.bfloat16)
    assert module._tensors(wide, wide, wide) == "head dimension 264 is over 256"
    no_kernel = "PyTorch has no such kernel for these tensors on this GPU"
    kernel = module.SDPBackend.FLASH_ATTENTION
    assert module._tensors_of_sdpa(kernel, lambda p: p.enable_gqa, x, x[:, :, :1], x[:, :, :1]) is True
    assert module._tensors_of_sdpa(kernel, lambda p: p.enable_gqa, x, x, x) == no_kernel
    assert module._tensors_of_sdpa_flash(*[x.float()] * 3) == "torch.float32 is not one of float16, bfloat16"


# ---- what is kept


def test_ranges_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = module.samples_of

    def spy(ranges, keys):
        read.append(keys)
        return real(ranges, keys)

    monkeypatch.setattr(module, "samples_of", spy)
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    ranges = key_ranges(1, 6, CPU)

    def call() -> None:
        found = range_attention(q, k, v, ranges)
        with use_backend("reference"):
            torch.testing.assert_close(found, range_attention(q, k, v, ranges))

    with use_backend("sdpa_flash", "attention"):
        call()
        call()
        assert len(read) == 1
        with torch.inference_mode():
            ranges = key_ranges(1, 6, CPU)
            call()
            call()
        assert len(read) == 2
        start, end = (x.clone() for x in ranges)
        end.fill_(6)  # full from now on; whoever brings vectors has them read at each call
        torch.testing.assert_close(attention(q, k, v, start, end), attention(q, k, v, start, end))
        assert len(read) == 4


def test_what_is_kept_goes_with_the_ranges() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    ranges = key_ranges(1, 6, CPU)
    for name in ("sdpa_flash", "flex"):
        with use_backend(name, "attention"):
            range_attention(q, k, v, ranges)
    gone = weakref.ref(ranges.derived(module._block_mask, 6))
    assert gone() is not None
    del ranges
    gc.collect()
    assert gone() is None


def test_compiled_code_breaks_its_graph_at_a_peer() -> None:
    torch._dynamo.reset()
    ops = []

    def counting(graph, _):
        count = sum(node.op == "call_function" for node in graph.graph.nodes)
        ops.extend([count] if count else [])  # the ranges' object may make a graph of nothing
        return graph.forward

    compiled = torch.compile(lambda *tensors: attention(*tensors) * 2, backend=counting)
    for lengths in ((7,), (3, 4)):
        tensors = draw(packed(*lengths), 7, 4, 2, dtype=torch.float32).values()
        with use_backend("flex", "attention"):
            torch.testing.assert_close(compiled(*tensors), 2 * attention(*tensors))
    assert ops == [1]  # the product


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, llava_fast.ops.attention; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"flash_attn", "flash_attn_interface", "xformers", "torch.nn.attention.varlen", "torch._dynamo"}
    assert "llava_fast.ops.attention.peers" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


# ---- the real ones


BY_LENGTHS = {"varlen", "flash_attn", "flash_attn_3", "xformers"}
SDPA = {"sdpa_flash", "sdpa_cudnn"}
# case -> ranges, keys, key heads of eight, and who can express it
ON_A_GPU = {
    "equal samples": (packed(96, 96, 96), 288, 8, BY_LENGTHS | SDPA),
    "tower": (rows(*[[(0, 577)] * 577] * 2), 577, 8, BY_LENGTHS | SDPA),
    "pack": (packed(300, 1, 212), 513, 2, BY_LENGTHS),
    "left padding": (padded([0] * 40 + [1] * 160, [1] * 200), 200, 8, BY_LENGTHS | {"flex"}),
    "images": (packed(200, 113, images=[[(4, 150)], [(0, 100)]]), 313, 2, {"flex"}),
    "cache": (rows([(0, 700)], [(0, 700)]), 1024, 2, BY_LENGTHS | SDPA | {"flex"}),
}


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "case"), [(name, case) for case in ON_A_GPU for name in sorted(ON_A_GPU[case][3])])
def test_on_a_gpu(name: str, case: str) -> None:
    """Against the reference in float64: twice the reference's own error in bfloat16, or 1 % of the largest value, as
    libraries round elsewhere. A cache is decoded from, without gradients."""
    missing = backend.status()["attention"]["peers"][name]
    if missing != "available":
        pytest.skip(missing)
    ranges, keys, key_heads, _ = ON_A_GPU[case]
    tensors = {key: x.cuda() for key, x in draw(ranges, keys, 8, key_heads, torch.bfloat16, 64).items()}
    frozen = ("q", "k", "v") if case == "cache" else ()
    cotangents = [torch.randn_like(tensors["q"])]
    doubles = {key: x.double() if x.is_floating_point() else x for key, x in tensors.items()}

    def call(**tensors):
        return attention(**by_name(tensors))

    with use_backend("reference"):
        truth = run(call, doubles, [cotangents[0].double()], frozen)
        usual = run(call, tensors, cotangents, frozen)
    with use_backend(name, "attention"):
        try:
            found = run(call, tensors, cotangents, frozen)
        except BackendUnavailable as refusal:
            # Which kernels PyTorch has depends on its version and on the GPU.
            assert name in SDPA and "PyTorch has no such kernel" in str(refusal)
            return
        lse = attention(**by_name(tensors), return_lse=True)[1] if name not in SDPA | {"xformers"} else None
    for key, value in found.items():
        error, theirs = (float((x.double() - truth[key]).abs().max()) for x in (value, usual[key]))
        assert error <= max(2 * theirs, 1e-2 * float(truth[key].abs().max())), key
    if lse is not None:
        with use_backend("reference"):
            _, expected = attention(**by_name(doubles), return_lse=True)
        torch.testing.assert_close(lse, expected.float(), rtol=1e-2, atol=1e-2)
