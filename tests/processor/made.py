"""Small processors, real photographs, and how pixels are compared."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
)

from llava_fast.processor.processor import LlavaProcessor


def package_folder(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


SKIMAGE = package_folder("skimage") / "data"


PHOTOS = [
    *(SKIMAGE / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")),
    package_folder("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg",
]


def clip(size: int = 28, **options) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **options)


def word_tokenizer(**options) -> PreTrainedTokenizerFast:
    words = "<unk> <s> </s> <pad> <image> USER: ASSISTANT: what is this ? a cat dog two of them and".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | options
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def make(image_processor=None, tokenizer=None, **options) -> LlavaProcessor:
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default"} | options
    return LlavaProcessor(image_processor or clip(), tokenizer or word_tokenizer(), **settings)


def hf_pixels(image_processor, image) -> np.ndarray:
    """transformers' uint8 [H, W, 3], just before it rescales and normalises."""
    values = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return values.transpose(1, 2, 0)


def assert_within_one(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(np.int32) - theirs.astype(np.int32)).max() <= 1


def named(error: pytest.ExceptionInfo, *names) -> str:
    message = str(error.value)
    assert "\n" not in message
    for name in names:
        assert str(name) in message
    return message
