"""Chat with a model about images; answers are streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

from llava_fast.checkpoint.layouts import dtype_of
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.hub import local_folder
from llava_fast.processor.files import SETTINGS
from llava_fast.processor.processor import LlavaProcessor


def load(
    checkpoint: str | Path, *, device: str = "auto", dtype: str = "auto"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a model for inference, and its processor, in any layout.

    Args:
        checkpoint: directory or hub id with the weights, the configuration and the processor's files.
        device: "auto", the GPU if there is one; or a name that `torch.device` accepts.
        dtype: a floating dtype by name; "auto" is the checkpoint's own on a GPU and float32 on a CPU.

    Raises:
        OSError: if there is no such model here or on the hub, or the hub cannot be reached.
        ValueError: if model and processor normalise pixels differently.
    """
    checkpoint = local_folder(checkpoint)
    try:
        where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not one that PyTorch knows") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but PyTorch sees no CUDA device")
    chosen = dtype_of(dtype) or (torch.float32 if where.type == "cpu" else "auto")
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=chosen)
    if hasattr(model.config, "mm_vision_tower") and not any((checkpoint / file).is_file() for file in SETTINGS):
        processor = LlavaProcessor.for_original(checkpoint, model.config)
    else:
        processor = LlavaProcessor.from_pretrained(checkpoint)
    processor.check(model.config)
    return model.to(where).eval(), processor


def conversation(n_images: int, turns: Sequence[tuple[str, str]], prompt: str) -> list[dict[str, Any]]:
    """The messages for a chat template: earlier (question, answer) turns, then the prompt.

    All images come before the first question, as in LLaVA's training data.
    """
    messages: list[dict[str, Any]] = []
    for question, answer in [*turns, (prompt, None)]:
        content = [{"type": "image"}] * (0 if messages else n_images)
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def stream(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[str | Path | Image.Image],
    prompt: str,
    *,
    turns: Sequence[tuple[str, str]] = (),
    **generate_arguments: Any,
) -> Iterator[str]:
    """Yield the answer to `prompt` about `images` in pieces of text, as the tokens are generated.

    Args:
        images: files or PIL images, placed before the first question; may be empty.
        turns: earlier (question, answer) pairs.
        generate_arguments: passed to `model.generate` (max_new_tokens, do_sample, temperature …).

    An error inside `generate` is raised here. Leaving the iterator early stops the generation.
    """
    if not processor.chat_template:
        raise ValueError("the processor has no chat template, so there is no telling how to put a question")
    text = processor.apply_chat_template(
        conversation(len(images), turns, prompt), add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=list(images) or None, text=text, return_tensors="pt").to(model.device)

    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    left = Event()
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

    worker = Thread(target=work, name="llava-fast-generate", daemon=True)
    worker.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        left.set()
        worker.join()
    if failure:
        raise failure[0]
