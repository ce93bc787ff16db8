"""transformers' Auto classes and pipelines, before and after `llava_fast.register()`: the same answers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoProcessor,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, PROCESSOR_MAPPING_NAMES

import llava_fast
import llava_fast.auto  # importing it must change nothing
from tests.hub import serving

MODELS = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForPreTraining)


@contextmanager
def registered() -> Iterator[None]:
    """`llava_fast.register()`, undone at the end."""
    tables = [auto._model_mapping._extra_content for auto in (*MODELS, AutoModel)]
    tables += [PROCESSOR_MAPPING._extra_content, PROCESSOR_MAPPING_NAMES]
    before = [table.copy() for table in tables]
    llava_fast.register()
    try:
        yield
    finally:
        for table, entries in zip(tables, before):
            table.clear()
            table.update(entries)


def both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """The result of a call by transformers' own classes, and by ours."""
    theirs = call()
    with registered():
        return theirs, call()


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LLaVA that pads on the left, as llava-hf's do: transformers answers padded prompts wrongly otherwise."""
    folder = tmp_path_factory.mktemp("left")
    processor = llava_fast.LlavaProcessor.from_pretrained(tiny_checkpoint)
    processor.tokenizer.padding_side = processor.tokenizer.init_kwargs["padding_side"] = "left"
    processor.save_pretrained(folder)
    for file in tiny_checkpoint.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    return str(folder)


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8))


def chat(image_seed: int | None, question: str) -> list[dict[str, Any]]:
    images = [] if image_seed is None else [{"type": "image", "image": image(image_seed)}]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("auto", MODELS, ids=lambda auto: auto.__name__)
def test_models_and_logits(tiny: SimpleNamespace, checkpoint: str, auto: Any) -> None:
    theirs, ours = both(lambda: auto.from_pretrained(checkpoint, dtype=torch.float32))
    assert type(theirs) is transformers.LlavaForConditionalGeneration
    assert type(ours) is llava_fast.LlavaForConditionalGeneration
    assert ours.name_or_path == theirs.name_or_path == checkpoint
    processors = both(lambda: AutoProcessor.from_pretrained(checkpoint))
    assert [type(processor) for processor in processors] == [transformers.LlavaProcessor, llava_fast.LlavaProcessor]
    logits = []
    for model, processor in zip((theirs, ours), processors):
        text = ["USER: <image>\nWhat word1? ASSISTANT:", "USER: <image>\nAnd a longer word2? ASSISTANT:"]
        inputs = processor(images=[image(1), image(2)], text=text, return_tensors="pt", padding=True)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            logits.append(model(**inputs).logits[real])
    tiny.assert_near(logits[1], logits[0])


def test_the_model_without_its_head(tiny: SimpleNamespace, checkpoint: str, tmp_path: Path) -> None:
    theirs, ours = both(lambda: AutoModel.from_pretrained(checkpoint, dtype=torch.float32))
    assert type(theirs) is transformers.LlavaModel
    assert type(ours) is llava_fast.LlavaModel
    ours.save_pretrained(tmp_path)
    again = [kind.from_pretrained(tmp_path) for kind in (llava_fast.LlavaModel, transformers.LlavaModel)]
    inputs = llava_fast.LlavaProcessor.from_pretrained(checkpoint)(
        images=image(1), text="USER: <image>\nWhat word1? ASSISTANT:", return_tensors="pt", pixels="float"
    )
    expected = theirs(**inputs).last_hidden_state
    for model in (ours, *again):
        tiny.assert_near(model(**inputs).last_hidden_state, expected)


def test_an_adapter_and_its_base(tiny: SimpleNamespace, checkpoint: str, tmp_path: Path) -> None:
    base = llava_fast.LlavaForConditionalGeneration.from_pretrained(checkpoint)
    settings = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(tmp_path)
    theirs, ours = both(lambda: AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32))
    assert type(ours) is llava_fast.LlavaForConditionalGeneration
    ids = torch.arange(5, 15)[None]
    adapted = theirs(input_ids=ids).logits
    tiny.assert_near(ours(input_ids=ids).logits, adapted)
    theirs.disable_adapters()
    assert (theirs(input_ids=ids).logits - adapted).abs().max() > 0.1 * adapted.abs().max()


