"""Reads rows of data, converts every form of a row into a `Conversation`, and tokenises prompts.

A data file is a JSON list, JSONL (one object a line), or one of the files and folders of `tables.py`. A row has one of
these forms; other keys are ignored:

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                    {"from": "gpt", "value": "A cat."}]}
    {"images": ["a.jpg"], "messages": [{"role": "user", "content": [{"type": "image"},
                                                                    {"type": "text", "text": "What is this?"}]},
                                       {"role": "assistant", "content": "A cat."}]}
    {"images": ["a.jpg"], "prompt": [messages], "completion": [messages]}

`conversations` is LLaVA's form, in which `<image>` marks move to the front of their turn. The text of `messages` is
what the template's chat template makes of them. A leading system turn is kept; another leading turn that is not the
user's is dropped. Files are not trusted: a wrong value is a ValueError of one line.

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
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from llava_fast.errors import one_line
from llava_fast.processor.processor import LlavaProcessor
from llava_fast.processor.templates import IMAGE_MARK, Piece, marks_first
from llava_fast.train.recipe import RecipeError

MAX_CHARACTERS = 1_000_000  # of all turns of a row; tokenising more takes minutes, only to be truncated
ERRORS = ("malformed", "image_count", "image_missing", "unreadable")  # reasons that `on_error` and `max_errors` count
EXAMPLES = 3
IGNORE = -100  # the label of a token that is not supervised

_ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
_FORMS = "expected an object with a list of 'conversations', of 'messages', or of 'prompt' and 'completion'"
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
class BadRow:
    """Placeholder for a row that cannot be read, with the reason."""

    words: str
    line: int | None = None  # in a JSONL file


class JsonFile:
    """The rows of a JSON list or a JSONL file, held in memory until `close`."""

    rereads = False  # whether a row can be read again after `close`, by `row(number)`

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = read_rows(path)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, numbers: Sequence[int]) -> Iterator[Any]:
        return (self._rows[number] for number in numbers)

    def where(self, number: int) -> tuple[Path, int]:
        """The file of a row, and the row's number in it."""
        return self.path, number

    def close(self) -> None:
        self._rows = []


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSON list or of a JSONL file, as they are; a line that is not JSON becomes a `BadRow`.

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
                rows.append(BadRow(f"not JSON ({_reason(error)}); expected a list or JSONL", number))
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


def encode_name(row: dict[str, Any], images: list[str | None]) -> bytes:
    """A row's `id`, if it is valid, and `image`, as JSON: all that is kept of a row besides its tokens."""
    name = {key: row[key] for key in ["id"] * isinstance(row.get("id"), (str, int))}
    if images or "image" in row:
        name["image"] = images[0] if len(images) == 1 else images
    return json.dumps(name).encode()


def identity(content: Any) -> str:
    """A row's `id` as text, or ""."""
    name = content.get("id") if isinstance(content, dict) else None
    return one_line(name, 80) if isinstance(name, (str, int)) else ""


# Forms of a row


class Conversation(NamedTuple):
    """What a row says, whatever its form."""

    turns: list[str]  # of user, assistant, user, ... with their `<image>` marks
    images: list[str | bytes]  # in the order of the marks: file names, data: URLs, files' contents
    system: str | None = None  # None: the template's
    context: int = 0  # the first turns, if they are a prompt that is not supervised


def parse_row(row: Any) -> Conversation:
    """A row's conversation; ValueError if it has none of the forms.

    The contents of images that a table's scan leaves out are `b""`.
    """
    if isinstance(row, BadRow):
        raise ValueError(row.words)
    if not isinstance(row, dict):
        raise ValueError(_FORMS)
    turns = row.get("conversations")
    if isinstance(turns, list) and not (turns and isinstance(turns[0], dict) and "role" in turns[0]):
        for i, turn in enumerate(turns):
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                raise ValueError(f"turn {i} has no text 'value'")
        images = row_images(row)
        texts = [marks_first(turn["value"]) if images else turn["value"] for turn in turns]
        return _checked([turn.get("from") for turn in turns], texts, images, ("human", "gpt"))
    messages = turns if isinstance(turns, list) else row.get("messages")
    if isinstance(messages, list):
        return _from_messages(messages, row_images(row))
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        talk = _from_messages(prompt + completion, row_images(row))
        return talk._replace(context=max(0, len(talk.turns) - len(completion)))
    raise ValueError(_FORMS)


