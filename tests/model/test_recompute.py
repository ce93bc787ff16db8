"""Activations that backward makes again: the same gradients to the bit, less memory, nothing outlives the graph."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from benchmarks.harness import LiveStorages
from llava_fast.model import language
from llava_fast.model.joined import recomputed
from llava_fast.model.language import DecoderLayer, Positions
from llava_fast.ops.attention import KeyRanges

TOKENS, WIDTH, INNER = 48, 32, 80


def decoder_layer() -> DecoderLayer:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=2, vocab_size=8)
    return DecoderLayer(config, 0).train()


def positions() -> Positions:
    angle = torch.randn(1, TOKENS, WIDTH // 2)
    end = torch.arange(1, TOKENS + 1, dtype=torch.int32)[None]
    return Positions(angle.cos(), angle.sin(), KeyRanges(torch.zeros_like(end), end))


@contextmanager
def keeping_everything() -> Iterator[None]:
    def keep(tensor, make):
        return nullcontext()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "recomputed", keep)
        yield


def gradients(layer: torch.nn.Module, x: torch.Tensor, where: Positions, rows=None, run=None) -> dict:
    torch.manual_seed(1)
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y, _ = run(x) if run else layer(x, where, rows=rows)
    y.float().square().sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 40, 47])], ids=["all", "rows"])
@pytest.mark.parametrize("kind", ["full", "frozen", "lora", "autocast"])
def test_the_gradients_are_the_same_to_the_bit(kind: str, rows: torch.Tensor | None):
    layer, where, x = decoder_layer(), positions(), torch.randn(1, TOKENS, WIDTH)
    if kind == "frozen":
        layer.requires_grad_(False)
    if kind == "lora":
        targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
        layer = get_peft_model(layer, LoraConfig(r=4, target_modules=targets, lora_dropout=0.5)).base_model.model
        for name, parameter in layer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = gradients(layer, x, where, rows)
        with keeping_everything():
            expected = gradients(layer, x, where, rows)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
        assert gradient.abs().max() > 0, name


def kept_bytes(layer: DecoderLayer, x: torch.Tensor, where: Positions) -> int:
    with LiveStorages() as live:
        y = layer(x, where)[0]
        kept = live.live
    del y
    return kept


def test_the_normalised_inputs_and_the_product_are_not_kept():
    layer, where = decoder_layer(), positions()
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    layer(x, where)  # makes what attention keeps of the ranges
    found = kept_bytes(layer, x, where)
    with keeping_everything():
        assert kept_bytes(layer, x, where) - found == 4 * TOKENS * (2 * WIDTH + INNER)


def test_all_is_freed_with_the_graph_and_makes_are_shared():
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(3)]
    inputs, made = [torch.randn(2, 4, requires_grad=True)], []

    def make(x: torch.Tensor = inputs[0]) -> torch.Tensor:
        made.append(None)
        return x.square()

    gc.disable()
    try:
        h = make()
        with recomputed(h, make):
            outs = [h @ weight for weight in weights]
        storage = weakref.ref(h.untyped_storage())
        del h
        assert storage() is None
        loss = sum(out.sum() for out in outs)
        del outs
        for expected in (2, 3):  # one more for each backward, whatever the number of readers
            loss.backward(retain_graph=True)
            assert len(made) == expected
        kept = weakref.ref(inputs.pop())
        del loss, make
        assert kept() is None
    finally:
        gc.enable()


def test_a_tensor_without_memory_of_its_own_is_kept():
    """As DTensors are: all of them lie at address 0, and a weight may have as many numbers as the input."""
    x, weight = (TwoTensor(torch.randn(4, 4), torch.randn(4, 4)).requires_grad_() for _ in range(2))
    expected = torch.autograd.grad((x.square() @ weight).sum(), (x, weight))
    h = x.square()
    with recomputed(h, x.square):
        y = h @ weight
    for found, wanted in zip(torch.autograd.grad(y.sum(), (x, weight)), expected, strict=True):
        assert torch.equal(found.a, wanted.a) and torch.equal(found.b, wanted.b)


@pytest.mark.parametrize("inside", ["checkpoint", "offload"])
def test_somebody_elses_hooks_are_left_alone(inside: str):
    layer, where = decoder_layer(), positions()
    x = torch.randn(1, TOKENS, WIDTH)
    expected = gradients(layer, x, where)
    seen = []

    def saved(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    if inside == "checkpoint":
        found = gradients(layer, x, where, run=lambda x: checkpoint(layer, x, where, use_reentrant=False))
    else:
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            found = gradients(layer, x, where)
        assert (TOKENS, INNER) in seen  # the product, which down_proj saved
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_a_checkpointed_layer_keeps_its_input_alone():
    layer, where = decoder_layer(), positions()
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    layer(x, where)
    with LiveStorages() as live:
        y = checkpoint(layer, x, where, use_reentrant=False)[0]
        kept = live.live
    assert kept == y.untyped_storage().nbytes()


def test_gradients_of_gradients_reach_what_is_made_again():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        h = x.square()
        with recomputed(h, x.square):
            return h @ weight

    assert torch.autograd.gradgradcheck(run, (x, weight))
