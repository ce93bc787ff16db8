"""Weight files, safetensors or `.bin`, one file or shards with an index: read and written tensor by tensor.

A checkpoint is opened as a dict of `Stored`, which know shape and dtype, and read their values on request. Files are
not trusted: a wrong header, an index that points outside of its folder, a missing shard, and a pickle that contains
code are errors of one line that name the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llava_fast.errors import one_line

# In transformers' search order.
WEIGHT_FILES = (
    "{}.safetensors",
    "{}.safetensors.index.json",
    "{}.bin",
    "{}.bin.index.json",
)
# Names of dtypes in a safetensors header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor on disk, or computed from one on disk; every `read()` reads it again."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    origin: str  # file and key, for messages

    def to(self, dtype: torch.dtype | None) -> Stored:
        """The same in another floating dtype; unchanged for integer tensors, or if `dtype` is None."""
        if dtype in (None, self.dtype) or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))

    def rows(self, count: int) -> Stored:
        """The first `count` rows of a matrix; additional rows are the mean of the existing ones.

        The mean is a neutral start for new embeddings; in a head it makes a new token's logit the mean of the old
        logits, which is never the largest.
        """
        have = self.shape[0]
        if count == have:
            return self

        def read() -> torch.Tensor:
            old = self.read()
            if count < have:
                return old[:count].clone()
            new = old.new_empty(count, *old.shape[1:])
            new[:have] = old
            total = sum(chunk.double().sum(0) for chunk in old.split(4096))
            new[have:] = (total / have).to(old.dtype)
            return new

        return replace(self, shape=(count, *self.shape[1:]), read=read)

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def in_memory(tensor: torch.Tensor, origin: str) -> Stored:
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor, origin)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not text, not JSON, or a number with too many digits
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, expected an object")
    return value


def find_weights(folder: Path, stem: str = "model") -> Path | None:
    """The weight file or index in `folder`; None when there is none."""
    stems = {"model": ("model", "model", "pytorch_model", "pytorch_model")}.get(stem, (stem,) * 4)
    files = (folder / pattern.format(name) for pattern, name in zip(WEIGHT_FILES, stems))
    return next((file for file in files if file.is_file()), None)


def open_weights(path: Path, stem: str = "model") -> dict[str, Stored]:
    """The tensors of a checkpoint folder, of one weight file, or of an index, by name; nothing is read yet.

    A `.bin` file is memory-mapped if its format allows (PyTorch ≥ 1.6), and otherwise read completely.

    Raises:
        FileNotFoundError: if there are no weights, or a shard is missing.
        ValueError: if a file is damaged, contains code, or contradicts its index.
    """
    file = find_weights(path, stem) if path.is_dir() else path
    if file is None:
        raise FileNotFoundError(f"{path} has no weights ({stem}.safetensors, {stem}.bin, or shards with an index)")
    if not file.name.endswith(".index.json"):
        return _open_file(file)
    shards = _shards(file)
    weights: dict[str, Stored] = {}
    for shard, listed in shards.items():
        found = _open_file(file.parent / shard)
        if missing := sorted(listed - found.keys()):
            raise ValueError(f"{file.parent / shard} lacks {missing[0]}, which {file.name} says is there")
        for key in listed:
            weights[key] = found[key]
    return weights


def _shards(index: Path) -> dict[str, set[str]]:
    """Keys per file, from an index; checks that every file is a plain name in the index's folder, and exists."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{index} has no weight_map")
    shards: dict[str, set[str]] = {}
    for key, name in entries.items():
        if not key.isprintable():
            raise ValueError(f"{index}: '{one_line(key)}' cannot be the name of a tensor")
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
            raise ValueError(f"{index}: {key} is said to be in {name!r}, which is not a file of this folder")
        if not name.endswith((".safetensors", ".bin")):
            raise ValueError(f"{index}: {key} is said to be in {name!r}, which is no weight file")
        shards.setdefault(name, set()).add(key)
    for name in shards:
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} is missing, but {index.name} lists it")
    return shards


def _open_file(file: Path) -> dict[str, Stored]:
    weights = _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file)
    for key in weights:
        if not key.isprintable():  # keys are printed in messages: no control characters
            raise ValueError(f"{file}: '{one_line(key)}' cannot be the name of a tensor")
    return weights


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {one_line(error)}") from None


def _read_entry(file: Path, key: str) -> torch.Tensor:
    # Opened again for each tensor, because mapped pages of an open file stay in memory until it is closed.
    with _opened(file) as opened:
        return opened.get_tensor(key)


def _open_safetensors(file: Path) -> dict[str, Stored]:
    weights = {}
    with _opened(file) as opened:
        for key in opened.keys():
            entry = opened.get_slice(key)
            kind = entry.get_dtype()
            if kind not in DTYPES:
                raise ValueError(f"{file}: {key} has dtype {kind}, which is not one of {', '.join(DTYPES)}")
            weights[key] = Stored(
                tuple(entry.get_shape()), DTYPES[kind], partial(_read_entry, file, key), f"{file}: {key}"
            )
    return weights


