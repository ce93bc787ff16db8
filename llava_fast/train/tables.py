"""Rows in Parquet and Arrow files, and in folders that the `datasets` library writes or loads.

Only the columns that `rows.py` knows are read. The scan of all rows leaves out the contents of images; a sample's row
is read again when the sample is loaded. So memory holds a few rows at a time, and no other files are written: Arrow
files are mapped into memory, Parquet files are read forward within a row group. Loading a sample with an embedded image
from Parquet therefore takes as long as decoding up to one row group: 100 rows in what `datasets` writes, up to a
million in what other programs write.

Files are not trusted: nothing in them is executed or unpickled, no URL is opened, and errors name file and row.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from llava_fast.errors import one_line
from llava_fast.train.rows import BadRow, JsonFile

COLUMNS = ("id", "image", "images", "conversations", "messages", "prompt", "completion")
SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")
MAX_ROWS = 2**27  # of a file; rows of nulls take no space in it
MAX_ITEMS = 1_000_000  # of a row's lists; lists of nulls or empty objects take no space in a file

_BATCH_BYTES = 2**28  # of a Parquet file, at a time
_COPIED_BYTES = 2**28  # of an Arrow file that is compressed and so cannot be mapped
_SETTINGS = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_SPLITS = {
    "train": "train training",
    "validation": "validation valid dev val",
    "test": "test testing eval evaluation",
}


def open_table(path: Path, split: str | None) -> ParquetFile | ArrowFile | Folder:
    """Open a Parquet file, an Arrow file, or a folder of data files.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a file that cannot be read, or a split that is not there.
    """
    if path.is_dir():
        return Folder(path, split)
    if not path.is_file():
        raise FileNotFoundError(f"no data file {one_line(path)}")
    return ArrowFile(path) if path.suffix == ".arrow" else ParquetFile(path)


class Folder:
    """The data files of one split of a folder, one after the other.

    `split` None is "train", or the only split.
    """

    def __init__(self, path: Path, split: str | None) -> None:
        files = data_files(path, split)
        self._files: list[Any] = [
            JsonFile(file) if file.suffix in (".json", ".jsonl") else open_table(file, None) for file in files
        ]
        self._starts = list(accumulate(map(len, self._files), initial=0))  # and the number of all rows
        self.rereads = all(file.rereads for file in self._files)

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, number: int) -> tuple[int, int]:
        """The file that has a row, and the row's number in it."""
        file = bisect_right(self._starts, number) - 1
        return file, number - self._starts[file]

    def read(self, numbers: Sequence[int]) -> Iterator[Any]:
        """Rows in ascending order."""
        for file, start, end in zip(self._files, self._starts, self._starts[1:]):
            mine = numbers[bisect_left(numbers, start) : bisect_left(numbers, end)]
            yield from file.read([number - start for number in mine])
            file.close()

    def row(self, number: int) -> Any:
        file, number = self._at(number)
        return self._files[file].row(number)

    def where(self, number: int) -> tuple[Path, int]:
        file, number = self._at(number)
        return self._files[file].where(number)

    def close(self) -> None:
        """Nothing: each file is closed after it has been read."""


def data_files(path: Path, split: str | None) -> list[Path]:
    """The data files of a folder's split, sorted, found as `datasets` does; ValueError if there are none."""
    found = splits(path)
    if not found:
        raise ValueError(f"{path}: no data files ({', '.join(SUFFIXES)}) in this folder")
    if split is None:
        split = "train" if "train" in found or len(found) > 1 else next(iter(found))
    if split not in found:
        raise ValueError(f"{path}: no split '{one_line(split, 40)}'; there are {', '.join(sorted(found))}")
    return sorted(found[split])


