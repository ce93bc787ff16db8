"""LLaVA's training data: JSON rows into token ids, labels and uint8 pixels, and samples into packs.

The token ids are those of the original code: the prompt is cut at its `<image>` marks, every chunk is tokenised on its
own (so each has a SentencePiece vocabulary's leading space), one BOS is kept and every mark becomes its image tokens.
The labels are not the original's arithmetic on token counts, which gives up on a sample when the counts disagree: a
token is supervised if any of its characters is, by the tokenizer's own character offsets.

Nothing is lost silently: `LlavaDataset.report` counts every row that was left out, shortened or replaced, and why.

Shapes: T tokens, n images of one sample, N images of a pack, H and W pixels.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from llava_fast.model.processor import LlavaProcessor
from llava_fast.model.templates import IMAGE_MARK, Piece, Template, get_template
from llava_fast.sequence import pack

IGNORE = -100  # the label of a token that is not supervised

_logger = logging.getLogger(__name__)
_ROLES = ("human", "gpt")
_SCAN_ROWS = 1000  # rows tokenised in one call, which a fast tokenizer spreads over the cores
_MAX_SUBSTITUTES = 16  # unreadable images one after another that are bad luck; more are a wrong image_folder
_EXAMPLES = 3


@dataclass
class Report:
    """What became of the rows of a data file.

    Attributes:
        rows: in the file.
        samples: in this dataset; less than rows − dropped after `split`.
        with_images: samples that have images.
        truncated: samples cut at max_length.
        unreadable: image rows that were met and replaced by another because an image could not be read.
        dropped: rows left out, by reason: `image_count` (as many marks as images), `image_missing` (no such file),
            `image_truncated` (max_length falls inside of an image or before it), `fully_masked` (nothing supervised).
        examples: the first few rows of each reason, in words.
    """

    rows: int = 0
    samples: int = 0
    with_images: int = 0
    truncated: int = 0
    unreadable: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def items(self) -> Iterator[tuple[str, int]]:
        """The counts alone, by flat names, for a log."""
        for name, value in self.to_dict().items():
            if name == "dropped":
                yield from ((f"dropped_{reason}", count) for reason, count in value.items())
            elif name != "examples":
                yield name, value

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return (
            f"{self.samples} samples ({self.with_images} with images) of {self.rows} rows; "
            f"dropped: {reasons or 'none'}; truncated: {self.truncated}; unreadable: {self.unreadable}"
        )


def encode(pieces: Sequence[Piece], processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """Tokenise a training prompt: input ids with images expanded, and labels (−100 where not supervised).

    Args:
        pieces: from `Template.pieces`.
    Raises:
        ValueError: for a tokenizer without character offsets.
    """
    tokenizer = processor.tokenizer
    text = "".join(piece for piece, _ in pieces)
    supervised = np.repeat([flag for _, flag in pieces], [len(piece) for piece, _ in pieces])
    n_before = np.concatenate([[0], np.cumsum(supervised)])  # supervised characters before each character
    chunks = text.split(IMAGE_MARK)
    encoded = tokenizer(chunks, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    ids = _bos(tokenizer)
    labels = [IGNORE] * len(ids)
    image = [processor.image_token_id] * processor.num_image_tokens()
    start = 0
    for i, chunk in enumerate(chunks):
        if i:
            ids += image
            labels += [IGNORE] * len(image)
        tokens = encoded["input_ids"][i]
        first, last = np.array(encoded["offset_mapping"][i], dtype=np.int64).reshape(-1, 2).T
        # A token of no width, such as a lone leading space, goes with the character it stands before.
        last = np.minimum(np.maximum(last, first + 1), len(chunk))
        is_label = n_before[start + last] > n_before[start + first]
        ids += tokens
        labels += np.where(is_label, tokens, IGNORE).tolist()
        start += len(chunk) + len(IMAGE_MARK)
    return ids, labels


def _bos(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts in front of a text: [BOS], or nothing."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _check_spaces(processor: LlavaProcessor) -> None:
    """Warn where a prompt's tokens after an image will differ from the ones trained on."""
    tokenizer, after = processor.tokenizer, "\nx"
    trained = [processor.image_token_id, *tokenizer(after, add_special_tokens=False)["input_ids"]]
    prompted = tokenizer(processor.image_token + after, add_special_tokens=False)["input_ids"]
    if prompted != trained:
        _logger.warning(
            "this tokenizer puts a leading space at the start of a text only, so after %s a prompt lacks the space "
            "token that LLaVA is trained with; loaded with legacy=True it has it",
            processor.image_token,
        )


def _read_rows(path: Path) -> list[Any]:
    """The rows of a JSON list or of a JSONL file."""
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip()[:1] == "[":
            return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line breaks
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); expected a list or JSONL") from None
    return rows


