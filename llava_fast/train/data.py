"""The dataset: rows to token ids, labels and uint8 pixels.

`LlavaDataset.report` counts every row that was dropped, truncated or replaced, by reason.

Shapes: T tokens, n images of one sample, H and W pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from llava_fast.errors import one_line
from llava_fast.processor.processor import LlavaProcessor
from llava_fast.processor.templates import IMAGE_MARK, Piece, Template, get_template
from llava_fast.train.recipe import DataSource
from llava_fast.train.rows import (
    ERRORS,
    EXAMPLES,
    BadRow,
    ImageFolder,
    JsonFile,
    NoRows,
    Problem,
    Report,
    RowError,
    check_spaces,
    count_problems,
    encode_name,
    expand,
    identity,
    is_inline,
    parse_row,
    tokenise,
)
from llava_fast.train.sampler import choose_rows

_logger = logging.getLogger(__name__)
_SCAN_ROWS = 1000  # rows per tokenizer call, which a fast tokenizer parallelises
_MAX_SUBSTITUTES = 16  # more unreadable images in a row mean a wrong image_folder


class _LeftOut(Exception):
    """Raised for a row that cannot be used."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason  # a key of `Report.dropped`
        self.words = words


class Embedded(NamedTuple):
    """An image inside of a data file."""

    path: Path
    row: int  # in that file
    image: int  # in that row

    def __str__(self) -> str:
        return f"image {self.image} of row {self.row}"


def open_source(source: DataSource) -> Any:
    """The rows of a data file or folder: a `JsonFile`, or one of the classes of `tables.py`, which act alike."""
    is_folder = source.path.is_dir()
    if source.split is not None and not is_folder:
        raise ValueError(f"{source.path}: a split is of a folder, and this is a file")
    if source.path.suffix in (".parquet", ".arrow") or is_folder:
        from llava_fast.train import tables  # pyarrow is imported only where it is needed

        return tables.open_table(source.path, source.split)
    return JsonFile(source.path)


class _Kept(NamedTuple):
    """A row that can be used."""

    source: int
    row: int
    name: bytes  # from `encode_name`
    tokens: np.ndarray  # from `tokenise`, cut at max_length
    length: int  # with all tokens of its images
    n_images: int
    cut: bool


