"""Host time: what a pass costs the CPU before any kernel runs, of transformers' model (sdpa) and of this one.

    host_decoding_static, host_decoding_dynamic   one token after 9, with transformers' static or dynamic cache
    host_tower                                    `get_image_features` of one image: tower and projector

Thread time, both models in turns in one process, on CPU tensors so small (width 64) that arithmetic hardly counts:
32 decoder layers, a tower of 24. Launches are left out: this library's Triton kernels are not run (`dry`), while
PyTorch's operators, in both models, run. On a GPU each launch adds to both. Logits, or features, of this library's
reference are compared with transformers' first; error and peak memory in the records are those of that comparison.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from unittest import mock

import pytest
import torch
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, StaticCache
from transformers import LlavaForConditionalGeneration as Stock

from benchmarks.harness import Case, Measurement, peak_bytes, report, stored_samples
from llava_fast.backend import use_backend
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.ops import _launch

LAYERS, WIDTH, PROMPT, SLOTS = 32, 64, 9, 512
ROUNDS = 40
SHAPES = {
    "host_decoding_static": (1, PROMPT, WIDTH, LAYERS),
    "host_decoding_dynamic": (1, PROMPT, WIDTH, LAYERS),
    "host_tower": (1, 5, WIDTH, 24),
}


@cache
def models() -> dict[str, torch.nn.Module]:
    """transformers' and this library's, with the same random weights."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=24,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        vocab_size=64,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, image_seq_length=4)
    torch.manual_seed(0)
    stock, ours = Stock(config).eval(), LlavaForConditionalGeneration(config).eval()
    ours.load_state_dict(stock.state_dict())
    return {"hf": stock, "triton": ours.eval()}


def call_of(op: str, provider: str) -> Callable[[], torch.Tensor]:
    """The pass to measure; its result is compared."""
    model = models()[provider]
    if op == "host_tower":
        pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        return lambda: model.get_image_features(pixels).pooler_output[0]
    ids, text = torch.ones(1, PROMPT, dtype=torch.int64), model.config.get_text_config()
    kept = StaticCache(text, max_cache_len=SLOTS) if op == "host_decoding_static" else DynamicCache(config=text)
    model(input_ids=ids, past_key_values=kept)
    return lambda: model(input_ids=ids[:, :1], past_key_values=kept, logits_to_keep=1).logits


@contextmanager
def dry():
    """Kernels are neither run nor recorded."""
    interpreted = mock.patch("llava_fast.backend._INTERPRETED", True)  # on CPU tensors, the only way to be offered them
    with interpreted, mock.patch.object(_launch, "_dry", True), use_backend("triton"):
        yield


def measure(op: str, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each round, by provider; the providers of a round follow each other."""
    seconds: dict[str, list[float]] = {"hf": [], "triton": []}
    with torch.no_grad(), dry():
        calls = {name: call_of(op, name) for name in seconds}
        for i in range(rounds + 3):
            for name, call in calls.items():
                start = time.thread_time()
                call()
                if i >= 3:
                    seconds[name].append(time.thread_time() - start)
    return seconds


def ratio(seconds: dict[str, list[float]]) -> float:
    """Ours over transformers': the median over the rounds."""
    ratios = sorted(ours / theirs for ours, theirs in zip(seconds["triton"], seconds["hf"]))
    return ratios[len(ratios) // 2]


def error(op: str) -> float:
    """Largest difference from transformers' result, relative to its largest value; `AssertionError` if it is large."""
    with torch.no_grad():
        expected, found = (call_of(op, name)() for name in ("hf", "triton"))
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference < 1e-5, f"{op}: {difference:.1e}"
    return difference


@cache
def measured(case: Case) -> dict[str, Measurement]:
    wrong, found = error(case.op), measure(case.op)
    with torch.no_grad():
        peaks = {name: peak_bytes(call_of(case.op, name)) for name in found}
    errors = {"hf": 0.0, "triton": wrong}
    timer = "thread_time, launches left out"
    return {name: Measurement(samples, peaks[name], errors[name], timer) for name, samples in found.items()}


def case_of(op: str) -> Case:
    call = {name: partial(call_of, op, name) for name in ("hf", "triton")}
    return Case(op, SHAPES[op], torch.float32, False, dict, call["hf"], call, bytes_moved=0, flops=0)


def cases(gpu: bool) -> list[Case]:
    """None on a GPU: its launches would be part of the time."""
    return [] if gpu else [case_of(op) for op in SHAPES]


CASES = cases(gpu=torch.cuda.is_available())
PARAMETERS = [
    pytest.param(c, p, id=f"{c.op}-{p}", marks=pytest.mark.benchmark(group=str(c), timer=stored_samples))
    for c in CASES
    for p in c.providers
]

if PARAMETERS:

    @pytest.mark.parametrize(("case", "provider"), PARAMETERS)
    def test_host(benchmark, case: Case, provider: str):
        report(benchmark, case, provider, measured)
