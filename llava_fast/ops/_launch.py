"""`launch`, the only way to launch a Triton kernel here, so that launches can be counted, recorded and tuned.

`recorded()` lists the launches inside a block: tests use it to assert that a kernel really ran. With `dry=True`
nothing runs; the compile report compiles the recorded launches for other architectures, without a GPU.

Tiles (block sizes, warps, stages) are data: `tuned/<kernel>.json` holds, per architecture and key, the tile that ships.

    {"sm_80": {"source": "…", "tiles": {"1024": {"BLOCK_R": 4, "num_warps": 4, "num_stages": 1}, …}}, "sm_90": …}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TUNED = Path(__file__).parent / "tuned"
ARCHITECTURES = ("sm_80", "sm_90")

Tile = Mapping[str, int]


@dataclass(frozen=True)
class Example:
    """A call of an operation that launches `kernel` with the tile of `key`, both named as in `tuned/<kernel>.json`.

    Each operation's `examples(device, dtype)` yields them; together they launch its kernels in all variants, with
    every tile that ships. The compile report runs all of them dry, with tensors on "meta". The tuner times those with
    candidate tiles on a GPU; on a CPU it only compares their results, with small sizes.
    """

    kernel: str
    key: int | str
    call: Callable[[], Any]
    tiles: Sequence[Tile] = ()


class Launch(NamedTuple):
    """One kernel launch: positional arguments, constexprs by name, and Triton's options (num_warps, num_stages)."""

    kernel: Any
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


_records: list[list[Launch]] = []
_dry = False
_architecture: str | None = None
_forced: dict[str, Tile] = {}


@contextmanager
def recorded(*, dry: bool = False, architecture: str | None = None) -> Iterator[list[Launch]]:
    """Record the launches inside the block; with `dry` run nothing, as if on a GPU of `architecture`."""
    global _dry, _architecture
    before = (_dry, _architecture)
    record: list[Launch] = []
    _dry, _architecture = dry or _dry, architecture or _architecture
    _records.append(record)
    try:
        yield record
    finally:
        # By identity: the record of a surrounding block may be equal.
        _records[:] = [other for other in _records if other is not record]
        _dry, _architecture = before


@contextmanager
def forced_tile(kernel: str, tile: Tile) -> Iterator[None]:
    """Use `tile` for a kernel instead of the table's; the tuner tries its candidates with it."""
    before = _forced.get(kernel)
    _forced[kernel] = tile
    try:
        yield
    finally:
        del _forced[kernel]
        if before is not None:
            _forced[kernel] = before


def launch(kernel: Any, grid: Callable | tuple[int, ...], *args: Any, tile: Tile, **constexprs: Any) -> None:
    """Launch `kernel[grid](*args)` with the block sizes, warps and stages of `tile` and further constexprs.

    It runs on the device of the first argument, a tensor.
    """
    options = {"num_stages": 1, **tile, **constexprs}
    if _records:
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        for record in _records:
            record.append(Launch(kernel, args, options, warps, stages))
        options = {**options, "num_warps": warps, "num_stages": stages}
    if not _dry:
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            kernel[grid](*args, **options)


def architecture(device: torch.device) -> str:
    """The architecture whose tiles are used on `device`: sm_90 from compute capability 9 on, else sm_80."""
    return _architecture or _architecture_of(device)


@cache
def _architecture_of(device: torch.device) -> str:
    return "sm_90" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9 else "sm_80"


def unwritten(x: torch.Tensor) -> torch.Tensor:
    """Memory for a contiguous tensor of the shape and dtype of `x`. `empty` with these arguments takes four times as
    long, as would a view of `x` as rows."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """`x`, or a copy, to be read as [R, D] with a contiguous last dimension; R; and the stride of its rows."""
    width = x.shape[-1]
    if width and x.is_contiguous():
        return x, x.numel() // width, width
    rows = as_rows(x)
    return rows, rows.shape[0], rows.stride(0)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[R, D] with a contiguous last dimension; a view wherever the strides allow."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@cache
def tile_table(kernel: str) -> dict[str, dict[str, Any]]:
    """The shipped tiles of a kernel, by architecture."""
    return json.loads((TUNED / f"{kernel}.json").read_text())


def tile(kernel: str, key: int | str, device: torch.device) -> Tile:
    """The shipped tile for `key`, the property that the best tile depends on, such as the power of two ≥ the width."""
    if kernel in _forced:
        return _forced[kernel]
    return _shipped(kernel, key, architecture(device))


@cache
def _shipped(kernel: str, key: int | str, architecture: str) -> Tile:
    return tile_table(kernel)[architecture]["tiles"][str(key)]


def forget_tiles() -> None:
    """Read the tables again at the next launch, since one was written."""
    tile_table.cache_clear()
    _shipped.cache_clear()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors, for the grid of persistent kernels. A small number on a CPU; on "meta" that of a GPU
    of the recorded architecture."""
    if device.type == "cuda":
        return _multiprocessors(device)
    return {"sm_80": 108, "sm_90": 132}[architecture(device)] if device.type == "meta" else 4
