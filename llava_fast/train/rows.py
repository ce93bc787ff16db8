"""Selects the rows of data files for a run, reads and checks them, and tokenises their prompts.

A data file is a JSON list, or JSONL: one object a line. A row is

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                    {"from": "gpt", "value": "A cat."}]}

where `image` may be a list of names or missing, and a leading turn that is not human's is dropped. Other keys are
ignored. Files are not trusted: a wrong value is a ValueError of one line.

The selection of rows depends only on the sources, their sizes and the seed; see docs/data.md. As in LLaVA-NeXT, counts
are of rows in the file, before any are dropped, and a percentage is rounded up. Unlike in LLaVA-NeXT, the random draw
uses the recipe's seed and keeps the order of the file; the sampler shuffles anyway.

Token ids are those of the original code: a prompt is cut at its `<image>` marks, every chunk is tokenised separately
(so each has a SentencePiece vocabulary's leading space), one BOS is kept and every mark becomes its image tokens.
Labels differ from the original, which counts tokens and masks the whole sample if the counts disagree. Here a token is
supervised if any of its characters is, by the tokenizer's character offsets.
"""

from __future__ import annotations

import json
import logging
import math
import os
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from llava_fast.errors import one_line
from llava_fast.processor.processor import LlavaProcessor
from llava_fast.processor.templates import IMAGE_MARK, Piece
from llava_fast.train.recipe import DataSource, RecipeError

MAX_CHARACTERS = 1_000_000  # of all turns of a row; tokenising more takes minutes, only to be truncated
ERRORS = ("malformed", "image_count", "image_missing", "unreadable")  # reasons that `on_error` and `max_errors` count
EXAMPLES = 3
IGNORE = -100  # the label of a token that is not supervised

_ROLES = ("human", "gpt")
_logger = logging.getLogger(__name__)


