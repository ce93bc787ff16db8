"""Answers as they come: the same as `generate` gives, and no thread left behind."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_fast.chat import conversation, load, stream

GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> tuple[Any, Any]:
    return load(tiny_checkpoint, device="cpu")


@pytest.fixture
def image() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB")


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "llava-fast-generate"]


def generated(model: Any, processor: Any, images: list[Any], messages: list[dict[str, Any]]) -> str:
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=images or None, text=text, return_tensors="pt")
    tokens = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_the_pieces_make_the_answer(loaded: tuple[Any, Any], image: Image.Image, n_images: int):
    images = [image, image.rotate(90)][:n_images]
    pieces = list(stream(*loaded, images, "What is it?", **GREEDY))
    assert "".join(pieces) == generated(*loaded, images, conversation(n_images, [], "What is it?"))
    assert len(pieces) > 1
    assert not workers()


def test_what_was_said_before_counts(loaded: tuple[Any, Any], image: Image.Image):
    turns = [("What is it?", "A gradient.")]
    messages = conversation(1, turns, "Which way?")
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert [part["type"] for part in messages[2]["content"]] == ["text"]
    answer = "".join(stream(*loaded, [image], "Which way?", turns=turns, **GREEDY))
    assert answer == generated(*loaded, [image], messages)
    assert answer != "".join(stream(*loaded, [image], "Which way?", **GREEDY))


def test_images_may_be_files(loaded: tuple[Any, Any], image: Image.Image, tmp_path: Path):
    image.save(tmp_path / "gradient.png")
    from_file = "".join(stream(*loaded, [tmp_path / "gradient.png"], "What?", **GREEDY))
    assert from_file == "".join(stream(*loaded, [image], "What?", **GREEDY))
    with pytest.raises(FileNotFoundError, match=r"no image file .*missing\.png"):
        next(stream(*loaded, [tmp_path / "missing.png"], "What?"))


def test_leaving_early_stops_the_work(loaded: tuple[Any, Any]):
    answer = stream(*loaded, [], "Go on.", do_sample=False, min_new_tokens=5000, max_new_tokens=5000)
    assert next(answer)
    assert len(workers()) == 1
    answer.close()  # returns long before 5000 tokens are there
    assert not workers()


def test_an_error_in_the_work_is_raised_here(loaded: tuple[Any, Any]):
    with pytest.raises(ValueError, match="no_such_argument"):
        list(stream(*loaded, [], "What?", no_such_argument=1))
    assert not workers()


def test_no_chat_template_no_question(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loaded[1], "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        next(stream(*loaded, [], "What?"))


def test_load_puts_the_model_where_it_was_asked_to(tiny_checkpoint: Path):
    model, _ = load(tiny_checkpoint, device="cpu")
    assert (model.dtype, model.device.type, model.training) == (torch.float32, "cpu", False)
    assert load(tiny_checkpoint, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match=r"no directory .*nothing"):
        load(tiny_checkpoint / "nothing")
    with pytest.raises(ValueError, match="dtype 'int8' is not a floating dtype"):
        load(tiny_checkpoint, dtype="int8")
    with pytest.raises(ValueError, match="device 'warp' is not one"):
        load(tiny_checkpoint, device="warp")