def splits(path: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split; all are "train" if nothing names a split."""
    if (path / "state.json").is_file():  # written by Dataset.save_to_disk; `cache-*.arrow` beside it are no data
        return {"train": _saved_files(path)}
    if (path / "dataset_dict.json").is_file():  # by DatasetDict.save_to_disk
        return {part.parent.name: splits(part.parent)["train"] for part in sorted(path.glob("*/state.json"))}
    files = {}
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            if name.endswith(SUFFIXES) and name not in _SETTINGS and not name.startswith("."):
                files[Path(folder, name)] = Path(folder, name).relative_to(path)
    # The layouts of `datasets.load_dataset`: shards of a named split, splits as folders, splits in file names.
    for split_of in (_shard_of, lambda file: _split_in(file.parts[:-1]), lambda file: _split_in([file.stem])):
        groups: dict[str, list[Path]] = {}
        for file, relative in files.items():
            if split := split_of(relative):
                groups.setdefault(split, []).append(file)
        if groups:
            return groups
    return {"train": list(files)} if files else {}


def _saved_files(path: Path) -> list[Path]:
    """The files that `Dataset.save_to_disk` lists; those of an earlier one may lie beside them."""
    state = path / "state.json"
    try:
        names = [file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        if any(Path(name).name != name or not name.endswith(".arrow") for name in names):
            raise ValueError("a file that is no .arrow file in this folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{state}: no list of '_data_files' by the datasets library ({one_line(error)})") from None
    return [path / name for name in names]


def _shard_of(file: Path) -> str | None:
    match = re.fullmatch(r"(?:.*/)?data/([^/]+)-\d{5}-of-\d{5}[^/]*", file.as_posix())
    return match[1] if match else None


def _split_in(names: Sequence[str]) -> str | None:
    words = {word for name in names for word in re.split(r"[-._ 0-9]+", name)}
    return next((split for split, keywords in _SPLITS.items() if words & set(keywords.split())), None)


class _Table(ABC):
    """A file of columns; a row is a dict of those in `COLUMNS`."""

    rereads = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        with self._blaming():
            self._open()
            if len(self) > MAX_ROWS:
                raise ValueError(f"{len(self)} rows are more than the limit of {MAX_ROWS}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _batch(self, number: int, scan: bool) -> tuple[pa.RecordBatch, int]:
        """Some rows that include this one, and its place in them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @contextmanager
    def _blaming(self, row: int | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # pyarrow raises OSError, ValueError, KeyError, NotImplementedError ...
            where = "" if row is None else f", row {row}"
            kind = type(self).__name__.removesuffix("File")
            raise ValueError(f"{self.path}{where}: not readable as {kind} ({one_line(error, 300)})") from error

    def read(self, numbers: Sequence[int]) -> Iterator[Any]:
        """Rows in ascending order, without the contents of images (`b""`)."""
        for number in numbers:
            with self._blaming(number):
                batch, at = self._batch(number, scan=True)
            try:
                room = [MAX_ITEMS]
                yield {name: _plain(batch.column(name)[at], room) for name in batch.schema.names}
            except Exception as error:
                yield BadRow(f"cannot be read: {one_line(error, 300)}")

    def row(self, number: int) -> dict[str, Any]:
        """A whole row, with the contents of its images."""
        with self._lock, self._blaming(number):
            batch, at = self._batch(number, scan=False)
            return {name: batch.column(name)[at].as_py() for name in batch.schema.names}

    def where(self, number: int) -> tuple[Path, int]:
        return self.path, number

    def close(self) -> None:  # noqa: B027
        """Nothing: what is open is needed to load samples."""


class ArrowFile(_Table):
    """Arrow's IPC file or stream, mapped into memory; `datasets` writes streams."""

    def _open(self) -> None:
        mapped = pa.memory_map(str(self.path))
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
        names = _known(reader.schema)
        before = pa.total_allocated_bytes()
        self._batches: list[pa.RecordBatch] = []
        for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader:
            self._batches.append(batch.select(names))
            if pa.total_allocated_bytes() - before > _COPIED_BYTES:
                raise ValueError("compressed, and too large to be kept in memory; write it without compression")
        self._ends = list(accumulate(map(len, self._batches)))
        self._valid: set[int] = set()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _batch(self, number: int, scan: bool) -> tuple[pa.RecordBatch, int]:
        i = bisect_right(self._ends, number)
        if i not in self._valid:  # offsets are within their buffers, texts are UTF-8
            self._batches[i].validate(full=True)
            self._valid.add(i)
        return self._batches[i], number - self._ends[i] + len(self._batches[i])


class ParquetFile(_Table):
    """A Parquet file, read forward within a row group."""

    def _open(self) -> None:
        file = pq.ParquetFile(self.path, pre_buffer=False)
        names = _known(file.schema_arrow)
        leaves = [file.schema.column(i).path for i in range(len(file.schema.names))]
        leaves = [leaf for leaf in leaves if leaf.partition(".")[0] in names]
        contents = {leaf for leaf in leaves if leaf.endswith(".bytes") and leaf[:-5] + "path" in leaves}
        self._cursors = [
            _Cursor(file, leaves, 64),
            _Cursor(file, [leaf for leaf in leaves if leaf not in contents], 1024),
        ]
        self._n_rows = file.metadata.num_rows

    def __len__(self) -> int:
        return self._n_rows

    def _batch(self, number: int, scan: bool) -> tuple[pa.RecordBatch, int]:
        return self._cursors[scan].batch(number)


class _Cursor:
    """Reads some columns of a Parquet file forward, in batches of up to `size` rows."""

    def __init__(self, file: pq.ParquetFile, leaves: list[str], size: int) -> None:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        self._file, self._leaves, self._size = file, leaves, size
        self._ends = list(accumulate(group.num_rows for group in groups))
        self._group, self._start = -1, 0
        self._batch: pa.RecordBatch | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def batch(self, number: int) -> tuple[pa.RecordBatch, int]:
        group = bisect_right(self._ends, number)
        if group != self._group or number < self._start:
            metadata = self._file.metadata.row_group(group)
            self._group, self._start, self._batch = group, self._ends[group] - metadata.num_rows, None
            # A dictionary may repeat a text that is as large as the whole column: of a large one, few rows at a time.
            columns = (metadata.column(i) for i in range(metadata.num_columns))
            n_bytes = sum(c.total_uncompressed_size for c in columns if c.path_in_schema in self._leaves)
            size = min(self._size, max(4, _BATCH_BYTES // max(1, n_bytes)))
            self._batches = self._file.iter_batches(size, [group], self._leaves, use_threads=False)
        while self._batch is None or number >= self._start + len(self._batch):
            self._start += 0 if self._batch is None else len(self._batch)
            self._batch = next(self._batches, None)
            if self._batch is None:
                self._group = -1
                raise ValueError(f"row group {group} ends before this row")
        return self._batch, number - self._start


def _known(schema: pa.Schema) -> list[str]:
    """The columns that are read; ValueError for extension types: other code makes their values."""
    names = [name for name in COLUMNS if name in schema.names]
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("two columns of one name")
    for name in names:
        field = schema.field(name)
        if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
            raise ValueError(f"column {name!r} has an extension type")
    return names


def _plain(value: pa.Scalar, room: list[int]) -> Any:
    """A value as Python's, with `b""` for the contents of images; `room` is how many items it may still have."""
    if not value.is_valid:
        return None
    if isinstance(value, pa.StructScalar):
        fields = {key: _plain(item, room) for key, item in value.items()}
        return {"bytes": b"", **fields} if "path" in fields else fields
    if isinstance(value, pa.ListScalar):
        room[0] -= len(value)
        if room[0] < 0:
            raise ValueError(f"more than {MAX_ITEMS} items in lists")
        return [_plain(item, room) for item in value]
    if isinstance(value, pa.BinaryScalar) and not isinstance(value, pa.StringScalar):
        return b""
    if isinstance(value, (pa.DictionaryScalar, pa.RunEndEncodedScalar, pa.UnionScalar, pa.ExtensionScalar)):
        return _plain(value.value, room)
    return value.as_py()