class _Ragged:
    """Arrays of unequal length in one buffer, which forked worker processes share.

    Separate Python objects would be copied into each worker: reference counting writes to their memory pages.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.ends = np.cumsum([0] + [len(array) for array in arrays])
        self.values = np.concatenate(arrays)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.ends[index] : self.ends[index + 1]]


class LlavaDataset(Dataset):
    """Rows of data files, in any form of `rows.py`, as training samples; images are read when a sample is loaded.

    `dataset[i]` is `{"input_ids": int64 [T], "labels": int64 [T], "pixel_values": uint8 [n, H, W, 3]}` with image
    tokens expanded; n is 0 for text alone.

    Each row is checked and tokenised once, when the dataset is created, and its tokens are stored, so `lengths` and
    `report` are exact. Memory is 2 bytes per token (4 if ids do not fit in int16), with one token per image: 0.4 GB for
    LLaVA's 665k rows of about 300 tokens. Rows that cannot be used are dropped and counted. If an image cannot be read
    when its sample is loaded, the sample is replaced by another row with images, and counted.

    Attributes:
        lengths: tokens of each sample, image tokens included.
        n_images: number of images of each sample.
        problems: every dropped row, with the reason.

    Args:
        data_path: a JSON, JSONL, Parquet or Arrow file, or a folder of them, or several as `DataSource`s, whose samples
            follow one another.
        image_folder: `image` paths are relative to it and cannot leave it, unless a source has its own image folder;
            None if no row has images.
        processor: gives pixels, tokens and the number of tokens per image.
        template: a name from `TEMPLATES`, or a template.
        max_length: in tokens, images included; longer rows are truncated.
        on_error: for a row that breaks the format, whose numbers of images and marks differ, or with an image that is
            missing or unreadable: "raise", or "skip", which counts it. None raises only for a broken format.
        max_errors: how many broken rows are skipped (by this process and its workers) before the next one raises.
        seed: for the sources' sampling.
        cache: keep finished samples in memory, for small data sets and many epochs.
    Raises:
        FileNotFoundError: for a missing data file or image folder.
        ValueError: for a row that breaks the format (roles that do not alternate, a wrong number of turns for
            `plain`, an image outside of the folder), or that `on_error` and `max_errors` do not allow, naming the
            file and the row; or if no row can be used.
    """

    def __init__(
        self,
        data_path: str | os.PathLike | Sequence[DataSource],
        image_folder: str | os.PathLike | None,
        processor: LlavaProcessor,
        template: str | Template = "v1",
        max_length: int = 2048,
        *,
        on_error: Literal["raise", "skip"] | None = None,
        max_errors: int | None = None,
        seed: int = 0,
        cache: bool = False,
    ) -> None:
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(processor.tokenizer).__name__} has no character offsets, which labels are made from: "
                "use the fast version of this tokenizer"
            )
        if on_error not in (None, "raise", "skip"):
            raise ValueError(f"on_error is 'raise', 'skip' or None, not {on_error!r}")
        sources = [DataSource(Path(data_path))] if isinstance(data_path, (str, os.PathLike)) else list(data_path)
        if not sources:
            raise ValueError("a mixture needs at least one data file")
        default = None if image_folder is None else Path(image_folder)
        self.sources = [replace(source, image_folder=source.image_folder or default) for source in sources]
        self.processor = processor
        self.template = get_template(template)
        self.max_length = max_length
        self.on_error = on_error
        self.max_errors = max_errors
        self.problems: list[Problem] = []
        self._n_errors = 0
        self._n_image_tokens = processor.num_image_tokens()
        self._dtype = np.min_scalar_type(~max(processor.tokenizer.get_vocab().values()))  # int16 for Vicuna's tokens
        self._folders = [ImageFolder(source.image_folder) if source.image_folder else None for source in self.sources]
        self._cache: dict[int, dict[str, torch.Tensor]] | None = {} if cache else None

        check_spaces(processor)

        self._files = [open_source(source) for source in self.sources]
        chosen = choose_rows(self.sources, [len(rows) for rows in self._files], seed)
        distinct = [np.unique(numbers) for numbers in chosen]
        self._n_rows = sum(map(len, distinct))
        kept: list[_Kept] = []
        for source, numbers in enumerate(distinct):
            kept += self._scan(source, numbers)
            self._files[source].close()
        for folder in filter(None, self._folders):
            folder.forget_listings()
        self._warn()
        if not kept:
            first = str(self.problems[0]) if self.problems else "the file is empty"
            paths = ", ".join(str(source.path) for source in self.sources)
            raise NoRows(f"{paths}: none of {self._n_rows} rows can be used: {first}", self.problems)

        self._tokens = _Ragged([row.tokens for row in kept])
        self._names = _Ragged([np.frombuffer(row.name, np.uint8) for row in kept])
        self._places = np.array([(row.source, row.row) for row in kept], dtype=np.int64)
        self._cut = np.array([row.cut for row in kept], dtype=bool)
        # One flag per row, set by worker processes: an image of the row could not be read.
        self._unreadable = torch.zeros(len(kept), dtype=torch.uint8).share_memory_()
        # Samples are rows, in the order and with the repetitions that the sources give.
        at = {(row.source, row.row): i for i, row in enumerate(kept)}
        given = ((source, int(number)) for source, numbers in enumerate(chosen) for number in numbers)
        self._rows = np.array([at[place] for place in given if place in at], dtype=np.int64)
        self.lengths = [kept[i].length for i in self._rows]
        self.n_images = [kept[i].n_images for i in self._rows]

    # Reading rows

    def _reject(self, source: int, row: int, content: Any, left_out: _LeftOut) -> None:
        """Record a dropped row; raise if `on_error` or `max_errors` forbid dropping it."""
        line, reason = content.line if isinstance(content, BadRow) else None, left_out.reason
        path, number = self._files[source].where(row)
        problem = Problem(path, number, identity(content), reason, left_out.words, line)
        if reason in ERRORS:
            if self.on_error == "raise" or (self.on_error is None and reason == "malformed"):
                raise RowError(str(problem))
            self._n_errors += 1
            self._check_errors(problem)
        self.problems.append(problem)

    def _check_errors(self, latest: Problem, n_unreadable: int = 0) -> None:
        n_errors = self._n_errors + n_unreadable
        if self.max_errors is not None and n_errors > self.max_errors:
            raise RowError(f"{latest}; it is broken row {n_errors}, and max_errors is {self.max_errors}")

    def _warn(self) -> None:
        counts, examples = count_problems(self.problems)
        for reason, count in counts.items():
            _logger.warning("dropped %d rows: %s (such as %s)", count, reason, examples[reason][0])

    def _scan(self, source: int, numbers: np.ndarray) -> Iterator[_Kept]:
        """Check and tokenise rows of a source, in the order of the file; yields the usable ones."""
        batch: list[tuple[int, Any, list[Piece], list[str | None]]] = []
        rows = zip(numbers.tolist(), self._files[source].read(numbers.tolist()))
        bar = f"Reading {self.sources[source].path.name}"
        for row, content in tqdm(rows, bar, total=len(numbers), unit=" rows", delay=5):
            try:
                batch.append((row, content, *self._prompt(source, content)))
            except _LeftOut as left_out:
                self._reject(source, row, content, left_out)
            if len(batch) == _SCAN_ROWS:
                yield from self._tokenise(source, batch)
                batch = []
        yield from self._tokenise(source, batch)

    def _prompt(self, source: int, content: Any) -> tuple[list[Piece], list[str | None]]:
        """A row's prompt and image names (None: read them again from the file), after checks of form and files."""
        folder = self._folders[source]
        try:
            talk = parse_row(content)
            pieces = self._pieces(talk.turns, talk.system)
            if talk.context > 1:  # a prompt with answers in it, which are not supervised
                context = len(self._pieces(talk.turns[: talk.context], talk.system))
                pieces = [(text, supervised and i >= context) for i, (text, supervised) in enumerate(pieces)]
            files = [image for image in talk.images if isinstance(image, str) and not is_inline(image)]
            if folder is None and files:
                raise ValueError(f"image '{one_line(files[0])}' needs an image_folder")
            missing = [image for image in files if not (folder and folder.exists(image))]
        except (ValueError, OSError) as error:
            raise _LeftOut("malformed", one_line(error, 500)) from None
        marks = sum(text.count(IMAGE_MARK) for text, _ in pieces)
        if marks != len(talk.images):
            raise _LeftOut("image_count", f"{marks} {IMAGE_MARK} marks but {len(talk.images)} images")
        if missing:
            hint = " (URLs are not fetched)" if missing[0].startswith(("http://", "https://")) else ""
            raise _LeftOut("image_missing", f"no image file {one_line(missing[0])}{hint}")
        if not any(text for text, supervised in pieces if supervised):
            raise _LeftOut("fully_masked", "no answer")
        if marks * self._n_image_tokens > self.max_length:  # before tokenising: its time grows with marks times turns
            words = f"{marks} images of {self._n_image_tokens} tokens, and max_length {self.max_length}"
            words += " cuts off image tokens"
            raise _LeftOut("image_truncated", words)
        again = self._files[source].rereads
        return pieces, [
            image if isinstance(image, str) and not (again and is_inline(image)) else None for image in talk.images
        ]

    def _pieces(self, turns: list[str], system: str | None) -> list[Piece]:
        tokenizer = self.processor.tokenizer
        return self.template.pieces(turns, system, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "")

    def _tokenise(self, source: int, batch: list[tuple[int, Any, list[Piece], list[str | None]]]) -> Iterator[_Kept]:
        """Tokenise a batch of rows, and truncate them to max_length."""
        tokenised = tokenise([pieces for _, _, pieces, _ in batch], self.processor)
        for (row, content, _, images), tokens in zip(batch, tokenised):
            n_images = len(images)
            n_expanded = len(tokens) + n_images * (self._n_image_tokens - 1)
            try:
                tokens = self._shortened(tokens, n_images, n_expanded).astype(self._dtype)
            except _LeftOut as left_out:
                self._reject(source, row, content, left_out)
                continue
            length = min(n_expanded, self.max_length)
            yield _Kept(source, row, encode_name(content, images), tokens, length, n_images, length < n_expanded)

    def _shortened(self, tokens: np.ndarray, n_images: int, n_expanded: int) -> np.ndarray:
        """A row's tokens, truncated to max_length; `_LeftOut` if an image or every supervised token is cut off."""
        image = self.processor.image_token_id
        if np.count_nonzero((tokens == image) | (tokens == ~image)) != n_images:
            # The text contains the tokenizer's own image token, which is not <image>, or another spelling of it.
            words = f"text that is read as {self.processor.image_token} where no image is"
            raise _LeftOut("image_count", words)
        if n_expanded > self.max_length:
            tokens = tokens[: max(0, self.max_length - n_expanded + len(tokens))]
            if np.count_nonzero(tokens == ~image) < n_images:
                words = f"{n_expanded} tokens, and max_length {self.max_length} cuts off image tokens"
                raise _LeftOut("image_truncated", words)
            if (tokens[1:] < 0).all():
                words = f"{n_expanded} tokens, and no answer within max_length {self.max_length}"
                raise _LeftOut("fully_masked", words)
        return tokens

    # Properties of samples

    @property
    def modality(self) -> list[str]:
        """ "image" or "text" for each sample."""
        return ["image" if n else "text" for n in self.n_images]

    @property
    def report(self) -> Report:
        """Counts so far; the count of unreadable images grows as samples are loaded, in any worker process."""
        rows = np.unique(self._rows)
        unreadable = [self._problem(int(row), "") for row in rows[self._unreadable.numpy()[rows] > 0]]
        dropped, examples = count_problems(self.problems)
        if unreadable:
            examples["unreadable"] = [problem.where for problem in unreadable[:EXAMPLES]]
        return Report(
            rows=self._n_rows,
            samples=len(self),
            with_images=sum(n > 0 for n in self.n_images),
            truncated=int(self._cut[self._rows].sum()),
            unreadable=len(unreadable),
            dropped=dropped,
            examples=examples,
        )

    def unreadable(self, index: int, words: str) -> Problem:
        """The `Problem` for a sample with an unreadable image; `words` is the error message."""
        return self._problem(self._rows[index], words)

    def _problem(self, row: int, words: str) -> Problem:
        path, number = self._where(row)
        return Problem(path, number, identity(self._name(row)), "unreadable", words)

    def _where(self, row: int) -> tuple[Path, int]:
        source, number = self._places[row].tolist()
        return self._files[source].where(number)

    def __len__(self) -> int:
        return len(self._rows)

    def _name(self, row: int) -> dict[str, Any]:
        return json.loads(self._names[row].tobytes())

    def row(self, index: int) -> dict[str, Any]:
        """The `id` of the row that a sample comes from, and as `image` its image or a list: None if it is embedded."""
        return self._name(self._rows[index])

    def place(self, index: int) -> tuple[int, int]:
        """Where a sample comes from: the number of its source, and of the row in its file or folder."""
        source, row = self._places[self._rows[index]].tolist()
        return source, row

    def images(self, index: int) -> list[str | Embedded]:
        """Where a sample's images are: real paths of files, or places in the data file."""
        row = self._rows[index]
        folder, where = self._folders[self._places[row, 0]], self._where(row)
        return [
            folder.resolve(image) if folder and not is_inline(image) else Embedded(*where, i)
            for i, image in enumerate(self._image_names(row))
        ]

    def pixels(self, index: int, image: int) -> np.ndarray:
        """One of a sample's images as uint8 [H, W, 3]; ValueError if it cannot be read."""
        return self.processor.image_pixels(self._image_files(self._rows[index])[image])

    def _image_names(self, row: int) -> list[str | None]:
        images = self._name(row).get("image", [])
        return images if isinstance(images, list) else [images]

    def _image_files(self, row: int) -> list[Path | str | bytes]:
        """Real paths of a row's images, or their contents, which may be data: URLs."""
        source, number = self._places[row].tolist()
        images: Sequence[str | bytes | None] = self._image_names(row)
        if None in images:
            images = parse_row(self._files[source].row(number)).images
        return [self._image_file(self._folders[source], image) for image in images if image is not None]

    def _image_file(self, folder: ImageFolder | None, image: str | bytes) -> Path | str | bytes:
        if isinstance(image, bytes) or is_inline(image):
            return image
        if folder is None:
            raise ValueError(f"image '{one_line(image)}' needs an image_folder")
        return Path(folder.resolve(image))  # and no URL or base64, however long its name

    def split(self, fraction: float, seed: int = 0) -> tuple[LlavaDataset, LlavaDataset]:
        """Two datasets, of about 1 − `fraction` and `fraction` of the samples, in the order of the file.

        Samples that share their (first) image stay together, and so do a row's repetitions: no picture is in both.

        Raises:
            ValueError: if either dataset would be empty.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"a validation fraction lies between 0 and 1, not {fraction}")
        groups: dict[Any, list[int]] = {}
        for i, row in enumerate(self._rows.tolist()):
            groups.setdefault(self._first_image(row) if self.n_images[i] else row, []).append(i)
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

    def _first_image(self, row: int) -> Any:
        """A value that rows with the same first image share; the row, if its images cannot be read."""
        try:
            image = self._image_files(row)[0]
        except (OSError, ValueError):  # counted, or raised, when the sample is loaded
            return row
        contents = image.encode() if isinstance(image, str) else image
        return hashlib.sha256(contents).digest() if isinstance(contents, bytes) else contents

    def _subset(self, mask: np.ndarray) -> LlavaDataset:
        subset = copy(self)
        subset._rows = self._rows[mask]
        subset.lengths = [self.lengths[i] for i in np.flatnonzero(mask)]
        subset.n_images = [self.n_images[i] for i in np.flatnonzero(mask)]
        subset._cache = None if self._cache is None else {}
        return subset

    # Samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self))[index]  # negative indices, and IndexError past the end
        row = int(self._rows[index])
        if self._cache is not None and row in self._cache:
            return self._cache[row]
        candidates = (i % len(self) for i in range(index, index + len(self)))
        if self.n_images[index]:  # the substitute has images too, so that the sampler's groups stay valid
            candidates = (i for i in candidates if self.n_images[i])
        for candidate in islice(candidates, _MAX_SUBSTITUTES):
            substitute = int(self._rows[candidate])
            try:
                sample = self._load(substitute)
            except (OSError, ValueError) as error:
                failure = self._problem(substitute, one_line(error, 500))
                if self.on_error == "raise":
                    raise RowError(str(failure)) from error
                self._unreadable[substitute] = 1
                self._check_errors(failure, int(self._unreadable.sum()))
                _logger.warning("%s", failure)
                continue
            if self._cache is not None:
                self._cache[row] = sample
            return sample
        tried = f"no readable sample near row {self._places[row, 1]}; the last try: {failure.words}"
        raise RowError(f"{failure.path}: {tried}")

    def tokens(self, index: int) -> tuple[list[int], list[int]]:
        """A sample's token ids and labels; no image is read."""
        ids, labels = self._expanded(self._rows[index])
        return ids.tolist(), labels.tolist()

    def _expanded(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return expand(self._tokens[row], self.processor.image_token_id, self._n_image_tokens)

    def _load(self, row: int) -> dict[str, torch.Tensor]:
        ids, labels = self._expanded(row)
        images = self._image_files(row)
        pixels_nHWC = np.empty((len(images), *self.processor.image_size, 3), dtype=np.uint8)
        for i, image in enumerate(images):
            pixels_nHWC[i] = self.processor.image_pixels(image)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "pixel_values": torch.from_numpy(pixels_nHWC),
        }
