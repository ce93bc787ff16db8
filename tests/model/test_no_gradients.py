"""What a pass without gradients costs besides matrix products: no autograd function and no custom operator is
entered, and a pass runs no more of PyTorch's operators than transformers'. These are counts, so they do not depend on
the machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.profiler import profile
from transformers import DynamicCache, StaticCache

from benchmarks.budgets import Operators
from llava_fast.backend import use_backend
from llava_fast.model.cache import Int8Cache
from llava_fast.ops._launch import recorded


@contextmanager
def entered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the autograd functions and of this library's custom operators that are entered inside the block."""
    names: list[str] = []
    apply = torch.autograd.Function.apply.__func__

    def counted(cls, *arguments, **keywords):
        names.append(cls.__name__)
        return apply(cls, *arguments, **keywords)

    with monkeypatch.context() as patch, profile() as events:
        patch.setattr(torch.autograd.Function, "apply", classmethod(counted))
        yield names
    names += [event.name for event in events.function_events if event.name.startswith("llava_fast::")]


def test_generating_on_a_cpu_enters_none(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    config = tiny.config()
    model, inputs = tiny.ours(config), tiny.batch(config, [[3, "image", 5], ["image", 8]], side="left")
    labels = inputs.pop("labels")
    with entered(monkeypatch) as names:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                model(**inputs, labels=labels, return_logits=False)
    assert names == []
    with entered(monkeypatch) as names:
        model(**inputs, labels=labels, return_logits=False)
    assert {"_RMSNormReference", "_RotaryReference", "llava_fast::linear_cross_entropy"} <= set(names)


KERNELS = {
    "patch_embed_fwd_kernel",
    "norm_fwd_kernel",
    "attention_fwd_kernel",
    "activation_fwd_kernel",
    "merge_fwd_kernel",
    "rotary_kernel",
    "cache_write_kernel",
    "decode_attention_kernel",
    "loss_kernel",
}


def test_launching_kernels_enters_none(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    config = tiny.config()
    model, inputs = tiny.ours(config), tiny.batch(config, [[3, "image", 5]])
    labels = inputs.pop("labels")
    token = inputs["input_ids"][:, -1:]
    with use_backend("triton"), recorded(dry=True) as launched:
        with entered(monkeypatch) as names, torch.no_grad():
            model(**inputs, labels=labels, return_logits=False)
            for cache in (DynamicCache(), StaticCache(config.text_config, 32), Int8Cache(config, 32)):
                model(**inputs, past_key_values=cache, logits_to_keep=1)
                model(input_ids=token, past_key_values=cache)
        assert names == []
        assert {launch.name.strip("_") for launch in launched} == KERNELS
        with entered(monkeypatch) as names:
            model(**inputs, labels=labels, return_logits=False)
        expected = "patch_embed norm attention activation swiglu merge rotary linear_cross_entropy projector".split()
        assert {f"llava_fast::{op}" for op in expected} <= set(names)


@pytest.mark.parametrize("rows", [1, 2])
def test_passes_run_no_more_operators_than_transformers(tiny: SimpleNamespace, rows: int):
    """Prefill with images, then decoding, with the arguments of `generate`; views are not counted."""
    config = tiny.config({"num_hidden_layers": 4})
    prompt = tiny.batch(config, [["image", 9]] * rows)
    del prompt["labels"]
    mask = torch.nn.functional.pad(prompt["attention_mask"], (0, 1), value=1)
    step = {"input_ids": prompt["input_ids"][:, -1:], "attention_mask": mask, "position_ids": mask.sum(1)[:, None] - 1}
    counts: dict[str, list[int]] = {"prefill": [], "decoding": []}
    for model in tiny.pair(config):
        cache = DynamicCache(config=config)
        for name, inputs in (("prefill", prompt), ("decoding", step)):
            with torch.no_grad(), Operators() as operators:
                model(**inputs, past_key_values=cache, logits_to_keep=1)
            counts[name].append(len(operators.names))
    for name, (ours, theirs) in counts.items():
        assert ours <= theirs, name