def _parse_row(row: Any) -> tuple[list[str], list[str]]:
    """A row's turns (human, gpt, human, ...) and its images; ValueError says what is wrong with it."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise ValueError("expected an object with a list of 'conversations'")
    turns = row["conversations"]
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {i} has no text 'value'")
    if turns and turns[0].get("from") != "human":
        turns = turns[1:]  # a system prompt, or an answer to a question that was cut off
    for i, turn in enumerate(turns):
        if turn.get("from") != _ROLES[i % 2]:
            raise ValueError(f"roles must alternate: turn {i} is from {turn.get('from')!r}, not {_ROLES[i % 2]!r}")
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError("'image' must be a file name or a list of them")
    return [turn["value"] for turn in turns], images


class _Folder:
    """A directory that paths cannot leave, by `..`, by being absolute or through a symbolic link."""

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"no image folder {root}")
        self._real = os.path.realpath(root)
        self._listings: dict[str, dict[str, bool]] = {}

    def resolve(self, name: str) -> str:
        """The real path of an image that may not exist; ValueError if it is outside."""
        return self._inside(name, name)

    def _inside(self, path: str, name: str) -> str:
        real = os.path.realpath(os.path.join(self._real, path))
        if os.path.commonpath([self._real, real]) != self._real:
            raise ValueError(f"image {name!r} is outside of the image folder {self.root}")
        return real

    def exists(self, name: str) -> bool:
        """Like `resolve`, then whether the file is there; one directory listing serves all of its files."""
        directory, base = os.path.split(name)
        if directory not in self._listings:
            real = self._inside(directory, name)
            entries = os.scandir(real) if os.path.isdir(real) else ()
            self._listings[directory] = {entry.name: entry.is_symlink() for entry in entries}
        is_link = self._listings[directory].get(base)
        if is_link or base in ("", ".", ".."):
            return os.path.isfile(self.resolve(name))
        return is_link is not None

    def forget_listings(self) -> None:
        self._listings.clear()


class LlavaDataset(Dataset):
    """Rows of a LLaVA data file as training samples; images are read when a sample is asked for.

    `dataset[i]` is `{"input_ids": int64 [T], "labels": int64 [T], "pixel_values": uint8 [n, H, W, 3]}` with image
    tokens expanded; n is 0 for text alone.

    All rows are checked and tokenised once, when the dataset is made, so that its length, `lengths` and `report` are
    exact. Rows that cannot be used are left out and counted. An image that turns out unreadable later does not stop a
    run: another row with images takes that sample's place, and the report counts it.

    Attributes:
        lengths: tokens of each sample, image tokens included.
        modality: "image" or "text" for each sample.

    Args:
        data_path: a JSON list or JSONL file of `{"id", "image", "conversations"}`.
        image_folder: what `image` paths are relative to and cannot leave; None if no row has images.
        processor: gives pixels, tokens and the number of tokens per image.
        template: a name from `TEMPLATES`, or a template.
        max_length: in tokens, images included; what is longer is cut.
        cache: keep finished samples in memory, for small data that is seen many times.
    Raises:
        FileNotFoundError: for a missing data file or image folder.
        ValueError: for a row that breaks the format (roles that do not alternate, a wrong number of turns for
            `plain`, an image outside of the folder), naming the file and the row; or if no row can be used.
    """

    def __init__(
        self,
        data_path: str | os.PathLike,
        image_folder: str | os.PathLike | None,
        processor: LlavaProcessor,
        template: str | Template = "v1",
        max_length: int = 2048,
        *,
        cache: bool = False,
    ) -> None:
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(processor.tokenizer).__name__} has no character offsets, which labels are made from: "
                "use the fast version of this tokenizer"
            )
        self.data_path = Path(data_path)
        self.processor = processor
        self.template = get_template(template)
        self.max_length = max_length
        self._folder = None if image_folder is None else _Folder(image_folder)
        self._cache: dict[int, dict[str, torch.Tensor]] | None = {} if cache else None

        _check_spaces(processor)

        rows = _read_rows(self.data_path)
        # All rows in one buffer: Python objects would be copied into every worker process, one page at a time.
        texts = [json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") for row in rows]
        self._ends = np.cumsum([0] + [len(text) for text in texts])
        self._buffer = b"".join(texts)
        # One byte per row that workers write to: an image of it could not be read.
        self._unreadable = torch.zeros(max(1, len(rows)), dtype=torch.uint8).share_memory_()

        self._dropped: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        kept = list(self._scan(rows))
        if self._folder:
            self._folder.forget_listings()
        self._rows = np.array([row for row, *_ in kept], dtype=np.int64)
        self.lengths = [length for _, length, _, _ in kept]
        self.modality = ["image" if has_images else "text" for _, _, has_images, _ in kept]
        self._cut = np.array([cut for *_, cut in kept], dtype=bool)
        for reason, count in self._dropped.items():
            _logger.warning("%s: dropped %d rows: %s (such as %s)", data_path, count, reason, self._examples[reason][0])
        if not kept:
            first = "; ".join(examples[0] for examples in self._examples.values()) or "the file is empty"
            raise ValueError(f"{data_path}: none of {len(rows)} rows can be used: {first}")

    def _name(self, row: int, content: Any) -> str:
        identity = content.get("id") if isinstance(content, dict) else None
        return f"{self.data_path}, row {row}" + ("" if identity is None else f" (id {identity})")

    def _drop(self, reason: str, row: int, content: dict, words: str) -> None:
        self._dropped[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(f"{self._name(row, content)}: {words}")

    def _pieces(self, turns: list[str], images: list[str]) -> list[Piece]:
        tokenizer = self.processor.tokenizer
        turns = self.template.prepare(turns) if images else turns
        return self.template.pieces(turns, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "")

    def _scan(self, rows: list[Any]) -> Iterator[tuple[int, int, bool, bool]]:
        """Check and measure every row; yields (row, length, has images, was cut) of those that can be used."""
        batch: list[tuple[int, list[Piece], int]] = []
        for row, content in enumerate(tqdm(rows, desc=f"Reading {self.data_path.name}", unit=" rows", delay=5)):
            try:
                turns, images = _parse_row(content)
                pieces = self._pieces(turns, images)
                if images and self._folder is None:
                    raise ValueError(f"image {images[0]!r} needs an image_folder")
                missing = [image for image in images if not self._folder.exists(image)]
            except ValueError as error:
                raise ValueError(f"{self._name(row, content)}: {error}") from None
            marks = sum(text.count(IMAGE_MARK) for text, _ in pieces)
            if marks != len(images):
                self._drop("image_count", row, content, f"{marks} {IMAGE_MARK} marks but {len(images)} images")
            elif missing:
                self._drop("image_missing", row, content, f"no image file {missing[0]}")
            elif not any(text for text, supervised in pieces if supervised):
                self._drop("fully_masked", row, content, "no answer")
            else:
                batch.append((row, pieces, marks))
            if len(batch) == _SCAN_ROWS:
                yield from self._measure(batch, rows)
                batch = []
        yield from self._measure(batch, rows)

    def _measure(
        self, batch: list[tuple[int, list[Piece], int]], rows: list[Any]
    ) -> Iterator[tuple[int, int, bool, bool]]:
        if not batch:
            return
        chunks = [chunk for _, pieces, _ in batch for chunk in "".join(t for t, _ in pieces).split(IMAGE_MARK)]
        encoded = self.processor.tokenizer(chunks, add_special_tokens=False, return_attention_mask=False)
        sizes = iter([len(ids) for ids in encoded["input_ids"]])
        image_tokens, bos = self.processor.num_image_tokens(), len(_bos(self.processor.tokenizer))
        for row, pieces, marks in batch:
            length = bos + marks * image_tokens + sum(next(sizes) for _ in range(marks + 1))
            if length > self.max_length:
                ids, labels = encode(pieces, self.processor)
                if self.processor.image_token_id in ids[self.max_length :]:
                    words = f"{length} tokens, and max_length {self.max_length} cuts off image tokens"
                    self._drop("image_truncated", row, rows[row], words)
                    continue
                if all(label == IGNORE for label in labels[1 : self.max_length]):
                    words = f"{length} tokens, and no answer within max_length {self.max_length}"
                    self._drop("fully_masked", row, rows[row], words)
                    continue
            yield row, min(length, self.max_length), marks > 0, length > self.max_length

    @property
    def report(self) -> Report:
        """Counts so far; those of unreadable images grow while samples are read, in any worker process."""
        unreadable = np.flatnonzero(self._unreadable.numpy()[self._rows])
        examples = {reason: list(words) for reason, words in self._examples.items()}
        if len(unreadable):
            examples["unreadable"] = [self._name(int(self._rows[i]), self.row(i)) for i in unreadable[:_EXAMPLES]]
        return Report(
            rows=len(self._ends) - 1,
            samples=len(self),
            with_images=self.modality.count("image"),
            truncated=int(self._cut.sum()),
            unreadable=len(unreadable),
            dropped=dict(self._dropped),
            examples=examples,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        """The row of the data file that a sample comes from."""
        start, end = self._ends[self._rows[index]], self._ends[self._rows[index] + 1]
        return json.loads(self._buffer[start:end].decode("utf-8", "surrogatepass"))

    def split(self, fraction: float, seed: int = 0) -> tuple[LlavaDataset, LlavaDataset]:
        """Two datasets, of about 1 − `fraction` and `fraction` of the samples, in the order of the file.

        Samples that share their (first) image stay together, so that no picture is in both.

        Raises:
            ValueError: if either part would be empty.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"a validation fraction lies between 0 and 1, not {fraction}")
        groups: dict[Any, list[int]] = {}
        for i in range(len(self)):
            _, images = _parse_row(self.row(i))
            groups.setdefault(images[0] if images else i, []).append(i)
        keys = list(groups)
        wanted = max(1, round(fraction * len(self)))
        held_out: list[int] = []
        for k in np.random.default_rng(seed).permutation(len(keys)):
            if len(held_out) >= wanted:
                break
            held_out += groups[keys[k]]
        mask = np.zeros(len(self), dtype=bool)
        mask[held_out] = True
        if mask.all() or not mask.any():
            raise ValueError(f"a fraction of {fraction} of {len(self)} samples leaves one part empty")
        return self._subset(~mask), self._subset(mask)

    def _subset(self, mask: np.ndarray) -> LlavaDataset:
        part = copy(self)
        part._rows, part._cut = self._rows[mask], self._cut[mask]
        part.lengths = [self.lengths[i] for i in np.flatnonzero(mask)]
        part.modality = [self.modality[i] for i in np.flatnonzero(mask)]
        part._cache = None if self._cache is None else {}
        return part

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self))[index]  # negative indices, and IndexError past the end
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        candidates = (i % len(self) for i in range(index, index + len(self)))
        if self.modality[index] == "image":  # others with images, so that a sampler's groups stay as they are
            candidates = (i for i in candidates if self.modality[i] == "image")
        for candidate in islice(candidates, _MAX_SUBSTITUTES):
            try:
                sample = self._load(candidate)
            except (OSError, ValueError) as error:
                self._unreadable[self._rows[candidate]] = 1
                failure = error
                _logger.warning("%s: %s", self._name(int(self._rows[candidate]), self.row(candidate)), error)
                continue
            if self._cache is not None:
                self._cache[index] = sample
            return sample
        raise ValueError(f"{self.data_path}: no readable sample near row {self._rows[index]}; the last try: {failure}")

    def _load(self, index: int) -> dict[str, torch.Tensor]:
        turns, images = _parse_row(self.row(index))
        ids, labels = encode(self._pieces(turns, images), self.processor)
        height, width = self.processor.image_size
        pixels_nHWC = np.empty((len(images), height, width, 3), dtype=np.uint8)
        for i, image in enumerate(images):
            pixels_nHWC[i] = self.processor.image_pixels(self._folder.resolve(image))
        return {
            "input_ids": torch.tensor(ids[: self.max_length]),
            "labels": torch.tensor(labels[: self.max_length]),
            "pixel_values": torch.from_numpy(pixels_nHWC),
        }


