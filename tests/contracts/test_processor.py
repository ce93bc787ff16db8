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
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaImageProcessorPil

from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.processor.processor import LlavaProcessor
from llava_fast.processor.templates import TEMPLATES
from tests.processor.made import SKIMAGE, clip, word_tokenizer

IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8))
    for i, (height, width) in enumerate([(40, 33), (28, 57), (31, 31)])
]
SIZE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
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
    "nested-over-common": {"common_kwargs": {"return_tensors": "pt"}, "text_kwargs": {**PT, "return_tensors": "np"}},
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
    "vllm": {"return_mm_token_type_ids": True, "truncation": False, "add_special_tokens": False, **PT},
    "unknown": {"no_such_option": 3, "text_kwargs": {"no_such_option": 1}, **PT},
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


@pytest.fixture(scope="module", params=[CLIPImageProcessorPil, LlavaImageProcessorPil], ids=["clip", "llava"])
def both(request: pytest.FixtureRequest) -> tuple[LlavaProcessor, transformers.LlavaProcessor]:
    return pair(request.param(**SIZE))


@pytest.mark.parametrize("name", CALLS)
def test_options(both: Any, name: str) -> None:
    given = copy.deepcopy(CALLS[name])
    found, expected = (processor(images=IMAGES, text=TEXTS, **given) for processor in both)
    assert given == CALLS[name]
    assert_same(found, expected)
    ours, theirs = both
    assert ours.image_processor.to_dict() == theirs.image_processor.to_dict()


@pytest.mark.parametrize("changed", ["image_mean", "do_normalize", "rescale_factor"])
def test_options_of_a_call_that_change_the_normalisation_give_floats(changed: str) -> None:
    ours, theirs = pair()
    ours.pixels = "uint8"
    call = {"images": IMAGES, "text": TEXTS, **PT}
    same = {"image_mean": list(theirs.image_processor.image_mean), "do_normalize": True, "rescale_factor": 1 / 255}
    other = {"image_mean": [0.1, 0.2, 0.3], "do_normalize": False, "rescale_factor": 0.01}
    assert_same(ours(**call, **{changed: same[changed]}), ours(**call))
    assert_same(ours(**call, **{changed: other[changed]}), theirs(**call, **{changed: other[changed]}))


WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "twice": (ValueError, {"text_kwargs": {"padding": "do_not_pad"}, "padding": True}),
    "image-option-twice": (ValueError, {"images_kwargs": {"do_resize": True}, "do_resize": True}),
    "cut": (ValueError, {"truncation": True, "max_length": 5}),
    "truncation": (ValueError, {"truncation": "somewhere"}),
    "padding": (ValueError, {"padding": "sideways"}),
    "size": (ValueError, {"images_kwargs": {"size": {"diagonal": 3}}}),
    "type": (TypeError, {"text_kwargs": {"max_length": "long"}}),
    "unknown-nested": (TypeError, {"images_kwargs": {"no_such_option": 1}}),
    "not-for-images": (TypeError, {"common_kwargs": {"padding": True}}),
    "nothing": (ValueError, {"images": None, "text": None}),
    "no-image": (ValueError, {"images": None}),
    "too-many-images": (ValueError, {"images": IMAGES * 2}),
    "not-text": (ValueError, {"text": [3]}),
}
# transformers 5.20, the last for Python 3.10, does not check the last three, and has no `sanitize_control_tokens`.
IS_5_20 = transformers.__version__.startswith("5.20.")


@pytest.mark.parametrize("name", WRONG)
def test_both_refuse(both: Any, name: str) -> None:
    error, changes = WRONG[name]
    unchecked = {"no-image", "too-many-images", "not-text"} if IS_5_20 else set()
    for processor in both if name not in unchecked else both[:1]:
        with pytest.raises(error):
            processor(**{"images": IMAGES, "text": TEXTS, **changes})


def test_options_that_the_tokenizer_was_created_with() -> None:
    tokenizer = word_tokenizer(padding="max_length", max_length=19, padding_side="left")
    ours, theirs = pair(tokenizer=tokenizer)
    for call in ({}, {"text_kwargs": {"max_length": 23}}, {"max_length": 23}, {"padding": False}):
        assert_same(ours(images=IMAGES, text=TEXTS, **call), theirs(images=IMAGES, text=TEXTS, **call))


