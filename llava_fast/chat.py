"""Chat with a model about images: answers as they come, and a conversation that stays within the context."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import torch
from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

from llava_fast.checkpoint.layouts import dtype_of
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.errors import blaming, one_line
from llava_fast.hub import local_folder
from llava_fast.model.language import text_config
from llava_fast.model.vision import tower_config
from llava_fast.processor.files import SETTINGS
from llava_fast.processor.processor import LlavaProcessor


def load(
    checkpoint: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    vision_tower: str | None = None,
    base_model: str | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a model for inference, and its processor, in any layout. On a GPU the model is prepared for one image.

    Args:
        checkpoint: directory or hub id with the weights, the configuration and the processor's files.
        device: "auto", the GPU if there is one; or a name that `torch.device` accepts.
        dtype: a floating dtype by name; "auto" is the checkpoint's own on a GPU and float32 on a CPU.
        vision_tower, base_model: as in `from_pretrained`.

    Raises:
        OSError: if there is no such model here or on the hub, or the hub cannot be reached.
        ValueError: for a device that is not there, or if model and processor normalise pixels differently.
    """
    checkpoint = local_folder(checkpoint)
    where = _device(device)
    chosen = dtype_of(dtype) or (torch.float32 if where.type == "cpu" else "auto")
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=chosen, vision_tower=vision_tower, base_model=base_model
    )
    if hasattr(model.config, "mm_vision_tower") and not any((checkpoint / file).is_file() for file in SETTINGS):
        processor = LlavaProcessor.for_original(checkpoint, model.config)
    else:
        processor = LlavaProcessor.from_pretrained(checkpoint)
    processor.check(model.config)
    model = model.to(where).eval()
    if where.type == "cuda":
        prepare(model)
    return model, processor


@torch.no_grad()
def prepare(model: LlavaForConditionalGeneration) -> None:
    """Encode a black image, so that the first question waits for no kernel to be compiled and no graph to be captured.

    It takes two passes of the tower, and the memory of a CUDA graph of one image (see `llava_fast.model.graph`).
    """
    side = cast(int, tower_config(model.config).image_size)
    model.get_image_features(torch.zeros(1, side, side, 3, dtype=torch.uint8, device=model.device))


