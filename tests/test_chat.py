"""Answers as they come: the same as `generate` gives, and no thread left behind; a conversation within its context."""

import logging
import os
import signal
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_fast.chat import Chat, Turn, conversation, load, prompt, stream

GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> tuple[Any, Any]:
    return load(tiny_checkpoint, device="cpu")


@pytest.fixture
def image() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB")


@pytest.fixture
def told() -> list[str]:
    """What a chat says beside its answers."""
    return []


@pytest.fixture
def chat(loaded: tuple[Any, Any], told: list[str]) -> Chat:
    return Chat(*loaded, say=told.append, **GREEDY)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "llava-fast-generate"]


def generated(model: Any, processor: Any, images: list[Any], messages: list[dict[str, Any]], **arguments: Any) -> str:
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=images or None, text=text, return_tensors="pt")
    tokens = model.generate(**inputs, **GREEDY | arguments)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).lstrip()


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_the_pieces_make_the_answer(loaded: tuple[Any, Any], image: Image.Image, n_images: int):
    turns = [Turn("What is it?", (image, image.rotate(90))[:n_images])]
    pieces = list(stream(*loaded, turns, **GREEDY))
    assert "".join(pieces) == generated(*loaded, list(turns[0].images), conversation(turns))
    assert len(pieces) > 1
    assert not workers()