def _open_bin(file: Path) -> dict[str, Stored]:
    weights = {}
    for key, tensor in load_bin(file).items():
        if tensor.dtype not in _HEADER_NAMES:
            raise ValueError(f"{file}: {key} has dtype {tensor.dtype}, which is not one of {', '.join(DTYPES)}")
        weights[key] = replace(in_memory(tensor, f"{file}: {key}"), read=tensor.detach)
    return weights


def load_bin(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file written by `torch.save`, memory-mapped if possible; code in it is never run."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        # PyTorch's own message recommends loading with weights_only=False, which would run the code.
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{file} holds code ({named[1]}) beside its tensors, and is not loaded") from None
        raise ValueError(f"{file} is not a PyTorch file of tensors alone") from None
    except OSError:
        raise
    except Exception as error:  # invalid pickles raise arbitrary exceptions
        raise ValueError(f"{file} is not a whole PyTorch file: {one_line(error) or type(error).__name__}") from None
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in found.items()
    ):
        raise ValueError(f"{file} is not a dict of tensors by name")
    return found


def parse_size(size: int | str) -> int:
    """Bytes from a number, or from text like "5GB" or "512MiB".

    Raises:
        ValueError: for anything else.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    text = str(size).strip().upper()
    number = text.rstrip("BIKMG ")
    unit = text[len(number) :].strip()
    if not number.replace(".", "", 1).isdecimal() or unit not in units or not 1 <= float(number) * units[unit] < 2**63:
        raise ValueError(f"max_shard_size is {size!r}; expected a size such as 5GB or 512MB")
    return int(float(number) * units[unit])


def write_weights(folder: Path, weights: Mapping[str, Stored], max_shard_bytes: int) -> dict[str, str]:
    """Write safetensors into `folder`, one file or shards with an index, holding one tensor in memory at a time.

    Returns:
        the SHA-256 of each tensor's bytes.

    Raises:
        OSError: naming the file, if it cannot be written; the caller removes files that were already written.
    """
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for key, stored in weights.items():
        if shards[-1] and stored.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(key)
        room -= stored.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    digests: dict[str, str] = {}
    for name, keys in zip(names, shards):
        digests |= _write_safetensors(folder / name, {key: weights[key] for key in keys})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(stored.nbytes for stored in weights.values())},
            "weight_map": {key: name for name, keys in zip(names, shards) for key in keys},
        }
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    return digests


def _write_safetensors(file: Path, weights: Mapping[str, Stored]) -> dict[str, str]:
    # Sorted by itemsize, largest first, so that every tensor starts at a multiple of its itemsize.
    ordered = sorted(weights.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, stored in ordered:
        start, end = end, end + stored.nbytes
        header[key] = {
            "dtype": _HEADER_NAMES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(head).to_bytes(8, "little") + head
        for key, stored in ordered:
            data = tensor_bytes(stored)
            digests[key] = hashlib.sha256(data).hexdigest()
            yield data

    digests: dict[str, str] = {}
    write_bytes(file, chunks())
    return digests


def tensor_bytes(stored: Stored) -> memoryview:
    """The values of a tensor, row by row, as bytes.

    Raises:
        ValueError: if its shape or dtype differ from those of `stored`.
    """
    tensor = stored.read()
    if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
        raise ValueError(
            f"{stored.origin} is {list(tensor.shape)} {tensor.dtype}, expected {list(stored.shape)} {stored.dtype}"
        )
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def sync_entry(path: Path) -> None:
    """fsync a file, or a directory, so that files created or renamed in it are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(file: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file and fsync it; an error names the file."""
    try:
        with open(file, "wb") as opened:
            for chunk in chunks:
                opened.write(chunk)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(file)) from error


def write_text(file: Path, text: str) -> None:
    write_bytes(file, [text.encode()])


def verify(folder: Path, weights: Mapping[str, Stored], digests: Mapping[str, str]) -> None:
    """Read the files of `write_weights` back and compare.

    Raises:
        ValueError: if keys, shapes, dtypes or bytes differ from those that were written.
    """
    written = open_weights(folder)
    if written.keys() != weights.keys():
        raise ValueError(f"{folder}: {sorted(written.keys() ^ weights.keys())[0]} is not as it was written")
    for key, stored in written.items():
        same = (stored.shape, stored.dtype) == (weights[key].shape, weights[key].dtype)
        if not same or hashlib.sha256(tensor_bytes(stored)).hexdigest() != digests[key]:
            raise ValueError(f"{stored.origin} does not read back as it was written; is the disk sound?")
