"""How many kernels a forward or backward pass launches, and how many it may: counted dry, so without a GPU.

    python -m benchmarks.budgets

Triton kernels are recorded instead of launched (`recorded(dry=True)`), PyTorch's operators are counted as they are
dispatched; views and empty allocations launch nothing. The tower has LLaVA-1.5's depth and small widths, which do not
change the count; a decoder layer is the difference between a model of three layers and one of two. A test holds every
budget (`tests/benchmarks/test_budgets.py`); lower one when its count goes down.
"""

from __future__ import annotations

import os
from collections.abc import Callable

if __name__ == "__main__":  # on CPU tensors, kernels are only offered in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, StaticCache

from benchmarks.records import DEVICE
from llava_fast import LlavaForConditionalGeneration
from llava_fast.backend import use_backend
from llava_fast.ops._launch import recorded

BUDGETS = {
    "tower and projector": 190,
    "decoder layer, prefill": 12,
    "decoder layer, decoding": 9,
    "decoder layer, training forward": 12,
    "decoder layer, training backward": 26,
}
# What PyTorch does without a kernel: views, and memory that is not initialised.
FREE = set(
    "view _unsafe_view _reshape_alias transpose t permute expand slice select unbind split split_with_sizes detach "
    "as_strided unsqueeze squeeze alias lift_fresh empty empty_like empty_strided new_empty new_empty_strided".split()
)


class Operators(TorchDispatchMode):
    """Names of PyTorch's operators that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "aten" and name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def launches(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call launches: Triton's, then PyTorch's."""
    with use_backend("triton"), recorded(dry=True) as launched, Operators() as others:
        call()
    return [launch.name for launch in launched] + others.names


def tiny_llava(layers: int = 2) -> LlavaForConditionalGeneration:
    """fp16, in evaluation mode: a tower of 24 layers, a decoder of `layers`."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=24, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=2
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, image_seq_length=4)
    return LlavaForConditionalGeneration(config).to(DEVICE, torch.float16).eval()


def tower_and_projector() -> int:
    model, pixels = tiny_llava(), torch.zeros(1, 28, 28, 3, dtype=torch.uint8, device=DEVICE)
    with torch.no_grad():
        return len(launches(lambda: model.get_image_features(pixels)))


def decoder(layers: int) -> dict[str, int]:
    """Launches of whole passes through a decoder of so many layers."""
    model, ids = tiny_llava(layers), torch.ones(1, 9, dtype=torch.int64, device=DEVICE)
    counts: dict[str, int] = {}
    with torch.no_grad():
        # So many slots that the keys of a decoding step are split over several programs, as they are at real sizes.
        cache = StaticCache(model.config.get_text_config(), max_cache_len=768)
        for name, new in (("prefill", ids), ("decoding", ids[:, :1])):
            counts[name] = len(launches(lambda new=new: model(input_ids=new, past_key_values=cache, logits_to_keep=1)))
    model.train()
    loss: list[torch.Tensor] = []
    forward = launches(lambda: loss.append(model.model(input_ids=ids, use_cache=False).last_hidden_state.sum()))
    return {**counts, "training forward": len(forward), "training backward": len(launches(loss[0].backward))}


def counted() -> dict[str, int]:
    """The launches of everything that has a budget."""
    two, three = decoder(2), decoder(3)
    layer = {f"decoder layer, {name}": three[name] - two[name] for name in two}
    return {"tower and projector": tower_and_projector(), **layer}


if __name__ == "__main__":
    for what, count in counted().items():
        print(f"{what:34} {count:4} of {BUDGETS[what]}")