PICTURES = [np.asarray(image) for image in IMAGES]
FORMS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "one": lambda: (IMAGES[0], TEXTS[0]),
    "text": lambda: (None, "a cat"),
    "texts": lambda: (None, ["a cat", "a dog"]),
    "images": lambda: (IMAGES, None),
    "flat": lambda: (IMAGES, TEXTS),
    "nested": lambda: ([IMAGES[:1], [], IMAGES[1:]], TEXTS),
    "tuple": lambda: (IMAGES, tuple(TEXTS)),
    "arrays": lambda: (PICTURES, TEXTS),
    "tensors": lambda: ([torch.tensor(picture) for picture in PICTURES], TEXTS),
    "channels-first": lambda: ([torch.tensor(picture).permute(2, 0, 1) for picture in PICTURES], TEXTS),
    "batch": lambda: (np.stack([PICTURES[0]] * 3), TEXTS),
    "batches": lambda: ([np.stack([PICTURES[0]] * 3)], TEXTS),
    "grey": lambda: ([image.convert("L") for image in IMAGES], TEXTS),
}


@pytest.mark.parametrize("tensors", [None, "pt"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_images_and_text(both: Any, form: str, tensors: str | None) -> None:
    images, text = FORMS[form]()
    padding = {"padding": True} if tensors and text is not None else {}
    ours, theirs = (processor(images=images, text=text, return_tensors=tensors, **padding) for processor in both)
    assert_same(ours, theirs)


def test_arguments_by_position(both: Any) -> None:
    ours, theirs = (processor(IMAGES, TEXTS, None, None, **PT) for processor in both)
    assert_same(ours, theirs)
    for extra in ((IMAGES, None), (None, IMAGES)):
        with pytest.raises(TypeError, match="no videos or audio"):
            both[0](IMAGES, TEXTS, *extra)


# Padding


def collate(processor: Any, texts: list[str]) -> dict[str, Any]:
    """The collator of transformers' and TRL's examples: right padding, every token but pads and images supervised."""
    processor.tokenizer.padding_side = "right"
    batch = processor(images=IMAGES, text=texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].clone()
    labels[labels == processor.tokenizer.pad_token_id] = -100
    labels[labels == processor.image_token_id] = -100
    return {**batch, "labels": labels}


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> tuple[Any, Any]:
    kinds = LlavaForConditionalGeneration, transformers.LlavaForConditionalGeneration
    return tuple(kind.from_pretrained(tiny_checkpoint).eval() for kind in kinds)


@pytest.fixture
def processors(tiny_checkpoint: Path) -> tuple[LlavaProcessor, transformers.LlavaProcessor]:
    return tuple(kind.from_pretrained(tiny_checkpoint) for kind in (LlavaProcessor, transformers.LlavaProcessor))


def test_a_collator_that_pads_on_the_right_gives_the_same_losses(models: Any, processors: Any, tiny: Any) -> None:
    texts = ["USER: <image> word1 ASSISTANT: word2 word3", "USER: word4", "<image> a <image> word5 word6 word7 word8"]
    ours, theirs = (collate(processor, texts) for processor in processors)
    assert ours["pixel_values"].dtype == torch.uint8
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(ours[key], theirs[key])
    expected = models[1](**theirs).loss
    tiny.assert_near(models[0](**theirs).loss, expected)
    tiny.assert_near(models[0](**ours).loss, expected, 1e-5)
    with pytest.raises(ValueError, match=r"set processor.tokenizer.padding_side = 'left'"):
        models[0].generate(**{key: ours[key] for key in ("input_ids", "attention_mask", "pixel_values")})


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_is_loaded_and_saved(tiny_checkpoint: Path, tmp_path: Path, side: str) -> None:
    for kind in (LlavaProcessor, transformers.LlavaProcessor):
        processor = kind.from_pretrained(tiny_checkpoint, padding_side=side, use_fast=True)
        assert processor.tokenizer.padding_side == side
        processor.save_pretrained(tmp_path)
        for again in (LlavaProcessor, transformers.LlavaProcessor):
            batch = again.from_pretrained(tmp_path)(text=["a", "a word"], padding=True, return_tensors="pt")
            assert batch["attention_mask"][0, 0 if side == "right" else -1] == 1
            assert batch["attention_mask"][0, -1 if side == "right" else 0] == 0


# Either library's model with either's processor


def test_logits_of_every_pair(models: Any, processors: Any, tiny: Any) -> None:
    call = {"images": IMAGES[:2], "text": ["USER: <image> word1", "<image> word2 word3"], **PT}
    real = processors[1](**call)["attention_mask"].bool()

    def logits(model: int, processor: int, **options: Any) -> torch.Tensor:
        return models[model](**processors[processor](**call, **options)).logits[real]

    expected = logits(1, 1)
    tiny.assert_near(logits(0, 1), expected)
    tiny.assert_near(logits(0, 0), expected, 1e-5)
    with pytest.raises(ValueError, match="Input image size"):  # transformers' model refuses uint8 [N, H, W, 3]
        logits(1, 0)
    tiny.assert_near(logits(1, 0, pixels="float"), expected)
    processors[0].pixels = "float"
    tiny.assert_near(logits(1, 0), expected)
    tiny.assert_near(logits(0, 0), expected)


def test_a_pipeline_of_every_pair(models: Any, processors: Any) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "word3"}]}]
    batch = {"images": IMAGES[1:], "text": ["USER: <image> word1 ASSISTANT:", "<image> word2"], "batch_size": 2}
    answers = []
    for model in models:
        for processor in processors:
            if model is models[1]:
                processors[0].pixels = "float"
            answer = transformers.pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
            several = answer(**batch, max_new_tokens=6, padding=True, padding_side="left")
            answers.append([answer(chat, max_new_tokens=6)[0]["generated_text"][-1], several])
    assert answers == [answers[-1]] * 4


