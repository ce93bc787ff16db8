"""`tp_plan="auto"` on two processes (gloo): one process's numbers, from our class and from transformers'."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

from llava_fast import LlavaForConditionalGeneration
from tests.train.test_distributed import start

CLASSES = {"ours": LlavaForConditionalGeneration, "theirs": transformers.LlavaForConditionalGeneration}
SCRIPT = """
import sys

import torch
from torch.distributed.tensor import DTensor

from tests.contracts.test_tensor_parallel import CLASSES


def check(cls, folder):
    expected = torch.load(f"{folder}/expected.pt")
    model = cls.from_pretrained(folder, tp_plan="auto").eval()
    sharded = {name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    assert sharded == expected["sharded"], sharded ^ expected["sharded"]
    inputs = expected["inputs"]
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(model(**prompt).logits, expected["logits"], rtol=1e-4, atol=1e-5)
    said = model.generate(**prompt, max_new_tokens=5, do_sample=False, suppress_tokens=expected["suppressed"])
    assert said.equal(expected["said"]), said
    loss = model.train()(**inputs, use_cache=False).loss
    torch.testing.assert_close(loss.detach(), expected["loss"])
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected["gradients"]:
            wanted = expected["gradients"][name]
            gradient = parameter.grad.full_tensor() if name in sharded else parameter.grad
            assert (gradient - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-6, name
    model.save_pretrained(f"{folder}/saved")


for folder in sys.argv[1:]:
    check(CLASSES[folder.rpartition("-")[2]], folder)
    print("same as one process", flush=True)
"""
PROJECTIONS = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]


def make(tiny: ModuleType, folder: Path, cls: type, *, tied: bool) -> dict[str, torch.Tensor]:
    """Store a checkpoint and what one process computes with it; returns the weights."""
    # transformers shards the vocabulary as well, which two processes must divide.
    config = tiny.config({"vocab_size": tiny.VOCABULARY + 1, "tie_word_embeddings": tied}, tie_word_embeddings=tied)
    model: Any = tiny.stock(config)
    model.tie_weights()
    weights = model.state_dict()
    if cls is LlavaForConditionalGeneration:
        model = cls(config).eval()
        model.load_state_dict(weights)
    model.save_pretrained(folder)
    inputs = tiny.batch(config, [["image", 3], [2, "image", 4]], side="left")
    prompt = tiny.prompt(inputs)
    with torch.no_grad():
        logits = model(**prompt).logits
    said = model.generate(**prompt, max_new_tokens=5, do_sample=False, suppress_tokens=tiny.SUPPRESSED)
    loss = model.train()(**inputs, use_cache=False).loss
    loss.backward()
    text = "model.language_model"
    sharded = {f"{text}.layers.{i}.{name}.weight" for i in range(2) for name in PROJECTIONS}
    sharded |= {f"{text}.embed_tokens.weight"} if tied else {f"{text}.embed_tokens.weight", "lm_head.weight"}
    expected = {
        "sharded": sharded,
        "inputs": inputs,
        "logits": logits,
        "said": said,
        "suppressed": tiny.SUPPRESSED,
        "loss": loss.detach(),
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }
    torch.save(expected, folder / "expected.pt")
    return weights


def test_two_processes_compute_what_one_does(tiny: ModuleType, tmp_path: Path) -> None:
    weights = {}
    for name, cls in CLASSES.items():
        for kind in ("untied", "tied"):
            folder = tmp_path / f"{kind}-{name}"
            weights[folder] = make(tiny, folder, cls, tied=kind == "tied")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = start(str(script), *map(str, weights))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("same as one process") == 2 * len(weights)
    for folder, before in weights.items():
        saved = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "saved").state_dict()
        for key, weight in before.items():
            assert saved[key].equal(weight), (folder.name, key)
