"""How many kernels a pass launches, counted dry and so without a GPU; the tower is as deep as LLaVA-1.5's."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_fast.backend import use_backend
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.ops._launch import recorded
from llava_fast.ops.attention import KeyRanges
from llava_fast.ops.attention import ranges as module

# What PyTorch answers without a kernel: views, and memory that nobody has written to.
FREE = set(
    "view _unsafe_view _reshape_alias transpose t permute expand slice select unbind split split_with_sizes detach "
    "as_strided unsqueeze squeeze alias lift_fresh empty empty_like empty_strided new_empty new_empty_strided".split()
)


class Kernels(TorchDispatchMode):
    """Names of PyTorch's operators that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "aten" and name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=24, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, image_seq_length=4)
    return LlavaForConditionalGeneration(config).to(torch.float16).eval()


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was worked out of key ranges, each time that it was."""
    calls: list[str] = []
    for name in ("_first_of_sample", "_seen_by", "_groups_of"):
        real = getattr(module, name)

        def spy(ranges: KeyRanges, keys: int, name: str = name, real=real):
            calls.append(name)
            return real(ranges, keys)

        monkeypatch.setattr(module, name, spy)
    yield calls


def launches_of_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> list[str]:
    with torch.no_grad(), use_backend("triton"), recorded(dry=True) as launched, Kernels() as others:
        model.model._encode(pixels, None, None, False)
    return [launch.name for launch in launched] + others.names


@pytest.mark.parametrize("images", [1, 3])
def test_a_captured_tower_launches_no_more_than_an_eager_one(
    model: LlavaForConditionalGeneration, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.zeros(images, 28, 28, 3, dtype=torch.uint8)
    eager = launches_of_features(model, pixels)
    monkeypatch.setattr(KeyRanges, "_capturing", lambda self: True)
    captured = launches_of_features(model, pixels)
    assert captured == eager
    assert len(eager) <= 201
    assert eager.count("_attention_fwd_kernel") == 23


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("capturing", [False, True])
def test_ranges_are_worked_out_once_for_all_layers(
    model: LlavaForConditionalGeneration, mode, capturing: bool, worked_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeyRanges, "_capturing", lambda self: capturing)
    ids = torch.ones(2, 9, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with mode(), use_backend("triton"), recorded(dry=True):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert worked_out == ["_first_of_sample"]


def test_training_works_out_once_which_queries_see_a_key(
    model: LlavaForConditionalGeneration, worked_out: list[str]
) -> None:
    ids = torch.ones(2, 9, dtype=torch.int64)
    with use_backend("triton"), recorded(dry=True) as launched:
        hidden = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        hidden.sum().backward()
    model.zero_grad()
    assert sorted(worked_out) == ["_first_of_sample", "_seen_by"]
    assert [launch.name for launch in launched].count("_attention_bwd_dkdv_kernel") == 4