# What vLLM calls


@pytest.mark.parametrize(
    "options",
    [{}, {"crop_size": {"height": 56, "width": 42}}, {"images_kwargs": {"crop_size": SIZE["crop_size"]}}],
)
def test_numbers_of_image_tokens(both: Any, options: dict[str, Any]) -> None:
    for sizes in ([[100, 100]], ([100, 30], [7, 9]), []):
        ours, theirs = (processor._get_num_multimodal_tokens(image_sizes=sizes, **options) for processor in both)
        assert ours == theirs
        assert ours["num_image_tokens"] == theirs["num_image_tokens"]
        assert "num_video_tokens" not in ours
    assert both[0]._get_num_multimodal_tokens() == both[1]._get_num_multimodal_tokens()
    batch = both[0](images=IMAGES[:1], text="<image>", return_mm_token_type_ids=True, pixels="uint8", **options)
    counted = both[0]._get_num_multimodal_tokens(image_sizes=[[40, 33]], pixels="uint8", **options)
    assert [sum(row) for row in batch["mm_token_type_ids"]] == counted["num_image_tokens"]


def test_numbers_of_image_tokens_without_a_crop() -> None:
    """transformers counts by `crop_size` here, although nothing is cropped; a call gives 6 tokens."""
    ours, theirs = pair(CLIPImageProcessorPil(size={"height": 28, "width": 42}, do_center_crop=False))
    assert theirs(images=IMAGES[0], text="<image>")["input_ids"][0].count(theirs.image_token_id) == 6
    assert ours._get_num_multimodal_tokens(image_sizes=[[40, 33]])["num_image_tokens"] == [6]


# Chat templates