def test_an_answer_does_not_begin_with_a_space(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    model, processor = loaded
    tokens = processor.tokenizer.convert_tokens_to_ids(["Ġ", " word1", " word2", "Ġ", " word3"])

    def generate(streamer: Any, **_: Any) -> None:
        for ids in ([0], *([token] for token in tokens)):  # the prompt comes first
            streamer.put(torch.tensor(ids))

    monkeypatch.setattr(model, "generate", generate)
    pieces = list(stream(*loaded, [Turn("What?")]))
    assert processor.tokenizer.decode(tokens).startswith("  ")
    assert "".join(pieces) == processor.tokenizer.decode(tokens).lstrip()
    assert len(pieces) == 4


def test_what_was_said_before_counts(loaded: tuple[Any, Any], image: Image.Image):
    turns = [Turn("What is it?", (image,), "A gradient."), Turn("Which way?")]
    messages = conversation(turns)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert [part["type"] for part in messages[2]["content"]] == ["text"]
    answer = "".join(stream(*loaded, turns, **GREEDY))
    assert answer == generated(*loaded, [image], messages)
    assert answer != "".join(stream(*loaded, [Turn("Which way?", (image,))], **GREEDY))


def test_an_image_may_come_later(chat: Chat, image: Image.Image):
    first = "".join(chat.ask("Hello?"))
    chat.images = [image]
    second = "".join(chat.ask("And this?"))
    assert chat.turns == [Turn("Hello?", (), first.strip()), Turn("And this?", (image,), second.strip())]
    assert chat.images == []
    text = prompt(chat.processor, chat.turns)
    assert text.count("<image>") == 1
    assert text.index("Hello?") < text.index("USER: <image>\nAnd this?")
    asked = [chat.turns[0], Turn("And this?", (image,))]
    assert second == generated(chat.model, chat.processor, [image], conversation(asked))


def test_images_may_be_files(loaded: tuple[Any, Any], image: Image.Image, tmp_path: Path):
    image.save(tmp_path / "gradient.png")
    from_file = "".join(stream(*loaded, [Turn("What?", (tmp_path / "gradient.png",))], **GREEDY))
    assert from_file == "".join(stream(*loaded, [Turn("What?", (image,))], **GREEDY))
    with pytest.raises(FileNotFoundError, match=r"no image file .*missing\.png"):
        next(stream(*loaded, [Turn("What?", (tmp_path / "missing.png",))]))


def test_leaving_early_stops_the_work(loaded: tuple[Any, Any]):
    answer = stream(*loaded, [Turn("Go on.")], do_sample=False, min_new_tokens=5000, max_new_tokens=5000)
    assert next(answer)
    assert len(workers()) == 1
    answer.close()  # returns long before 5000 tokens are there
    assert not workers()


def test_what_was_said_until_it_was_stopped_stays(chat: Chat, image: Image.Image):
    chat.images = [image]
    with closing(chat.ask("Go on.")) as pieces:
        said = next(pieces) + next(pieces)
    assert chat.turns == [Turn("Go on.", (image,), said.strip())]
    assert chat.images == []
    assert not workers()


def test_an_answer_stopped_before_its_first_word_leaves_nothing(
    chat: Chat, image: Image.Image, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    chat.images = [image]
    monkeypatch.setattr(chat.model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(chat.ask("Go on."))
    assert (chat.turns, chat.images) == ([], [image])


def test_a_second_ctrl_c_leaves_no_work_behind(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    heard = threading.Event()

    def generate(streamer: Any, stopping_criteria: Any, **_: Any) -> None:
        for ids in ([0], [300, 301]):
            streamer.put(torch.tensor(ids))
        assert heard.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        while not stopping_criteria(torch.zeros(1, 1), None).all():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

    monkeypatch.setattr(chat.model, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        for _ in chat.ask("Go on."):
            heard.set()
    assert not workers()
    assert [turn.question for turn in chat.turns] == ["Go on."]


def test_an_error_in_the_work_is_raised_here(loaded: tuple[Any, Any]):
    with pytest.raises(ValueError, match="no_such_argument"):
        list(stream(*loaded, [Turn("What?")], no_such_argument=1))
    assert not workers()


def test_a_turn_that_failed_is_not_remembered(chat: Chat, image: Image.Image, monkeypatch: pytest.MonkeyPatch):
    list(chat.ask("First?"))
    before, chat.images = chat.turns, [image]

    def fails(streamer: Any, **_: Any) -> None:
        streamer.put(torch.tensor([0]))
        streamer.put(torch.tensor([300, 301]))
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(chat.model, "generate", fails)
        with pytest.raises(torch.OutOfMemoryError):
            list(chat.ask("Too much?"))
    assert (chat.turns, chat.images) == (before, [image])
    list(chat.ask("Better?"))
    assert [turn.question for turn in chat.turns] == ["First?", "Better?"]


def test_a_full_context_loses_its_oldest_turns_aloud(chat: Chat, told: list[str], image: Image.Image):
    chat.turns = [Turn("first " * 4, (image,), "one"), Turn("second " * 4, (), "two"), Turn("third " * 4, (), "three")]
    asked = Turn("And?")
    whole = chat._tokens([*chat.turns, asked])
    exact = chat.processor(
        images=[image], text=prompt(chat.processor, [*chat.turns, asked]), return_tensors="pt"
    ).input_ids.shape[1]
    assert whole == exact

    chat.context = whole + GREEDY["max_new_tokens"]
    assert chat._fitting(asked) == ([*chat.turns, asked], whole)
    assert told == []

    chat.context -= 1
    turns, used = chat._fitting(asked)
    assert turns == [Turn("second " * 4, (image,), "two"), chat.turns[2], asked]  # the image stays
    assert used == chat._tokens(turns) <= chat.context - GREEDY["max_new_tokens"]
    assert told == [f"the context of {chat.context} tokens is full; the oldest part is left out: 1 turn"]
    assert len(chat.turns) == 3  # until there is an answer

    answer = "".join(chat.ask("And?"))
    assert chat.turns == [*turns[:2], Turn("And?", (), answer.strip())]


def test_images_are_left_out_last_but_never_the_new_ones(chat: Chat, told: list[str], image: Image.Image):
    chat.turns = [Turn("first " * 4, (image,) * 2, "one"), Turn("second " * 4, (image,), "two")]
    asked = Turn("And?", (image,) * 2)
    chat.context = chat._tokens([Turn("And?", (image,) * 3)]) + GREEDY["max_new_tokens"]
    assert chat._fitting(asked)[0] == [Turn("And?", (image,) * 3)]
    assert told == [f"the context of {chat.context} tokens is full; the oldest part is left out: 2 turns and 2 images"]

    chat.context = chat._tokens([asked]) + GREEDY["max_new_tokens"] - 1
    with pytest.raises(ValueError, match=r"^the question with 2 images is too long: \d+ tokens, and a context of"):
        chat._fitting(asked)
    assert len(told) == 1


def test_an_answer_ends_with_the_context(chat: Chat):
    chat.max_new_tokens = 200
    chat.generate_arguments = {"do_sample": False, "suppress_tokens": [2]}  # it does not end by itself
    chat.context = chat._tokens([Turn("Go on.")]) * 4 // 3 + 4
    room = chat.context - chat._tokens([Turn("Go on.")])
    answer = "".join(chat.ask("Go on."))
    limits = {"max_new_tokens": room, "suppress_tokens": [2]}
    assert answer == generated(chat.model, chat.processor, [], conversation([Turn("Go on.")]), **limits)


def test_the_context_is_the_smaller_limit(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    positions = loaded[0].config.text_config.max_position_embeddings
    assert Chat(*loaded, say=print).context == positions
    monkeypatch.setattr(loaded[1].tokenizer, "model_max_length", 77)
    assert Chat(*loaded, say=print).context == 77


def test_the_mark_of_an_image_is_no_text(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="a question cannot contain <image>"):
        next(chat.ask("What is <image>?"))
    monkeypatch.setattr("llava_fast.chat.stream", lambda *_, **__: (piece for piece in ["It is ", "<image> here"]))
    list(chat.ask("What?"))
    assert chat.turns == [Turn("What?", (), "It is  here")]


def test_the_length_in_a_generation_config_is_no_warning(
    loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """LLaVA's checkpoints have `max_length: 4096`."""
    monkeypatch.setattr(loaded[0].generation_config, "max_length", 4096)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    list(stream(*loaded, [Turn("What?")], **GREEDY))
    assert "max_length" in caplog.text
    caplog.clear()
    assert "".join(Chat(*loaded, say=print, **GREEDY).ask("What?"))
    assert not caplog.records


def test_a_question_is_text(chat: Chat):
    with pytest.raises(ValueError, match="a question is UTF-8 text"):
        next(chat.ask("caf\udce9?"))


def test_no_chat_template_no_chat(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loaded[1], "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        Chat(*loaded, say=print)
    monkeypatch.setattr(loaded[1], "chat_template", "{{ raise_exception('no system turn') }}")
    with pytest.raises(ValueError, match=r"^chat template: .*no system turn"):
        Chat(*loaded, say=print)


def test_load_puts_the_model_where_it_was_asked_to(tiny_checkpoint: Path):
    model, _ = load(tiny_checkpoint, device="cpu")
    assert (model.dtype, model.device.type, model.training) == (torch.float32, "cpu", False)
    assert load(tiny_checkpoint, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match=r"no directory .*nothing"):
        load(tiny_checkpoint / "nothing")
    with pytest.raises(ValueError, match="dtype 'int8' is not a floating dtype"):
        load(tiny_checkpoint, dtype="int8")
    with pytest.raises(ValueError, match="device=warp is not a device that PyTorch knows"):
        load(tiny_checkpoint, device="warp")


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cuda:77"])
def test_a_device_that_is_not_there_is_one_line(tiny_checkpoint: Path, device: str):
    with pytest.raises(ValueError, match=f"^device={device} is not on this machine, or not in its PyTorch: .+$"):
        load(tiny_checkpoint, device=device)
