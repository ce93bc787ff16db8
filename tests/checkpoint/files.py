"""Checkpoints of every layout, written by hand or by transformers, and how models are compared."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from llava_fast.checkpoint.layouts import classic_name
from llava_fast.drop_in import LlavaForConditionalGeneration

ROWS = [[4, "image", 6], [9], [2, "image", 3, "image", 7]]

Rename = Callable[[str], str]


# From our parameter names, which are those of transformers ≥ 5.6 in memory, to each layout.
LAYOUTS: dict[str, Rename] = {
    "classic": classic_name,
    "classic-without-vision-model": lambda name: classic_name(name).replace("vision_model.", ""),
    "memory-5": lambda name: name,
    "memory-4.57": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "classic-text-and-memory-vision": lambda name: name if "vision" in name else classic_name(name),
}


def write(model: torch.nn.Module, folder: Path, rename: Rename, *, binary: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint of one file in some layout; tied heads are left out, as transformers does."""
    tied = model.config.tie_word_embeddings
    weights = {
        rename(name): weight.detach().clone()
        for name, weight in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    store(weights, folder, binary=binary)
    return weights


def store(weights: dict[str, torch.Tensor], folder: Path, *, binary: bool = False) -> None:
    if binary:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "gqa": ({"num_key_value_heads": 2}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "linear": ({}, {"mm_projector_type": "linear"}),
    "mlp3x": ({}, {"mm_projector_type": "mlp3x_gelu"}),
    "full": ({"rope_theta": 5e5}, {"vision_feature_select_strategy": "full", "vision_feature_layer": 2}),
    "identity": ({"hidden_size": 24}, {"mm_projector_type": "identity"}),
}


def make(tiny: SimpleNamespace, kind: str = "plain") -> LlavaForConditionalGeneration:
    text, llava = KINDS[kind]
    return tiny.ours(tiny.config(text, **llava))


def assert_grown(model: torch.nn.Module, expected: torch.nn.Module, tiny: SimpleNamespace) -> None:
    """`model` is `expected` with an image token after its vocabulary, and answers as it does."""
    vocabulary = expected.config.text_config.vocab_size
    assert model.config.image_token_index == vocabulary
    assert model.config.text_config.vocab_size == -(-(vocabulary + 2) // 64) * 64
    for name, weight in expected.state_dict().items():
        ours = model.state_dict()[name]
        if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            tiny.assert_near(ours[vocabulary:], weight.mean(0).expand(len(ours) - vocabulary, -1), 1e-6, name)
            ours = ours[:vocabulary]
        assert torch.equal(ours, weight), name
    inputs = tiny.batch(expected.config, ROWS)
    wanted = expected(**inputs).logits
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, vocabulary)
    with torch.no_grad():
        logits = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
    tiny.assert_near(logits[..., :vocabulary], wanted, 1e-6)
    assert (logits[..., vocabulary:].amax(-1) <= logits[..., :vocabulary].amax(-1)).all()