def test_registering_twice_and_from_a_config(checkpoint: str) -> None:
    with registered():
        llava_fast.register()
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        assert type(config) is transformers.LlavaConfig
        assert type(AutoModelForImageTextToText.from_config(config)) is llava_fast.LlavaForConditionalGeneration
        assert type(AutoProcessor.from_pretrained(checkpoint)) is llava_fast.LlavaProcessor
    assert type(AutoModelForImageTextToText.from_config(config)) is transformers.LlavaForConditionalGeneration


TEXT = "USER: <image>\nWhat word1? ASSISTANT:"
QUESTIONS: dict[str, dict[str, Any]] = {
    "chat": {"text": chat(1, "What word1?"), "return_full_text": False},
    "chat-text-alone": {"text": chat(None, "What word1?")},
    "chats": {"text": [chat(1, "What word1?"), chat(2, "And a longer word2?")]},
    "chats-in-a-batch": {
        "text": [chat(1, "What word1?"), chat(2, "And a longer word2?"), chat(3, "word3")],
        "batch_size": 3,
    },
    "prefill": {"text": [*chat(1, "What?"), {"role": "assistant", "content": [{"type": "text", "text": "It word3"}]}]},
    "image-and-text": {"images": image(1), "text": TEXT},
    "images-and-texts": {"images": [image(1), image(2)], "text": [TEXT, TEXT.replace("word1", "word2 is that")]},
    "two-images": {"images": [[image(1), image(2)]], "text": [TEXT.replace("<image>", "<image><image>")]},
    "tokens": {"images": image(1), "text": TEXT, "return_tensors": True},
    "stop": {"images": image(1), "text": TEXT, "generate_kwargs": {"min_new_tokens": 3, "max_new_tokens": 5}},
}


def answers(found: Any) -> Any:
    """What was generated; without the inputs, which are in the results, too."""
    if isinstance(found, list):
        return [answers(one) for one in found]
    if "generated_token_ids" in found:
        return found["generated_token_ids"].tolist()
    generated = found["generated_text"]
    return generated[-1] if isinstance(generated, list) and isinstance(generated[-1], dict) else generated


def test_pipelines(tiny: SimpleNamespace, checkpoint: str) -> None:
    def ask() -> dict[str, Any]:
        pipe = transformers.pipeline("image-text-to-text", model=checkpoint, device="cpu")
        assert type(pipe.model).__module__.startswith("llava_fast") == type(pipe.processor).__module__.startswith(
            "llava_fast"
        )
        named = {"model": type(pipe.model).__module__.split(".")[0]}
        for name, question in QUESTIONS.items():
            length = {} if "generate_kwargs" in question else {"max_new_tokens": 6}
            named[name] = answers(pipe(**question, **length))
        return named

    theirs, ours = both(ask)
    assert (theirs.pop("model"), ours.pop("model")) == ("transformers", "llava_fast")
    assert ours == theirs
    assert len({str(answer) for answer in ours.values()}) > len(QUESTIONS) // 2  # answers that tell cases apart


def test_other_models_are_as_before() -> None:
    with registered():
        for config in (transformers.VipLlavaConfig, transformers.LlavaNextConfig):
            assert PROCESSOR_MAPPING[config].__module__.startswith("transformers.")
            assert AutoModelForImageTextToText._model_mapping[config].__module__.startswith("transformers.")


def test_by_hub_id(tiny: SimpleNamespace, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub/org").mkdir(parents=True)
    (tmp_path / "hub/org/model").symlink_to(checkpoint)
    with serving(tmp_path / "hub") as hub, registered():
        hub.use(monkeypatch, tmp_path / "cache")
        model = AutoModelForImageTextToText.from_pretrained("org/model", revision="v1")
        processor = AutoProcessor.from_pretrained("org/model")
        pipe = transformers.pipeline("image-text-to-text", model="org/model", device="cpu")
        assert hub.downloads().count("model.safetensors") == 1
    assert [type(one) for one in (model, processor, pipe.model, pipe.processor)] == [
        llava_fast.LlavaForConditionalGeneration,
        llava_fast.LlavaProcessor,
    ] * 2
    assert model.name_or_path == "org/model"
