"""Our processor and transformers' on the same calls: options, padding, errors, chat templates, files.

`processor.pixels = "float"` makes ours return transformers' pixels, so that whole batches can be compared.
"""

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, BatchFeature, CLIPImageProcessorPil, LlavaImageProcessorPil

from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.processor.processor import LlavaProcessor
from llava_fast.processor.templates import TEMPLATES
from tests.processor.made import PHOTOS, clip, word_tokenizer

IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8))
    for i, (height, width) in enumerate([(40, 33), (28, 57), (31, 31)])
]
TEXTS = ["USER: <image> what is this ? ASSISTANT:", "USER: what ?", "<image> a cat <image> two of them"]


def pair(
    image_processor: Any = None, tokenizer: Any = None, **settings: Any
) -> tuple[LlavaProcessor, transformers.LlavaProcessor]:
    """Our processor, with float pixels, and transformers', of the same parts."""
    parts = image_processor or clip(), tokenizer or word_tokenizer()
    settings = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1} | settings
    ours, theirs = (
        kind(*copy.deepcopy(parts), patch_size=14, **settings) for kind in (LlavaProcessor, transformers.LlavaProcessor)
    )
    ours.pixels = "float"
    return ours, theirs


def assert_same(ours: Any, theirs: Any) -> None:
    """The same type, keys and values; floats to 1e-6."""
    if isinstance(theirs, Mapping):
        assert set(ours) == set(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (torch.Tensor, np.ndarray)):
        assert type(ours) is type(theirs)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=0, atol=1e-6)
    elif isinstance(theirs, list):
        assert isinstance(ours, list)
        assert len(ours) == len(theirs)
        for mine, their in zip(ours, theirs):
            assert_same(mine, their)
    else:
        assert ours == theirs


# Options of a call

PT = {"return_tensors": "pt", "padding": True}
CALLS: dict[str, dict[str, Any]] = {
    "lists": {},
    "tensors": PT,
    "arrays": {"return_tensors": "np", "padding": "longest"},
    "nested-text": {"text_kwargs": {"padding": "max_length", "max_length": 21, "return_tensors": "pt"}},
    "nested-and-flat": {"text_kwargs": {"padding": "max_length", "max_length": 21}, "return_tensors": "pt"},
    "empty-text-kwargs": {"text_kwargs": {}, **PT},
    "common": {"common_kwargs": {"return_tensors": "pt"}, "text_kwargs": {"padding": True}},
    "flat-over-common": {"common_kwargs": {"return_tensors": "np"}, **PT},
    "nested-over-common": {"common_kwargs": {"return_tensors": "pt"}, "text_kwargs": {"return_tensors": "np", "padding": True}},
    "tensors-of-images": {"images_kwargs": {"return_tensors": "pt"}},
    "padding-side": {"padding_side": "left", **PT},
    "nested-padding-side": {"text_kwargs": {"padding_side": "right"}, **PT},
    "multiple": {"pad_to_multiple_of": 8, **PT},
    "truncation": {"truncation": True, "max_length": 12, **PT},
    "no-special-tokens": {"add_special_tokens": False},
    "no-mask": {"text_kwargs": {"return_attention_mask": False}},
    "offsets": {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_length": True},
    "token-types": {"return_mm_token_type_ids": True, **PT},
    "nested-token-types": {"text_kwargs": {"return_mm_token_type_ids": True}, **PT},
    "replacements": {"return_text_replacement_offsets": True, **PT},
    "unknown": {"no_such_option": 3, **PT},
    "size": {"images_kwargs": {"size": {"shortest_edge": 60}, "crop_size": {"height": 56, "width": 42}}, **PT},
    "flat-size": {"size": 30, "crop_size": 28, **PT},
    "stretched": {"images_kwargs": {"size": {"height": 28, "width": 42}, "do_center_crop": False}, **PT},
    "not-resized": {"do_resize": False, "images_kwargs": {"crop_size": {"height": 28, "width": 28}}, **PT},
    "resample": {"resample": Image.Resampling.NEAREST, **PT},
    "mean": {"images_kwargs": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}, **PT},
    "one-mean": {"image_mean": 0.5, "image_std": 0.25, **PT},
    "not-normalised": {"images_kwargs": {"do_normalize": False}, **PT},
    "rescaled": {"do_rescale": True, "images_kwargs": {"rescale_factor": -1.0}, **PT},
    "not-rescaled": {"do_rescale": False, **PT},
    "common-image-option": {"common_kwargs": {"do_normalize": False}},
    "padded": {"images_kwargs": {"do_pad": True}, **PT},
    "no-effect": {"device": "cpu", "disable_grouping": True, "data_format": "channels_first", **PT},
}  # fmt: skip


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the type of its error."""
    try:
        return call()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, LlavaImageProcessorPil])
@pytest.mark.parametrize("name", CALLS)
def test_options(name: str, kind: type) -> None:
    settings = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    ours, theirs = pair(kind(**settings))
    given = copy.deepcopy(CALLS[name])
    found, expected = (outcome(lambda p=p: p(images=IMAGES, text=TEXTS, **given)) for p in (ours, theirs))
    assert given == CALLS[name]
    assert_same(found, expected)
    assert outcome(lambda: ours.image_processor.to_dict()) == theirs.image_processor.to_dict()