PHOTO = str(SKIMAGE / "chessboard_RGB.png")
CHATS = [
    [
        {"role": "system", "content": [{"type": "text", "text": "a cat"}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": IMAGES[0]},
                {"type": "text", "text": "what is this ?"},
                {"type": "image", "path": PHOTO},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a cat and a dog"}]},
        {"role": "user", "content": "what ?"},
        {"role": "assistant", "content": "two of them"},
    ],
    [
        {
            "role": "user",
            "content": [{"type": "image", "url": PHOTO}, {"type": "image_url", "image_url": {"url": PHOTO}}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
    ],
    [{"role": "user", "content": "a cat ?"}, {"role": "assistant", "content": "a dog"}],
]
DICT = {"tokenize": True, "return_dict": True}
MASK = {**DICT, "return_assistant_tokens_mask": True}
LEFT, RIGHT = ({"padding": True, "padding_side": side} for side in ("left", "right"))
TEMPLATE_CALLS: dict[str, dict[str, Any]] = {
    "text": {},
    "text-to-generate": {"add_generation_prompt": True},
    "continued": {"continue_final_message": True},
    "ids": {"tokenize": True},
    "lists": DICT,
    "tensors": {**DICT, "return_tensors": "pt", "processor_kwargs": {"padding": True}},
    "flat-options": {**DICT, "return_tensors": "np", **LEFT},
    "to-generate": {**DICT, "add_generation_prompt": True, "processor_kwargs": PT},
    "continued-tensors": {**DICT, "continue_final_message": True, "processor_kwargs": PT},
    "image-options": {**DICT, "processor_kwargs": {"images_kwargs": {"do_normalize": False}, **PT}},
    "mask": MASK,
    "mask-left": {**MASK, "return_tensors": "pt", "processor_kwargs": LEFT},
    "mask-right": {**MASK, "return_tensors": "pt", "processor_kwargs": RIGHT},
    "sanitised": {**DICT, "sanitize_control_tokens": True, "processor_kwargs": {"add_special_tokens": False}},
}  # fmt: skip


@pytest.mark.parametrize("template", ["v1", "llava_llama_2", "hf"])
@pytest.mark.parametrize("name", TEMPLATE_CALLS)
def test_chat_templates(name: str, template: str) -> None:
    ours, theirs = pair(chat_template=TEMPLATES[template].chat_template)
    for chats in (CHATS[0], CHATS):
        found, expected = (
            processor.apply_chat_template(copy.deepcopy(chats), **copy.deepcopy(TEMPLATE_CALLS[name]))
            for processor in (ours, theirs)
        )
        assert_same(found, expected)
        if "mask" in name:
            masks = [torch.as_tensor(mask).bool() for mask in found["assistant_masks"]]
            answers = [theirs.decode(torch.as_tensor(ids)[mask]) for ids, mask in zip(found["input_ids"], masks)]
            assert "a cat and a dog" in answers[0]
            assert "what" not in answers[0]


@pytest.mark.skipif(IS_5_20, reason="this transformers has no sanitize_control_tokens")
def test_text_that_looks_like_an_image_mark(processors: Any) -> None:
    ours, theirs = processors
    ours.pixels = "float"
    content = [{"type": "image", "path": PHOTO}, {"type": "text", "text": "what is <image> ?"}]
    chat = [{"role": "user", "content": content}]
    call = {**TEMPLATE_CALLS["sanitised"], "return_tensors": "pt"}
    found = ours.apply_chat_template(copy.deepcopy(chat), **call)
    assert_same(found, theirs.apply_chat_template(copy.deepcopy(chat), **call))
    assert (found["input_ids"] == ours.image_token_id).sum() == ours.num_image_tokens()


# Files, copies, answers


def test_names_and_descriptions() -> None:
    ours, theirs = pair(chat_template=TEMPLATES["v1"].chat_template)
    assert ours.model_input_names == theirs.model_input_names
    assert ours.to_dict() == theirs.to_dict()
    assert ours.to_json_string() == theirs.to_json_string()
    assert repr(ours) == repr(theirs)
    assert ours.get_attributes() == theirs.get_attributes()
    assert ours.image_token_ids == theirs.image_token_ids


def test_answers() -> None:
    ours, theirs = pair()
    ids = torch.tensor([[1, 5, 10, 2], [1, 7, 3, 3]])
    for call in (
        lambda p: p.batch_decode(ids, skip_special_tokens=True),
        lambda p: p.decode(ids[0]),
        lambda p: p.post_process_image_text_to_text(ids),
        lambda p: p.post_process_image_text_to_text(ids, skip_special_tokens=False),
    ):
        assert call(ours) == call(theirs)


def test_copies_and_reloaded_ones_are_the_same(tmp_path: Path) -> None:
    ours, theirs = pair(LlavaImageProcessorPil(**SIZE, do_pad=True))
    ours.save_pretrained(tmp_path)
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), copy.copy(ours)):
        assert again.pixels == "float"
        assert_same(again(images=IMAGES, text=TEXTS, **PT), theirs(images=IMAGES, text=TEXTS, **PT))
    again = LlavaProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == ours.to_dict()
    assert again.pixels == "uint8"
    stock = AutoProcessor.from_pretrained(tmp_path)
    assert type(stock) is transformers.LlavaProcessor
    assert_same(stock(images=IMAGES, text=TEXTS, **PT), ours(images=IMAGES, text=TEXTS, **PT))
