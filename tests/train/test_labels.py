"""Label masks against a second derivation, from the byte offsets of SentencePiece itself.

Nothing of the package's templates or label code is used for it: prompts are written out here from LLaVA's
description, and every piece's place comes from `sentencepiece`, not from transformers' tokenizer.
"""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from llava_fast.processor.processor import LlavaProcessor
from llava_fast.train.data import LlavaDataset

VOCABULARY = (
    Path(importlib.util.find_spec("mistral_common").submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
)
IMAGE_TOKEN, IMAGE_TOKENS = 32000, 4
BOS, EOS = 1, 2

WORDS = (
    "the a cat dog and is on under what which why colour red blue photograph street 3 14 2,048 don't it's naïve "
    "café Straße Ωμέγα мир данные 你好 世界 画像 🙂 👩‍👩‍👧 ½ ₤ `code` **bold** f(x)= {} <b> USER ASSISTANT [INST]"
).split()
GAPS = [" "] * 12 + ["  ", "\n", "\n\n", "\t", ", ", ". ", "? "]


def make_text(rng: random.Random, longest: int) -> str:
    text = "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(rng.randint(1, longest)))
    start = rng.choice(["", "", "", "", " ", "\n", "\n\n", "  "])
    return start + (text if rng.random() < 0.3 else text.rstrip())


def make_conversations(n_rows: int, seed: int) -> list[dict]:
    """Rows with 0 to 3 images, 1 to 4 rounds, odd spaces, template words inside of turns, and empty answers."""
    rng = random.Random(seed)
    rows = []
    for i in range(n_rows):
        turns = []
        for _ in range(rng.randint(1, 4)):
            answer = rng.choice(["", ".", " ", "好", "\n"]) if rng.random() < 0.2 else make_text(rng, 12)
            turns += [make_text(rng, 8), answer]
        if not any(turns[1::2]):
            turns[-1] = "yes"
        if i % 20 == 7:
            turns[0] += " ASSISTANT: what? "
        n_images = rng.choice([0, 1, 1, 1, 2, 3])
        for _ in range(n_images):
            at = 2 * rng.randrange(len(turns) // 2)
            turns[at] = rng.choice(["<image>\n{}", "{}\n<image>", "<image>{}", " {} <image> "]).format(turns[at])
        conversation = [{"from": ["human", "gpt"][j % 2], "value": turn} for j, turn in enumerate(turns)]
        if i % 11 == 0:
            conversation.insert(0, {"from": "gpt", "value": "left over"})
        rows.append({"id": i, "conversations": conversation} | ({"image": ["x.png"] * n_images} if n_images else {}))
    return rows


# The second derivation. A prompt is a list of (text, answer?) written out once more.


def write_v1(turns: list[str]) -> list[tuple[str, bool]]:
    parts = [
        (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. ",
            False,
        )
    ]
    for question, answer in zip(turns[::2], turns[1::2]):
        parts.append((f"USER: {question} ASSISTANT:", False))
        if answer:
            parts.append((f" {answer}</s>", True))
    return parts


def write_llama_2(turns: list[str]) -> list[tuple[str, bool]]:
    system = (
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural language."
        "\n<</SYS>>\n\n"
    )
    parts = []
    for i, (question, answer) in enumerate(zip(turns[::2], turns[1::2])):
        parts.append((f"{'<s>[INST] ' if i else system}{question} [/INST]", False))
        if answer:
            parts.append((f" {answer} </s>", True))
    return parts


def write_plain(turns: list[str]) -> list[tuple[str, bool]]:
    return [("<image>", False), (turns[1] + "\n", True)]


class Reference:
    """Ids and labels of a row by SentencePiece's byte offsets."""

    def __init__(self, legacy: bool) -> None:
        self.legacy = legacy
        model = VOCABULARY.read_bytes()
        self.with_space = sentencepiece.SentencePieceProcessor(model_proto=model)
        # Protocol buffers merge: four more bytes set normalizer_spec.add_dummy_prefix = false.
        self.without_space = sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        assert self.without_space.encode("a b", out_type=str) == ["a", "▁b"]

    def __call__(self, turns: list[str], write, has_images: bool) -> tuple[list[int], list[int]]:
        if has_images and write is not write_plain:
            for i, turn in enumerate(turns):
                count = len(turn.split("<image>")) - 1
                if count:
                    rest = re.sub("<image>", "", turn).strip()
                    turns[i] = "\n".join(["<image>"] * count + ([rest] if rest else []))
        parts = write(turns)
        prompt = "".join(text for text, _ in parts).encode()
        answers, at = [], 0
        for text, is_answer in parts:
            if is_answer:
                answers.append((at, at + len(text.encode())))
            at += len(text.encode())

        def supervised(start: int, end: int) -> bool:
            return any(start < last and first < end for first, last in answers)

        ids, labels = [BOS], [-100]
        at = 0
        first_of_chunk = True
        for segment in re.split(rb"(<image>|</s>|<s>)", prompt):
            if segment == b"<image>":
                ids += [IMAGE_TOKEN] * IMAGE_TOKENS
                labels += [-100] * IMAGE_TOKENS
                first_of_chunk = True
            elif segment in (b"</s>", b"<s>"):
                ids.append(EOS if segment == b"</s>" else BOS)
                labels.append(ids[-1] if supervised(at, at + len(segment)) else -100)
                first_of_chunk = False
            elif segment:
                # Without `legacy` only a chunk's start gets a space, and none where it has one.
                spaced = self.legacy or (first_of_chunk and not segment.startswith(b" "))
                encoder = self.with_space if spaced else self.without_space
                for piece in encoder.encode(segment.decode(), return_type="proto").pieces:
                    # The prefix space alone has no bytes of its own: it belongs to the byte after it.
                    end = max(piece.end, piece.begin + 1)
                    ids.append(piece.id)
                    labels.append(piece.id if supervised(at + piece.begin, at + end) else -100)
                first_of_chunk = False
            at += len(segment)
        return ids, labels


def make_tokenizer(legacy: bool) -> PreTrainedTokenizerFast:
    """The vocabulary as a fast tokenizer, in the form of the tokenizer.json files of Llama-2 and llava-hf.

    Not `LlamaTokenizer.from_pretrained`, which orders merges by id where SentencePiece goes by score, and so splits
    runs of spaces otherwise.
    """
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=VOCABULARY.read_bytes())
    ids = {vocabulary.id_to_piece(i): i for i in range(vocabulary.vocab_size())}
    merges = [
        (-vocabulary.get_score(i), at, (piece[:at], piece[at:]))
        for piece, i in ids.items()
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    merges.sort(key=lambda merge: merge[:2])
    tokenizer = Tokenizer(
        models.BPE(ids, [pair for *_, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_processor(folder: Path, legacy: bool) -> LlavaProcessor:
    tokenizer = make_tokenizer(legacy)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    Image.new("RGB", (30, 20), "red").save(folder / "x.png")
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(image_processor, tokenizer, 14, "default")


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not_legacy"])
@pytest.mark.parametrize(("template", "write", "n_rows"), [("v1", write_v1, 200), ("llava_llama_2", write_llama_2, 60)])
def test_masks_equal_those_of_sentencepiece(tmp_path, template, write, n_rows, legacy):
    rows = make_conversations(n_rows, seed=len(template))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset = LlavaDataset(tmp_path / "rows.json", tmp_path, make_processor(tmp_path, legacy), template)
    reference = Reference(legacy)
    assert len(dataset) == n_rows
    n_supervised = n_lone_spaces = 0
    for i, row in enumerate(rows):
        turns = [turn["value"] for turn in row["conversations"]]
        turns = turns[1:] if row["conversations"][0]["from"] == "gpt" else turns
        ids, labels = reference(turns, write, "image" in row)
        sample = dataset[i]
        assert sample["input_ids"].tolist() == ids
        assert sample["labels"].tolist() == labels
        assert dataset.lengths[i] == len(ids)
        assert len(sample["pixel_values"]) == len(row.get("image", []))
        n_supervised += sum(label != -100 for label in labels)
        n_lone_spaces += labels.count(reference.with_space.piece_to_id("▁"))
    # The rows have what makes the masks hard: long answers, and answers whose first space is a token by itself.
    assert n_supervised > 20 * n_rows
    assert n_lone_spaces > n_rows / 10


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not_legacy"])
def test_captions_equal_those_of_sentencepiece(tmp_path, legacy):
    rng = random.Random(1)
    rows = [
        {
            "image": "x.png",
            "conversations": [
                {"from": "human", "value": rng.choice(["Describe it.\n<image>", "<image>\nWhat?", "<image>"])},
                {"from": "gpt", "value": make_text(rng, 12)},
            ],
        }
        for _ in range(60)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset = LlavaDataset(tmp_path / "rows.json", tmp_path, make_processor(tmp_path, legacy), "plain")
    for i, row in enumerate(rows):
        ids, labels = Reference(legacy)([turn["value"] for turn in row["conversations"]], write_plain, True)
        assert dataset[i]["input_ids"].tolist() == ids
        assert dataset[i]["labels"].tolist() == labels == [-100] * 5 + ids[5:]


def test_what_is_supervised_in_words(tmp_path):
    """One conversation spelled out by hand."""
    rows = [
        {
            "image": "x.png",
            "conversations": [
                {"from": "human", "value": "Look\n<image>"},
                {"from": "gpt", "value": "A cat."},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "你"},
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "\nSo"},
            ],
        }
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    processor = make_processor(tmp_path, legacy=True)
    sample = LlavaDataset(tmp_path / "rows.json", tmp_path, processor)[0]
    tokens = processor.tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist())
    supervised = [token for token, label in zip(tokens, sample["labels"].tolist()) if label != -100]
    assert supervised == ["▁A", "▁cat", ".", "</s>", "▁", "你", "</s>", "▁", "<0x0A>", "So", "</s>"]
    after_image = tokens[len(tokens) - tokens[::-1].index("<image>") :]
    assert after_image[:8] == ["▁", "<0x0A>", "Look", "▁ASS", "IST", "ANT", ":", "▁A"]
    assert tokens.count("<s>") == 1