def _checked(roles: list[Any], texts: list[str], images: list[str | bytes], names: tuple[str, str]) -> Conversation:
    """The conversation of these turns, if their roles alternate and their texts can be tokenised."""
    characters = sum(map(len, texts))
    if characters > MAX_CHARACTERS:
        raise ValueError(f"{characters} characters of text are more than the limit of {MAX_CHARACTERS}")
    for i, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"turn {i} is no Unicode text: half of a surrogate pair") from None
    system = texts[0] if roles and roles[0] == "system" else None
    first = 0
    if roles and roles[0] not in ("human", "user"):  # a system prompt, or an answer to a question that was cut off
        first = 1
    for i, role in enumerate(roles[first:]):
        if not isinstance(role, str) or _ROLES.get(role) != i % 2:
            shown = f"'{one_line(role, 40)}'" if isinstance(role, str) else type(role).__name__
            raise ValueError(f"roles must alternate: turn {first + i} is from {shown}, not {names[i % 2]!r}")
    return Conversation(texts[first:], images, system)


def _from_messages(messages: list[Any], given: list[str | bytes]) -> Conversation:
    """A conversation of OpenAI's, transformers' or TRL's form.

    Args:
        given: the row's images, for `{"type": "image"}` parts and `<image>` marks in order. If there are neither, all
            are put before the first question, as TRL does.
    """
    roles: list[Any] = []
    texts: list[str] = []
    images: list[str | bytes] = []
    rest = iter(given)
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        marks: list[str | bytes | None] = []
        if isinstance(content, str):
            text = content
        elif isinstance(content, list):
            parts = [_part(part, f"part {k} of turn {i}") for k, part in enumerate(content)]
            marks = [image for text, image in parts if text is None]
            text = " ".join(text for text, _ in parts if text is not None)
        else:
            raise ValueError(f"turn {i} has no 'content', a text or a list of parts")
        for image in marks:
            images += islice(rest, 1) if image is None else [image]
        images += islice(rest, text.count(IMAGE_MARK))
        roles.append(message.get("role"))
        texts.append(_with_images(len(marks), text))
    if given and not any(IMAGE_MARK in text for text in texts):
        questions = (i for i, role in enumerate(roles) if role in ("user", "human"))
        for i in islice(questions, 1):
            if isinstance(messages[i]["content"], str):
                texts[i] = _with_images(len(given), texts[i])
    return _checked(roles, texts, [*images, *rest], ("user", "assistant"))


def _with_images(count: int, text: str) -> str:
    """What the chat templates make of a message with so many image parts (`flatten` in `templates.py`)."""
    return (f"{IMAGE_MARK}\n" * count + text.strip()).strip() if count else text


def _part(part: Any, where: str) -> tuple[str | None, str | bytes | None]:
    """The text of a message's part, or else its image, None if it is one of the row's."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], None
    if kind == "image":
        found = next((part[key] for key in ("image", "url", "path") if part.get(key) is not None), None)
    elif kind == "image_url":
        found = part.get("image_url")
        found = found.get("url") if isinstance(found, dict) else found
    else:
        raise ValueError(f"{where} is neither a 'text' nor an 'image' or 'image_url'")
    if found is None and kind == "image":
        return None, None
    if isinstance(found, str):
        found = found.removeprefix("file://")
    return None, _image(found, f"the image of {where}")


def row_images(row: dict[str, Any]) -> list[str | bytes]:
    """The images in a row's `image` or `images`; ValueError for a value that is none."""
    images = row.get("image")
    if images in (None, "", []):
        images = row.get("images") or []
    if isinstance(images, (str, bytes)):
        return [images]
    images = images if isinstance(images, list) else [images]
    return [_image(image, "'image'") for image in images]


def _image(image: Any, what: str) -> str | bytes:
    if isinstance(image, dict):  # as the datasets library stores it
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if not isinstance(image, (str, bytes)):
        raise ValueError(f"{what} must be a file name or a list of them, a data: URL, or 'bytes' with a 'path'")
    return image


def is_inline(image: str | bytes | None) -> bool:
    """Whether an image lies in the row itself, not in a file of its own."""
    return not isinstance(image, str) or image.startswith("data:")


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