class RowError(RecipeError):
    """A row that stops a run, as an error of one line.

    PyTorch re-raises a worker process's error with its traceback as text; only the last line is used then.
    """

    def __init__(self, message: str) -> None:
        last = message.rstrip().rpartition("\n")[2]
        super().__init__(last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


@dataclass(frozen=True)
class Problem:
    """A row that was dropped, or replaced by another because its image could not be read."""

    path: Path
    row: int  # in its file, from 0
    identity: str  # its `id`, or ""
    reason: str
    words: str
    line: int | None = None  # line number in a JSONL file, if that line is not JSON

    @property
    def where(self) -> str:
        if self.line is not None:
            return f"{self.path}, line {self.line}"
        return f"{self.path}, row {self.row}" + (f" (id {self.identity})" if self.identity else "")

    def __str__(self) -> str:
        return f"{self.where}: {self.words}"


class NoRows(RecipeError):
    """No row can be used; `problems` are the reasons."""

    def __init__(self, message: str, problems: list[Problem]) -> None:
        super().__init__(message)
        self.problems = problems


@dataclass
class Report:
    """Counts of a dataset's rows: used, truncated, replaced, and dropped by reason.

    Attributes:
        rows: rows selected from the files, each counted once.
        samples: samples in this dataset; rows − dropped unless it was split or repeats rows.
        with_images: samples that have images.
        truncated: samples truncated to max_length.
        unreadable: rows that were replaced by another because an image could not be read.
        dropped: rows by reason: `malformed` (breaks the format), `image_count` (numbers of marks and images differ),
            `image_missing` (no such file), `image_truncated` (max_length falls inside of an image or before it),
            `fully_masked` (nothing supervised).
        examples: the first few rows of each reason, as text.
    """

    rows: int = 0
    samples: int = 0
    with_images: int = 0
    truncated: int = 0
    unreadable: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """Number of broken rows, which `max_errors` limits; rows that are too long or have no answer do not count."""
        return self.unreadable + sum(self.dropped.get(reason, 0) for reason in ERRORS)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def items(self) -> Iterator[tuple[str, int]]:
        """The counts by flat names, for the log."""
        for name, value in self.to_dict().items():
            if name == "dropped":
                yield from ((f"dropped_{reason}", count) for reason, count in value.items())
            elif name != "examples":
                yield name, value


def count_problems(problems: Sequence[Problem]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """The number of problems per reason, and the first few of each as text."""
    examples: dict[str, list[str]] = {}
    for problem in problems:
        listed = examples.setdefault(problem.reason, [])
        if len(listed) < EXAMPLES:
            listed.append(str(problem))
    return dict(Counter(problem.reason for problem in problems)), examples


@dataclass(frozen=True)
class BadLine:
    """Placeholder for a JSONL row whose line cannot be parsed, with the reason."""

    line: int
    words: str


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSON list or of a JSONL file, as they are; a line that is not JSON becomes a `BadLine`.

    Raises:
        FileNotFoundError: for a missing file; ValueError for a file that is not text, or a list that is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no data file {one_line(path)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if text.lstrip()[:1] == "[":
        try:
            return _decode(text)
        except ValueError as error:
            line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"{path}{line}: not JSON ({_reason(error)})") from None
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line breaks
        if line.strip():
            try:
                rows.append(_decode(line))
            except ValueError as error:
                rows.append(BadLine(number, f"not JSON ({_reason(error)}); expected a list or JSONL"))
    return rows


def _decode(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _reason(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {one_line(text, 40)} is not finite")
    return number


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)


def encode_name(row: dict[str, Any]) -> bytes:
    """A row's `id`, if it is valid, and `image`, as JSON: all that is kept of a row besides its tokens."""
    keys = ["id"] * isinstance(row.get("id"), (str, int)) + ["image"] * ("image" in row)
    return json.dumps({key: row[key] for key in keys}).encode()


def identity(content: Any) -> str:
    """A row's `id` as text, or ""."""
    name = content.get("id") if isinstance(content, dict) else None
    return one_line(name, 80) if isinstance(name, (str, int)) else ""


def parse_row(row: Any) -> tuple[list[str], list[str]]:
    """A row's turns (human, gpt, human, ...) and its images; ValueError if it breaks the format."""
    if isinstance(row, BadLine):
        raise ValueError(row.words)
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise ValueError("expected an object with a list of 'conversations'")
    turns = row["conversations"]
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {i} has no text 'value'")
    if turns and turns[0].get("from") != "human":
        turns = turns[1:]  # a system prompt, or an answer to a question that was cut off
    for i, turn in enumerate(turns):
        role = turn.get("from")
        if role != _ROLES[i % 2]:
            shown = f"'{one_line(role, 40)}'" if isinstance(role, str) else type(role).__name__
            raise ValueError(f"roles must alternate: turn {i} is from {shown}, not {_ROLES[i % 2]!r}")
    texts = [turn["value"] for turn in turns]
    characters = sum(map(len, texts))
    if characters > MAX_CHARACTERS:
        raise ValueError(f"{characters} characters of text are more than the limit of {MAX_CHARACTERS}")
    for i, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"turn {i} is no Unicode text: half of a surrogate pair") from None
    return texts, image_names(row)


def image_names(row: dict[str, Any]) -> list[str]:
    """A row's image names; ValueError for a value that is not a name."""
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError("'image' must be a file name or a list of them")
    return images


class ImageFolder:
    """A directory that paths cannot leave, by `..`, by being absolute or through a symbolic link.

    The directory itself may be a link: for images elsewhere, use their folder, or a link to it, as image folder.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"no image folder {one_line(root)}")
        self._real = os.path.realpath(root)
        self._listings: dict[str, dict[str, bool]] = {}

    def resolve(self, name: str) -> str:
        """The real path of an image that may not exist; ValueError if it is outside."""
        return self._inside(name, name)

    def _inside(self, path: str, name: str) -> str:
        try:
            real = os.path.realpath(os.path.join(self._real, path))
        except ValueError:  # a NUL character, or a lone surrogate
            raise ValueError(f"image '{one_line(name)}' cannot be the name of a file") from None
        if os.path.commonpath([self._real, real]) != self._real:
            raise ValueError(f"image '{one_line(name)}' is outside of the image folder {self.root}")
        return real

    def exists(self, name: str) -> bool:
        """Like `resolve`, and whether the file exists; a directory is listed once for all of its files."""
        directory, base = os.path.split(name)
        if directory not in self._listings:
            real = self._inside(directory, name)
            if real not in self._listings:  # names such as a, ./a, a/../a share one listing
                entries = os.scandir(real) if os.path.isdir(real) else ()
                self._listings[real] = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
            self._listings[directory] = self._listings[real]
        is_plain = self._listings[directory].get(base)
        if is_plain is False or base in ("", ".", ".."):  # a link, a folder, a pipe
            return os.path.isfile(self.resolve(name))
        return is_plain is not None

    def forget_listings(self) -> None:
        self._listings.clear()


# Selecting rows


def choose_rows(sources: Sequence[DataSource], sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """The selected rows of each source: int64 [count] row numbers in the order of its file (`repeat`: pass by pass).

    Args:
        sizes: number of rows in each source's file.
    Raises:
        ValueError: for a source with fewer rows than its `count`.
    """
    counts = _counts(sources, sizes)
    return [
        _choose(source.sampling, size, count, np.random.default_rng([seed, i]))
        for i, (source, size, count) in enumerate(zip(sources, sizes, counts))
    ]


def _counts(sources: Sequence[DataSource], sizes: Sequence[int]) -> list[int]:
    weights = [source.weight for source in sources if source.weight is not None]  # all sources have one, or none
    if weights:
        total = sum(weights)
        wanted = [(size * total / weight, source) for size, weight, source in zip(sizes, weights, sources)]
        once = [rows for rows, source in wanted if source.sampling != "repeat"]
        rows = min(once) if once else max(rows for rows, _ in wanted)
        return [math.floor(rows * weight / total + 1e-9) for weight in weights]
    counts = []
    for source, size in zip(sources, sizes):
        count = _count(source.count, size)
        if source.sampling != "repeat" and count > size:
            raise ValueError(
                f"{source.path}: count {source.count} asks for {count} of {size} rows; sampling: repeat gives rows "
                "more than once"
            )
        counts.append(count)
    return counts


def _count(count: int | str | None, size: int) -> int:
    """The number of rows to select from a file of `size` rows; a percentage is rounded up."""
    if isinstance(count, str):
        return math.ceil(size * Fraction(count.removesuffix("%")) / 100)
    return size if count is None else count


def _choose(sampling: str, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    if sampling == "last":
        return np.arange(size - count, size)
    if sampling == "first":
        return np.arange(count)
    if size == 0:
        return np.arange(0)
    whole, rest = divmod(count, size)  # whole passes, then some rows drawn at random
    passes = [np.arange(size)] * whole + [np.sort(rng.choice(size, rest, replace=False))]
    return np.concatenate(passes)


# Tokens


def tokenise(prompts: Sequence[Sequence[Piece]], processor: LlavaProcessor) -> list[np.ndarray]:
    """Tokenise training prompts in one call, which a fast tokenizer parallelises.

    Args:
        prompts: each from `Template.pieces`.
    Returns:
        For each prompt its token ids, int64 [n]: an unsupervised token is stored as `~id`, which is negative, and an
        `<image>` mark is one image token. `expand` converts them to input ids and labels.
    """
    if not prompts:
        return []
    texts = ["".join(text for text, _ in pieces).split(IMAGE_MARK) for pieces in prompts]
    chunks = [chunk for text in texts for chunk in text]
    encoded = processor.tokenizer(
        chunks, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
    )
    encodings = zip(encoded["input_ids"], encoded.encodings)
    first = ~np.array(bos(processor.tokenizer), dtype=np.int64)
    image = ~np.array([processor.image_token_id], dtype=np.int64)
    tokenised = []
    for pieces, text in zip(prompts, texts):
        ends = list(accumulate(len(piece) for piece, _ in pieces))
        answers = [(end - len(piece), end) for (piece, supervised), end in zip(pieces, ends) if supervised and piece]
        arrays: list[np.ndarray] = []
        at = 0
        for chunk, (listed, encoding) in zip(text, encodings):
            ids = np.array(listed, dtype=np.int64)
            tokens = ~ids
            for start, end in answers:
                if at < end and start < at + len(chunk):
                    answer = _tokens_of(encoding, start - at, min(end - at, len(chunk)))
                    tokens[answer] = ids[answer]
            arrays += [image if arrays else first, tokens]
            at += len(chunk) + len(IMAGE_MARK)
        tokenised.append(np.concatenate(arrays))
    return tokenised


def _tokens_of(encoding: Encoding, start: int, end: int) -> slice:
    """The tokens that overlap the characters `start` to `end`, by binary search (offsets are non-decreasing)."""

    def first(token: int) -> int:
        return (encoding.token_to_chars(token) or (0, 0))[0]  # None only for special tokens, which are not added here

    def last(token: int) -> int:
        # A token of zero width, such as a lone leading space, counts as part of the next character.
        at, stop = encoding.token_to_chars(token) or (0, 0)
        return max(at + 1, stop)

    tokens = range(len(encoding))
    return slice(bisect_right(tokens, start, key=last), bisect_left(tokens, end, key=first))


def expand(tokens: np.ndarray, image_token_id: int, n_image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Input ids and labels (−100 if not supervised), int64, of a prompt from `tokenise`, with all image tokens."""
    tokens = tokens.astype(np.int64)
    tokens = np.repeat(tokens, np.where(tokens == ~image_token_id, n_image_tokens, 1))
    return np.where(tokens < 0, ~tokens, tokens), np.where(tokens < 0, IGNORE, tokens)


def bos(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer adds before a text: [BOS], or none."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def check_spaces(processor: LlavaProcessor) -> None:
    """Warn if the tokens after an image will differ between a prompt at inference and training."""
    tokenizer, after = processor.tokenizer, "\nx"
    trained = [processor.image_token_id, *tokenizer(after, add_special_tokens=False)["input_ids"]]
    prompted = tokenizer(processor.image_token + after, add_special_tokens=False)["input_ids"]
    if prompted != trained:
        _logger.warning(
            "this tokenizer puts a leading space at the start of a text only, so after %s a prompt lacks the space "
            "token that LLaVA is trained with; loaded with legacy=True it has it",
            processor.image_token,
        )
