"""The processor: pixels and batches against transformers' own, files both ways, and every error it can give."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaTokenizer,
    LlavaImageProcessorPil,
    PreTrainedTokenizerFast,
)

from llava_fast.processor.processor import LlavaProcessor
from llava_fast.processor.templates import TEMPLATES
from tests.processor.made import (
    PHOTOS,
    SKIMAGE,
    assert_within_one,
    clip,
    hf_pixels,
    make,
    named,
    package_folder,
    word_tokenizer,
)

ODD_FILES = [SKIMAGE / name for name in ("logo.png", "camera.png", "no_time_for_that_tiny.gif", "multipage.tif")]


@pytest.fixture(scope="module", params=[False, True], ids=["", "legacy"])
def llama_tokenizer(request) -> LlamaTokenizer:
    """A real SentencePiece vocabulary of 32,000 with the two tokens that llava-hf adds."""
    model = package_folder("mistral_common") / "data" / "tokenizer.model.v1"
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = {vocabulary.id_to_piece(i): i for i in range(vocabulary.vocab_size())}
    merges = [
        (-vocabulary.get_score(i), at, (piece[:at], piece[at:]))
        for piece, i in ids.items()
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    tokenizer = LlamaTokenizer(
        ids, [pair for *_, pair in sorted(merges)], add_bos_token=True, legacy=request.param, padding_side="left"
    )
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    return tokenizer


# Pixels


@pytest.mark.parametrize("size", [336, 224, 57, 30])
@pytest.mark.parametrize("photo", PHOTOS + ODD_FILES, ids=lambda path: path.name)
def test_crop_equals_transformers(photo, size):
    processor = make(clip(size))
    image = Image.open(photo)
    assert_within_one(processor.image_pixels(photo), hf_pixels(clip(size), image))


def independent_square(image: Image.Image) -> Image.Image:
    """Padding as LLaVA describes it, in NumPy."""
    array = np.asarray(image.convert("RGB"))
    height, width = array.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = (122, 116, 104)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = array
    return Image.fromarray(square)


@pytest.mark.parametrize("size", [336, 57])
@pytest.mark.parametrize("photo", PHOTOS + ODD_FILES, ids=lambda path: path.name)
def test_pad_equals_an_independent_square(photo, size):
    image = Image.open(photo)
    processor = make(clip(size), pad_to_square=True)
    ours = processor.image_pixels(image)
    assert_within_one(ours, hf_pixels(clip(size), independent_square(image)))
    theirs = LlavaImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_pad=True
    )
    assert_within_one(ours, hf_pixels(theirs, image))


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", [336, 57])
def test_float_pixels_equal_transformers(size, pad):
    processor = make(clip(size), pad_to_square=pad)
    images = [Image.open(photo) for photo in PHOTOS[:3]]
    ours = processor(images=images, pixels="float", return_tensors="pt")["pixel_values"]
    theirs = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_uint8_pixels_normalise_to_the_float_ones():
    processor = make(clip(336))
    batch = processor(images=[str(PHOTOS[0])], return_tensors="pt")
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].shape == (1, 336, 336, 3)
    mean, std = (torch.tensor(x) for x in (processor.image_processor.image_mean, processor.image_processor.image_std))
    values = ((batch["pixel_values"] / 255 - mean) / std).permute(0, 3, 1, 2)
    theirs = clip(336)(Image.open(PHOTOS[0]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values, theirs, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.integers(1, 64), pad=st.booleans())
def test_any_size_equals_transformers(width, height, size, pad):
    image = Image.fromarray(np.random.default_rng(width * 201 + height).integers(0, 256, (height, width, 3), np.uint8))
    processor = make(clip(size), pad_to_square=pad, patch_size=1)
    assert processor.image_size == (size, size)
    reference = independent_square(image) if pad else image
    assert_within_one(processor.image_pixels(image), hf_pixels(clip(size), reference))


def test_crop_larger_than_the_resized_image_is_black_around_it():
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 33, "width": 28})
    processor = make(theirs)
    image = Image.open(PHOTOS[1])
    assert processor.image_size == (33, 28)
    assert_within_one(processor.image_pixels(image), hf_pixels(theirs, image))
    assert processor.image_pixels(image)[0].max() == 0


def test_fixed_size_without_crop():
    theirs = CLIPImageProcessorPil(size={"height": 28, "width": 42}, do_center_crop=False)
    processor = make(theirs)
    assert processor.image_size == (28, 42)
    assert processor.num_image_tokens() == 6
    assert_within_one(processor.image_pixels(PHOTOS[1]), hf_pixels(theirs, Image.open(PHOTOS[1])))


# Tokens


@pytest.mark.parametrize(
    ("strategy", "additional", "tokens"), [("default", 1, 576), ("full", 1, 577), ("full", 0, 576), ("default", 2, 577)]
)
def test_number_of_image_tokens(strategy, additional, tokens):
    processor = make(clip(336), vision_feature_select_strategy=strategy, num_additional_image_tokens=additional)
    assert processor.num_image_tokens() == processor.num_image_tokens(336, 336) == tokens
    ids = processor(images=str(PHOTOS[0]), text="<image>")["input_ids"][0]
    assert ids.count(processor.image_token_id) == tokens
    assert processor.num_image_tokens(28, 56) == tokens - 576 + 8


def test_the_575_token_trap_cannot_be_built():
    theirs = transformers.LlavaProcessor(clip(336), word_tokenizer(), 14, "default")
    assert theirs.num_additional_image_tokens == 0
    assert LlavaProcessor(clip(336), word_tokenizer(), 14, "default").num_image_tokens() == 576
    with pytest.raises(ValueError, match="575 for 576") as error:
        make(num_additional_image_tokens=0)
    named(error, "num_additional_image_tokens")


def test_the_575_token_trap_in_a_file(tmp_path):
    transformers.LlavaProcessor(clip(336), word_tokenizer(), 14, "default").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one token short"):
        LlavaProcessor.from_pretrained(tmp_path)
    fixed = LlavaProcessor.from_pretrained(tmp_path, num_additional_image_tokens=1)
    assert fixed.num_image_tokens() == 576


def test_settings_that_cannot_work_are_errors():
    with pytest.raises(ValueError, match="patch_size is not set"):
        make(patch_size=None)
    with pytest.raises(ValueError, match="'default' or 'full', not None"):
        make(vision_feature_select_strategy=None)
    with pytest.raises(ValueError, match="does not give images of one size"):
        make(CLIPImageProcessorPil(size={"shortest_edge": 28}, do_center_crop=False))
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")), unk_token="<unk>"
    )
    with pytest.raises(ValueError, match="the tokenizer has no token '<image>'"):
        make(tokenizer=bare)


def test_missing_pad_token_becomes_unk_as_in_the_original():
    processor = make(tokenizer=word_tokenizer(pad_token=None))
    assert processor.tokenizer.pad_token_id == 0


# Batches against transformers


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("padding", [True, "longest", "max_length", False])
def test_batches_equal_transformers(llama_tokenizer, strategy, padding):
    options = {"patch_size": 14, "vision_feature_select_strategy": strategy, "num_additional_image_tokens": 1}
    ours, theirs = (
        kind(clip(56), llama_tokenizer, **options) for kind in (LlavaProcessor, transformers.LlavaProcessor)
    )
    images = [Image.open(path) for path in PHOTOS[:4]]
    texts = [
        "USER: <image>\nWhat is this? ASSISTANT:",
        "USER: no picture, 你好 ASSISTANT: ok</s>USER: and now? ASSISTANT:",
        "USER: <image>\n<image>\nWhich of them? ASSISTANT:",
        "<image>",
    ]
    tensors = None if padding is False else "pt"
    length = {"max_length": 120} if padding == "max_length" else {}
    mine = ours(images=images, text=texts, padding=padding, return_tensors=tensors, pixels="float", **length)
    stock = theirs(images=images, text=texts, padding=padding, return_tensors=tensors, **length)
    assert set(mine) == set(stock) == {"input_ids", "attention_mask", "pixel_values"}
    for key in ("input_ids", "attention_mask"):
        rows = [mine[key], stock[key]] if padding is False else [mine[key].tolist(), stock[key].tolist()]
        assert rows[0] == rows[1]
    torch.testing.assert_close(
        torch.stack(list(map(torch.as_tensor, mine["pixel_values"]))),
        torch.stack(list(map(torch.as_tensor, stock["pixel_values"]))),
        rtol=0,
        atol=1e-6,
    )
    per_row = ours(images=[images[:1], None, images[1:3], images[3:]], text=texts)
    assert per_row["input_ids"] == ours(images=images, text=texts)["input_ids"]


def test_text_alone_equals_transformers(llama_tokenizer):
    ours = make(tokenizer=llama_tokenizer)(text="just text", return_tensors="pt")
    theirs = llama_tokenizer("just text", return_tensors="pt")
    assert set(ours) == {"input_ids", "attention_mask"}
    assert torch.equal(ours["input_ids"], theirs["input_ids"].reshape(1, -1))


def test_tensors_of_several_rows_are_padded():
    processor = make(tokenizer=word_tokenizer(padding_side="left"))
    texts = ["what is this ?", "what ?"]
    batch = processor(text=texts, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert batch["input_ids"][1, :2].tolist() == [processor.tokenizer.pad_token_id] * 2
    processor.tokenizer.padding_side = "right"
    right = processor(text=texts, return_tensors="pt")
    assert right["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert processor(text=texts)["input_ids"][1] == [1, 7, 10]


def test_a_single_row_is_not_padded():
    assert make()(text="what", return_tensors="np")["input_ids"].tolist() == [[1, 7]]


# Marks and images


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (["<image> a", "<image> <image>"], 2, "row 1 needs 2 images for its <image> marks, but only 1 of 2 are left"),
        (["a", "<image>"], 2, r"2 images are given, but the rows \(0 to 1\) have only 1 <image> marks"),
        ("<image> what", 0, "row 0 needs 1 images for its <image> marks, but only 0 of 0"),
        ("what", 1, "1 images are given"),
        (["<image>", "<image> <image>"], [1, 1], "row 1 has 2 <image> marks but 1 images"),
        (["<image>", "a"], [1, 1], "row 1 has 0 <image> marks but 1 images"),
        (["<image>", "a"], [1], "images are given for 1 rows, but there are 2 rows of text"),
    ],
)
def test_marks_must_match_images(texts, images, message):
    photo = Image.open(PHOTOS[1])
    given_ = [[photo] * n for n in images] if isinstance(images, list) else [photo] * images or None
    with pytest.raises(ValueError, match=message) as error:
        make()(images=given_, text=texts)
    named(error)


def test_truncation_cannot_cut_an_image():
    processor = make(clip(56))  # 16 tokens per image
    text = ["what is this ?", "what is <image>"]
    with pytest.raises(ValueError, match="row 1 has 7 image tokens where its 1 images need 16: raise max_length"):
        processor(images=[str(PHOTOS[0])], text=text, truncation=True, max_length=10)
    whole = processor(images=[str(PHOTOS[0])], text=["<image> what is this"], truncation=True, max_length=18)
    assert len(whole["input_ids"][0]) == 18


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="nothing to process"):
        make()()
    with pytest.raises(TypeError, match="no videos or audio"):
        make()(text="what", videos=["v.mp4"])
    with pytest.raises(ValueError, match="'uint8' or 'float', not 'f16'"):
        make()(images=str(PHOTOS[0]), pixels="f16")
    with pytest.raises(ValueError, match="does not give images of one size"):
        make()(images=str(PHOTOS[0]), do_center_crop=False)
    with pytest.raises(ValueError, match="CLIPImageProcessorPil with pad_size: images are only padded to a square"):
        make()(images=str(PHOTOS[0]), do_pad=True, pad_size={"height": 40, "width": 40})


# Chat templates


def test_chat_template_with_images(tmp_path):
    shutil.copy(PHOTOS[1], tmp_path / "cat.png")
    processor = make(chat_template=TEMPLATES["v1"].chat_template)
    photo = Image.open(PHOTOS[1])
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": photo},
                {"type": "image", "path": str(tmp_path / "cat.png")},
                {"type": "text", "text": "what is this ?"},
            ],
        }
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt.endswith("USER: <image>\n<image>\nwhat is this ? ASSISTANT:")
    batch = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(
        batch["input_ids"], processor(images=[photo, photo], text=prompt, return_tensors="pt")["input_ids"]
    )
    assert batch["pixel_values"].shape == (2, 28, 28, 3)
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])

    text_only = [{"role": "user", "content": [{"type": "text", "text": "what ?"}]}]
    both = processor.apply_chat_template(
        [chat, text_only], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert both["attention_mask"].sum(1).tolist() == [
        batch["input_ids"].shape[1],
        len(processor(text=processor.apply_chat_template(text_only, add_generation_prompt=True))["input_ids"][0]),
    ]
    assert both["attention_mask"][1, -1] == 0


def test_assistant_mask_marks_the_answers(llama_tokenizer):
    processor = make(tokenizer=llama_tokenizer, chat_template=TEMPLATES["v1"].chat_template)
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.open(PHOTOS[1])}, {"type": "text", "text": "hi"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    batch = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    ids = batch["input_ids"][0]
    answers = ids[torch.as_tensor(batch["assistant_masks"][0]).bool()].tolist()
    assert llama_tokenizer.convert_ids_to_tokens(answers) == ["▁A", "▁cat", "</s>", "▁yes", "</s>"]


def test_a_mark_in_fenced_user_text_is_text():
    processor = make()
    fenced = "what \U000f0000<image>\U000f0001 <image>"
    assert processor._mark().sub("X", fenced) == "what \U000f0000<image>\U000f0001 X"


def test_token_types_on_request():
    batch = make()(images=str(PHOTOS[0]), text="what <image>", return_mm_token_type_ids=True)
    assert batch["mm_token_type_ids"] == [[0, 0, 1, 1, 1, 1]]


# Files


@pytest.mark.parametrize("pad", [False, True])
def test_stock_transformers_loads_ours(tmp_path, llama_tokenizer, pad):
    ours = LlavaProcessor(clip(56), llama_tokenizer, 14, "default", TEMPLATES["v1"].chat_template, pad_to_square=pad)
    ours.save_pretrained(tmp_path)
    texts, images = ["USER: <image>\nWhat? ASSISTANT:", "USER: hello ASSISTANT:"], [Image.open(PHOTOS[2])]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]
    mine = ours(images=images, text=texts, return_tensors="pt", pixels="float")
    for loader in (transformers.LlavaProcessor, AutoProcessor, LlavaProcessor):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, transformers.LlavaProcessor)
        options = {"pixels": "float"} if loader is LlavaProcessor else {}
        stock = loaded(images=images, text=texts, return_tensors="pt", padding=True, **options)
        assert set(stock) == set(mine)
        assert torch.equal(stock["input_ids"], mine["input_ids"])
        assert torch.equal(stock["attention_mask"], mine["attention_mask"])
        torch.testing.assert_close(stock["pixel_values"], mine["pixel_values"], rtol=0, atol=1e-6)
        assert loaded.apply_chat_template(chat) == ours.apply_chat_template(chat)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert "pad_to_square" not in saved
    assert saved["num_additional_image_tokens"] == 1
    assert LlavaProcessor.from_pretrained(tmp_path).pad_to_square is pad


def test_ours_loads_stock_transformers(tmp_path, llama_tokenizer):
    stock = transformers.LlavaProcessor(
        clip(56), llama_tokenizer, 14, "full", chat_template="{{ messages[0].content }}", num_additional_image_tokens=1
    )
    stock.save_pretrained(tmp_path)
    stock = transformers.LlavaProcessor.from_pretrained(tmp_path)
    ours = LlavaProcessor.from_pretrained(tmp_path)
    assert type(ours) is LlavaProcessor
    assert (ours.patch_size, ours.vision_feature_select_strategy, ours.num_image_tokens()) == (14, "full", 17)
    text, image = "<image>\nWhat?", Image.open(PHOTOS[2])
    mine, theirs = ours(images=image, text=text, pixels="float"), stock(images=image, text=text)
    assert mine["input_ids"] == theirs["input_ids"]
    assert ours.chat_template == stock.chat_template
    ours.save_pretrained(tmp_path / "again")
    assert transformers.LlavaProcessor.from_pretrained(tmp_path / "again").to_dict() == stock.to_dict()


def test_classic_files_of_llava_hf(tmp_path, llama_tokenizer):
    """The layout on llava-hf's pages: image settings in a preprocessor_config.json of their own."""
    llama_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(
        json.dumps(
            {
                "image_token": "<image>",
                "num_additional_image_tokens": 1,
                "patch_size": 14,
                "processor_class": "LlavaProcessor",
                "vision_feature_select_strategy": "default",
            }
        )
    )
    preprocessor = clip(336).to_dict() | {"processor_class": "LlavaProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    processor = LlavaProcessor.from_pretrained(tmp_path)
    assert processor.num_image_tokens() == 576
    assert processor.image_size == (336, 336)
    assert not processor.pad_to_square


def test_pad_to_square_can_be_switched():
    processor = make(clip(56, image_mean=[0.5, 0.5, 0.5]))
    assert not processor.pad_to_square
    processor.pad_to_square = True
    assert isinstance(processor.image_processor, LlavaImageProcessorPil)
    assert processor.image_pixels(Image.new("RGB", (10, 2), "red"))[0, 0].tolist() == [127, 127, 127]
    processor.pad_to_square = False
    assert processor.image_pixels(Image.new("RGB", (10, 2), "red"))[0, 0].tolist() == [255, 0, 0]
    assert processor.image_size == (56, 56)


@pytest.mark.parametrize("nested", [False, True])
def test_assemble(tmp_path, nested):
    vision = CLIPVisionConfig(image_size=42, patch_size=14, hidden_size=8, num_attention_heads=1)
    config = transformers.CLIPConfig(vision_config=vision.to_dict()) if nested else vision
    config.save_pretrained(tmp_path / "tower")
    plain_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="</s>",
    )
    plain_tokenizer.save_pretrained(tmp_path / "text")
    processor = LlavaProcessor.assemble(tmp_path / "tower", tmp_path / "text", pad_to_square=True)
    assert plain_tokenizer.padding_side == "right"
    processor.save_pretrained(tmp_path / "made")
    for made in (processor, LlavaProcessor.from_pretrained(tmp_path / "made")):
        assert made.tokenizer.padding_side == "left"
    assert processor.image_size == (42, 42)
    assert processor.num_image_tokens() == 9
    assert processor.image_token_id == 3
    assert processor.pad_to_square
    assert processor.chat_template == TEMPLATES["v1"].chat_template


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("pad", [False, True])
def test_images_resized_on_a_device_are_the_same(pad, device):
    processor = make(pad_to_square=pad)
    images = [Image.effect_noise(size, 80).convert("RGB") for size in ((40, 57), (90, 31), (28, 28), (9, 300))]
    found = processor(images, device=device, return_tensors="pt")["pixel_values"]
    assert found.device.type == device
    assert torch.equal(found.cpu(), processor(images, return_tensors="pt")["pixel_values"])


def test_what_is_not_done_on_a_device():
    stretched = make(CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False))
    with pytest.raises(ValueError, match="only a bicubic resize of the shortest edge to 28x28 can be done on a device"):
        stretched([Image.new("RGB", (40, 30))], device="cpu")
