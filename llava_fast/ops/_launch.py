"""Every Triton kernel of this library is launched from here, so that launches can be counted, captured and tuned.

`recorded()` lists what was launched inside a block: tests assert with it that a kernel really ran. With `dry=True`
nothing runs, and the records are what the compile report builds for other architectures, without a GPU.

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
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"
ARCHITECTURES = ("sm_80", "sm_90")

Tile = Mapping[str, int]


@dataclass(frozen=True)
class Example:
    """A call of an operation that launches `kernel` with the tile of `key`, as `tuned/<kernel>.json` names both.

    Each operation's `examples(device, dtype)` yields them: between them they launch its kernels in all variants, with
    every tile that ships. The compile report runs all of them dry, with tensors on "meta"; the tuner times those that
    have tiles worth trying, on a GPU, or on a CPU in small compares their results.
    """

    kernel: str
    key: int | str
    call: Callable[[], Any]
    tiles: Sequence[Tile] = ()


@dataclass(frozen=True)
class Launch:
    """One kernel launch: positional arguments, then constexprs by name, then what Triton calls options."""

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
    """List the launches inside the block; with `dry` only list them, as if on a GPU of `architecture`."""
    global _dry, _architecture
    before = (_dry, _architecture)
    record: list[Launch] = []
    _dry, _architecture = dry or _dry, architecture or _architecture
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)
        _dry, _architecture = before


@contextmanager
def forced_tile(kernel: str, tile: Tile) -> Iterator[None]:
    """Use `tile` for a kernel whatever the table says: how the tuner tries its candidates."""
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
    blocks = {name: value for name, value in tile.items() if name not in ("num_warps", "num_stages")}
    constexprs = {**blocks, **constexprs}
    call = Launch(kernel, args, constexprs, tile["num_warps"], tile.get("num_stages", 1))
    for record in _records:
        record.append(call)
    if not _dry:
        with torch.cuda.device_of(args[0]):  # Triton's own choice is the current device
            kernel[grid](*args, **constexprs, num_warps=call.num_warps, num_stages=call.num_stages)


def architecture(device: torch.device) -> str:
    """The architecture whose tiles are used on `device`: sm_90 from compute capability 9 on, else sm_80."""
    if _architecture is not None:
        return _architecture
    return "sm_90" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9 else "sm_80"


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[R, D] with a contiguous last dimension; a view wherever the strides allow."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@cache
def tile_table(kernel: str) -> dict[str, dict[str, Any]]:
    """The shipped tiles of a kernel, by architecture."""
    return json.loads((TUNED / f"{kernel}.json").read_text())


def tile(kernel: str, key: int | str, device: torch.device) -> Tile:
    """The shipped tile for `key` (what decides the best tile, such as the power of two ≥ the width)."""
    if kernel in _forced:
        return _forced[kernel]
    tiles = tile_table(kernel)[architecture(device)]["tiles"]
    return tiles[str(key)]


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors: how many programs a persistent kernel should have. On a CPU few, on "meta" as many as
    a GPU of the architecture has."""
    if device.type == "cuda":
        return _multiprocessors(device)
    return {"sm_80": 108, "sm_90": 132}[architecture(device)] if device.type == "meta" else 4
