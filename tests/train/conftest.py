"""A tiny LLaVA with random weights, its tokenizer and a small data set with pictures, for the trainer's tests."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llava_fast import LlavaForConditionalGeneration, LlavaProcessor
from llava_fast.train.recipe import Recipe
from tests.tiny import TEXT, VISION

WORDS = "<unk> <s> </s> <image> USER: ASSISTANT: one two three four five six what is this".split()
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 230), "grey": (128, 128, 128)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with 400 tokens and Llama's special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
        "What colour is the picture? It is red, green, blue or grey. Say a number: one two three four five.",
    ]
    tokenizer.train_from_iterator(
        corpus * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def write_parts(folder: Path) -> None:
    """A CLIP vision tower in `folder/tower` and a Llama with its tokenizer in `folder/text`."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION)
    CLIPVisionModel(vision).save_pretrained(folder / "tower")
    tokenizer = make_tokenizer()
    text = LlamaConfig(
        **TEXT,
        vocab_size=len(tokenizer),
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(text).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")


def write_data(folder: Path, n_rows: int = 96) -> None:
    """`folder/chat.json` (pictures, text only, several turns), `folder/captions.json` and the pictures."""
    rng = random.Random(0)
    chats, captions = [], []
    for i in range(n_rows):
        name, colour = rng.choice(list(COLOURS.items()))
        width, height = rng.randint(20, 60), rng.randint(20, 60)
        Image.new("RGB", (width, height), colour).save(folder / f"{i}.png")
        turns = [("What colour is the picture?", f"It is {name}.")]
        if i % 3 == 0:
            turns.append(("Say a number.", " ".join(rng.choices("one two three four".split(), k=1 + i % 5))))
        row = {"id": str(i), "conversations": []}
        if i % 4 == 3:
            turns = turns[1:] or [("Say a number.", "five")]
        else:
            row["image"] = f"{i}.png"
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        for question, answer in turns:
            row["conversations"] += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        chats.append(row)
        caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"a {name} picture"}]
        captions.append({"id": str(i), "image": f"{i}.png", "conversations": caption})
    (folder / "chat.json").write_text(json.dumps(chats))
    (folder / "captions.json").write_text(json.dumps(captions))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """Folders `tower`, `text` and `base` (a whole LLaVA with its processor), and data files `chat`, `captions`."""
    folder = tmp_path_factory.mktemp("tiny")
    write_parts(folder)
    write_data(folder)
    processor = LlavaProcessor.assemble(folder / "tower", folder / "text")
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration.assemble(
        vision_tower=folder / "tower", language_model=folder / "text", tokenizer=processor.tokenizer
    )
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return SimpleNamespace(
        folder=folder,
        tower=folder / "tower",
        text=folder / "text",
        base=folder / "base",
        chat=folder / "chat.json",
        captions=folder / "captions.json",
    )


@pytest.fixture
def recipe_for(tiny, tmp_path):
    """A function that makes a small fp32 recipe; keyword arguments replace its keys."""

    def make(**changes) -> Recipe:
        values = {
            "stage": "full",
            "model": tiny.base,
            "data": tiny.chat,
            "output_dir": tmp_path / "out",
            "dtype": "fp32",
            "global_batch_size": 8,
            "per_device_batch_size": 8,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "workers": 0,
        }
        return Recipe(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    """A processor of whole words; an image is 28 × 28 pixels and 4 tokens."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.add_tokens(["<image>"], special_tokens=True)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(image_processor, fast, 14, "default")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with four pictures, 0.png to 3.png."""
    for i, colour in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (20 + i, 30), colour).save(tmp_path / f"{i}.png")
    return tmp_path