class PackedCollator:
    """Samples of a `LlavaDataset` laid end to end in one row, with key ranges in place of an attention mask.

    Args:
        processor: the one the samples were made with.
        bidirectional_images: let the tokens of one image see each other.
    """

    def __init__(self, processor: LlavaProcessor, *, bidirectional_images: bool = False) -> None:
        self.image_token_id = processor.image_token_id
        self.image_tokens = processor.num_image_tokens()
        self.bidirectional_images = bidirectional_images

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pack samples.

        Returns:
            `input_ids`, `labels`, `position_ids` int64 [1, T]; `key_start`, `key_end` int32 [1, T]; `image_slots`
            int64, the image tokens' places in the row; `label_rows` int64, those of the tokens whose next token has a
            label; and `pixel_values` uint8 [N, H, W, 3] if there are images.
            The first label of each sample is −100: no sample predicts the next one's first token.
        Raises:
            ValueError: if a sample's image tokens do not match its images.
        """
        labels, spans = [], []
        for i, sample in enumerate(samples):
            slots = (sample["input_ids"] == self.image_token_id).nonzero().flatten()
            images = len(sample["pixel_values"])
            if len(slots) != images * self.image_tokens:
                raise ValueError(
                    f"sample {i} has {len(slots)} image tokens where its {images} images need "
                    f"{images * self.image_tokens}"
                )
            spans.append([(int(first), self.image_tokens) for first in slots[:: self.image_tokens]])
            labels.append(sample["labels"].clone())
            labels[-1][0] = IGNORE
        input_ids = torch.cat([sample["input_ids"] for sample in samples])
        ranges = pack(
            [len(sample["input_ids"]) for sample in samples],
            spans,
            bidirectional_images=self.bidirectional_images,
        )
        all_labels = torch.cat(labels)
        batch = {
            "input_ids": input_ids[None],
            "labels": all_labels[None],
            "label_rows": (all_labels[1:] != IGNORE).nonzero().flatten(),
            "position_ids": ranges.position_ids,
            "key_start": ranges.key_start,
            "key_end": ranges.key_end,
            "image_slots": (input_ids == self.image_token_id).nonzero().flatten(),
        }
        if any(map(len, spans)):
            batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples])
        return batch