def _device(name: str) -> torch.device:
    """The device of that name, tested by copying a number there and back."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ValueError(f"device={name} is not a device that PyTorch knows, such as cpu, cuda or cuda:1") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a PyTorch built without it asserts
        reason = one_line(str(error).partition(". ")[0].partition("\n")[0])
        raise ValueError(f"device={name} is not on this machine, or not in its PyTorch: {reason}") from error
    return device


@dataclass(frozen=True)
class Turn:
    """A question, the images that come with it (files or PIL images), and its answer, None until there is one."""

    question: str
    images: tuple[str | Path | Image.Image, ...] = ()
    answer: str | None = None


def conversation(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as messages for a chat template. The images of a turn come before its question."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        content = [{"type": "image"}] * len(turn.images)
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages


def prompt(processor: LlavaProcessor, turns: Sequence[Turn]) -> str:
    """The text that the model is given for the turns, one `<image>` mark per image.

    Raises:
        ValueError: if the processor has no chat template, or it does not take these turns.
    """
    if not processor.chat_template:
        raise ValueError("the processor has no chat template, so it is not known how this model is asked a question")
    with blaming("chat template"):
        return processor.apply_chat_template(conversation(turns), add_generation_prompt=True, tokenize=False)


def stream(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    turns: Sequence[Turn],
    **generate_arguments: Any,
) -> Generator[str, None, None]:
    """Yield the answer to the last of the turns in pieces of text, whole words, as the tokens are generated.

    Args:
        turns: those before the last have answers.
        generate_arguments: passed to `model.generate` (max_new_tokens, do_sample, temperature …).

    White space before the answer is removed: chat templates leave it to the first token. An error inside `generate` is
    raised here. Leaving the iterator early, by `close` or Ctrl-C, stops the generation at its next token.
    """
    images = [image for turn in turns for image in turn.images]
    inputs = processor(images=images or None, text=prompt(processor, turns), return_tensors="pt").to(model.device)

    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    left, done = Event(), Event()
    failure: list[BaseException] = []

    def stop(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), left.is_set(), device=input_ids.device)

    def work() -> None:
        try:
            model.generate(
                **inputs,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop]),
                **generate_arguments,
            )
        except BaseException as error:  # re-raised in the caller's thread, below
            failure.append(error)
        finally:
            streamer.end()
            done.set()

    worker = Thread(target=work, name="llava-fast-generate", daemon=True)
    started = False
    try:
        worker.start()  # inside: Ctrl-C must stop it from its first moment on
        for piece in streamer:
            piece = piece if started else piece.lstrip()
            if piece:
                started = True
                yield piece
    finally:
        left.set()
        if worker.ident is not None:
            while not done.is_set():
                with suppress(KeyboardInterrupt):  # after a second Ctrl-C it must not go on beside the next answer, too
                    done.wait()  # not join: Python 3.11 regards a thread as stopped if its join is interrupted
            worker.join()
    if failure:
        raise failure.pop()  # an error that stays in the list keeps the tensors of its traceback


class Chat:
    """A conversation with a model, kept within its context.

    When it no longer fits, the oldest turns are left out; their images stay, in front of the oldest turn that is kept,
    as long as there is room for them. A quarter of the context, or `max_new_tokens` if that is less, is kept for the
    answer.

    Attributes:
        turns: what was asked and answered; a turn that failed is not among them.
        images: those that come with the next question.
        context: tokens, the smaller of the model's positions and the tokenizer's `model_max_length`.

    Args:
        say: is called with one line when something is left out.
        max_new_tokens: of an answer.
        generate_arguments: passed to `model.generate`.

    Raises:
        ValueError: if the processor has no chat template.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        *,
        say: Callable[[str], None],
        max_new_tokens: int = 512,
        **generate_arguments: Any,
    ) -> None:
        prompt(processor, [Turn("")])
        model.generation_config.max_length = None  # old files set it; with max_new_tokens that is a warning each turn
        self.model, self.processor, self.say = model, processor, say
        self.max_new_tokens, self.generate_arguments = max_new_tokens, generate_arguments
        self.context: int = min(text_config(model.config).max_position_embeddings, processor.tokenizer.model_max_length)
        self.turns: list[Turn] = []
        self.images: list[Image.Image] = []

    def ask(self, question: str) -> Generator[str, None, None]:
        """Yield the answer as `stream` does.

        If the iterator is left early, what was yielded stays in the conversation as the answer; if that is nothing, or
        after an error, the turn is not part of it, and `images` stay for the next question.

        Raises:
            ValueError: if the question is no text, or with its images too long for the context.
        """
        mark = self.processor.image_token
        if mark in question:
            raise ValueError(f"a question cannot contain {mark}, the mark of an image")
        try:
            question.encode()
        except UnicodeEncodeError as error:  # bytes from a pipe or an argument that are no UTF-8
            raise ValueError("a question is UTF-8 text") from error
        turns, used = self._fitting(Turn(question, tuple(self.images)))
        room = min(self.max_new_tokens, self.context - used)
        said = ""
        try:
            with closing(
                stream(self.model, self.processor, turns, max_new_tokens=room, **self.generate_arguments)
            ) as pieces:
                for piece in pieces:
                    said += piece
                    yield piece
        except (KeyboardInterrupt, GeneratorExit):
            if said:
                self._remember(turns, said)
            raise
        self._remember(turns, said)

    def reset(self) -> None:
        """Forget all turns and images."""
        self.turns, self.images = [], []

    def _remember(self, turns: list[Turn], said: str) -> None:
        answer = said.replace(self.processor.image_token, "").strip()
        self.turns, self.images = [*turns[:-1], replace(turns[-1], answer=answer)], []

    def _fitting(self, asked: Turn) -> tuple[list[Turn], int]:
        """The turns to give to the model, `asked` last, and how many tokens they are."""
        most = self.context - min(self.max_new_tokens, self.context // 4)
        turns = [*self.turns, asked]
        while (used := self._tokens(turns)) > most:
            first = turns[0]
            if len(turns) > 1:
                turns = [replace(turns[1], images=first.images + turns[1].images), *turns[2:]]
            elif len(first.images) > len(asked.images):
                turns = [replace(first, images=first.images[1:])]
            else:
                what = f"with {_count(len(asked.images), 'image')} " if asked.images else ""
                raise ValueError(
                    f"the question {what}is too long: {used} tokens, and a context of {self.context} leaves {most}"
                )
        dropped = len(self.turns) + 1 - len(turns)
        if dropped:
            images = sum(len(turn.images) for turn in (*self.turns, asked)) - sum(len(turn.images) for turn in turns)
            what = _count(dropped, "turn") + (f" and {_count(images, 'image')}" if images else "")
            self.say(f"the context of {self.context} tokens is full; the oldest part is left out: {what}")
        return turns, used

    def _tokens(self, turns: list[Turn]) -> int:
        """Tokens of the prompt, without reading its images."""
        marked = self.processor.tokenizer(prompt(self.processor, turns), verbose=False)["input_ids"]
        return len(marked) + sum(len(turn.images) for turn in turns) * (self.processor.num_image_tokens() - 1)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
