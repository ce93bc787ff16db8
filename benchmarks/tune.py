"""The tuner: times candidate tiles and writes the fastest to llava_fast/ops/tuned/*.json, for this GPU's architecture.

    python -m benchmarks.tune [--op norm] [--seconds 150] [--out DIR]

Each operation has `examples(device, dtype)`; those with candidate tiles are entries of its tile tables. The entries
with the largest share of an answer and of a training step come first (`share`). Their candidates are compiled by all
cores but two, in processes of their own, while earlier entries are timed; one that spills in any dtype or variant, or
needs more shared memory than the GPU has, is not timed. Each of the others must give the shipped tile's results. The
fastest replaces the shipped tile if it is at least 2 % faster. Entries for other architectures are unchanged.

With `--out`, the tables stay as they are: DIR/tuned.tar gets the new ones, and DIR/tuning.json all times, after each
entry; a second call with the same DIR goes on where the first ended, and DIR/results.json, if there, gives the shares.
In Triton's interpreter results are only compared, not compiled or timed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import TimeoutError as OutOfTime
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.compile_report import (
    DTYPES,
    SHARED_LIMIT,
    disassemble,
    examples_of,
    operation_modules,
    read_resources,
)
from benchmarks.prime import Workers, compiled, described
from benchmarks.records import CEILINGS, DEVICE, put_aside, sources, write_json
from llava_fast import backend
from llava_fast.ops import _launch
from llava_fast.ops._launch import Example, Tile, architecture, forced_tile, recorded, tile_table

WORTHWHILE = 0.98  # a new tile's time, as a share of the shipped one's


# ---- which entries come first

# A training step of LLaVA-1.5-7B, 5 samples of 832 tokens, and the tower's pass over their images.
_TOKENS, _PATCHES, _WIDTH, _MLP, _LAYERS = 5 * 832, 5 * 577, 4096, 11008, 32
_ATTENTION = _LAYERS * 2 * _WIDTH * 5 * 832 * 833 // 2  # operations of one product of queries and keys
_ROW, _PATCH = 2 * _TOKENS * _WIDTH, 2 * _PATCHES * 1024  # bytes of a tensor of all tokens, of all patches

# Kernel and key: operations and bytes of its launches in the step, and the benchmark that shows how near the kernel is
# to the floor.
STEP: dict[tuple[str, str], tuple[float, float, str, str]] = {
    ("attention_fwd", "128"): (2 * _ATTENTION, 0, "attention", "forward"),
    ("attention_bwd_dq", "128"): (3 * _ATTENTION, 0, "attention", "forward+backward"),
    ("attention_bwd_dkdv", "128"): (4 * _ATTENTION, 0, "attention", "forward+backward"),
    ("attention_fwd", "64"): (24 * 4 * 1024 * 5 * 577**2, 0, "attention_tower", "forward"),
    ("norm_fwd", "4096"): (0, (2 * _LAYERS + 1) * 4 * _ROW, "rms_norm", "forward"),
    ("norm_bwd", "4096"): (0, (2 * _LAYERS + 1) * 4 * _ROW, "rms_norm", "forward+backward"),
    ("norm_fwd", "1024"): (0, 24 * 2 * 4 * _PATCH, "layer_norm", "forward"),
    ("activation_fwd", "any"): (0, _LAYERS * 3 * 2 * _TOKENS * _MLP, "swiglu", "forward"),
    ("activation_bwd", "any"): (0, _LAYERS * 5 * 2 * _TOKENS * _MLP, "swiglu", "forward+backward"),
    ("rotary", "128"): (0, 2 * _LAYERS * 4 * _ROW, "rotary", "forward"),
    ("loss", "any"): (0, 3 * 2 * 1280 * 32000, "loss", "forward"),
    ("merge_fwd", "any"): (0, 2 * _ROW, "merge", "forward"),
    ("merge_bwd", "any"): (0, 2 * _ROW, "merge", "forward+backward"),
    ("patch_embed_fwd", "half_few"): (2 * _PATCHES * 588 * 1024, _PATCH, "patch_embed", "forward"),
    ("projector_bwd", "any"): (0, 3 * _ROW, "projector", "forward+backward"),
    # Answering: 256 new tokens after an image.
    ("decode_attention", "128"): (0, 256 * _LAYERS * 2 * 2 * 832 * _WIDTH, "decode_attention", "forward"),
    ("cache_write", "128"): (0, 256 * _LAYERS * 6 * 2 * _WIDTH, "cache_write", "forward"),
}


def share(kernel: str, key: int | str, records: Iterable[dict[str, Any]]) -> float:
    """Milliseconds of an entry in a step: the floor of its launches, over the measured share of the floor (or ½)."""
    if (kernel, str(key)) not in STEP:
        return 0.0
    flops, moved, op, direction = STEP[kernel, str(key)]
    reached = [
        r["pct_of_floor"] / 100
        for r in records
        if (r["op"], r["direction"], r["provider"]) == (op, direction, "triton") and r["pct_of_floor"]
    ]
    peak, bandwidth = CEILINGS["h100"]
    return 1e3 * max(flops / peak, moved / bandwidth) / (median(reached) if reached else 0.5)


@dataclass(frozen=True)
class Entry:
    """An entry of a tile table that has candidates, and the dtype that it is timed in."""

    op: str
    kernel: str
    key: str
    dtype: torch.dtype
    tiles: tuple[Tile, ...]


def entries(ops: Sequence[str], records: Iterable[dict[str, Any]] = ()) -> list[Entry]:
    """Those with the largest share of a step first; then bf16 before float32."""
    # The interpreter does not support tl.dot in bfloat16.
    dtypes = (torch.bfloat16, torch.float32) if DEVICE.type == "cuda" else (torch.float32, torch.float16)
    records, found = list(records), {}
    for dtype in dtypes:
        for op in ops:
            for example in examples_of(op, torch.device("meta"), dtype):
                if example.tiles:
                    entry = Entry(op, example.kernel, str(example.key), dtype, tuple(example.tiles))
                    found.setdefault((entry.kernel, entry.key), entry)
    return sorted(found.values(), key=lambda entry: -share(entry.kernel, entry.key, records))


def example_of(entry: Entry) -> Example:
    """Made when it is timed, since it holds its inputs."""
    for example in examples_of(entry.op, DEVICE, entry.dtype):
        if example.tiles and (example.kernel, str(example.key)) == (entry.kernel, entry.key):
            return example
    raise LookupError(f"{entry.op} has no example of {entry.kernel} {entry.key} on {DEVICE}")


# ---- which candidates are worth timing


def refused(op: str, kernel: str, key: str, tile: Tile, dtype: str, architecture: str) -> str:
    """Why a tile is not timed (it spills, or needs too much shared memory, in any variant), or an empty string.

    What it compiles is then in Triton's cache, under the key that a launch on the GPU looks for.
    """
    for example in examples_of(op, torch.device("meta"), DTYPES[dtype]):
        if (example.kernel, str(example.key)) != (kernel, key):
            continue
        with forced_tile(kernel, tile), recorded(dry=True, architecture=architecture) as launches:
            example.call()
        for launch in launches:
            result, _ = compiled(described(launch), architecture)
            found = read_resources(*disassemble(result.asm["cubin"]))
            if found["spill_bytes"] or found["spill_instructions"]:
                return f"spills {found['spill_bytes']} bytes in {dtype}"
            if result.metadata.shared > SHARED_LIMIT[architecture]:
                return f"needs {result.metadata.shared} bytes of shared memory in {dtype}"
    return ""


class Candidates:
    """Compiles the candidates of all entries, in their order, by all cores but two."""

    def __init__(self, listed: Sequence[Entry], architecture: str):
        self.pool = Workers(max(1, (os.cpu_count() or 1) - 2))
        self.futures = {
            (entry.kernel, entry.key): [
                [
                    self.pool.submit(refused, entry.op, entry.kernel, entry.key, dict(tile), dtype, architecture)
                    for dtype in DTYPES
                ]
                for tile in entry.tiles
            ]
            for entry in listed
        }

    def sound(self, entry: Entry, deadline: float) -> tuple[list[Tile], list[str]]:
        """The tiles to be timed; why the others are not. Those that are not compiled in time are others."""
        good, others = [], []
        for tile, futures in zip(entry.tiles, self.futures.pop((entry.kernel, entry.key)), strict=True):
            try:
                reasons = [future.result(max(0.0, deadline - time.monotonic())) for future in futures]
            except OutOfTime:
                reasons = ["not compiled in time"]
            except Exception as error:  # the compiler's
                reasons = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
            reason = next(filter(None, reasons), "")
            if reason:
                others.append(f"{describe(tile)}: {reason}")
            else:
                good.append(tile)
        return good, others

    def close(self) -> None:
        self.pool.close()


class AllSound:
    """In the interpreter nothing is compiled."""

    def sound(self, entry: Entry, deadline: float) -> tuple[list[Tile], list[str]]:
        return list(entry.tiles), []


# ---- timing


def tune(listed: Sequence[Entry], deadline: float, candidates: Any, tuning: Tuning) -> Iterator[str]:
    """Tune these entries in their order, and keep what is found; yields a line per entry."""
    for entry in listed:
        if time.monotonic() > deadline:
            yield f"out of time before {entry.kernel} {entry.key}; what is not measured stays"
            return
        tiles, others = candidates.sound(entry, deadline)
        example, shipped = example_of(entry), _launch.tile(entry.kernel, entry.key, DEVICE)
        good = verified(entry.kernel, example.call, shipped, tiles)
        name = f"{entry.kernel} {entry.key}"
        if DEVICE.type == "cpu":
            yield f"{name}: {len(good)} tiles agree; not timed, there is no GPU"
            continue
        usual = milliseconds(entry.kernel, example.call, shipped)
        times = [(milliseconds(entry.kernel, example.call, tile), tile) for tile in good]
        best_ms, best = min(times, key=lambda timed: timed[0], default=(usual, shipped))
        if best_ms > WORTHWHILE * usual:
            best_ms, best = usual, shipped
        tuning.add(
            {
                **{"kernel": entry.kernel, "key": entry.key, "dtype": str(entry.dtype).removeprefix("torch.")},
                **{"tile": best, "ms": best_ms, "shipped": shipped, "shipped_ms": usual},
                "timed": [{"tile": tile, "ms": ms} for ms, tile in sorted(times, key=lambda timed: timed[0])],
                "not_timed": others,
            }
        )
        now, before = (f"{describe(t)} {1e3 * ms:.1f} µs" for t, ms in ((best, best_ms), (shipped, usual)))
        yield f"{name}: {now}, before {before}; {len(good)} timed, {len(others)} not"


def verified(kernel: str, call: Any, shipped: Tile, tiles: Sequence[Tile]) -> list[Tile]:
    """The tiles that run here; `AssertionError` for one whose results differ from the shipped tile's."""
    from triton.runtime.errors import OutOfResources

    def results(tile: Tile) -> list[torch.Tensor]:
        with forced_tile(kernel, tile):
            found = call()
        return [t.double() for t in (found if isinstance(found, tuple) else (found,)) if t is not None]

    expected, good = results(shipped), []
    for tile in tiles:
        try:
            found = results(tile)
        except OutOfResources:
            continue
        for ours, theirs in zip(found, expected, strict=True):
            # Allows another order of summation and one rounding; a wrong tile has far larger errors.
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))
        good.append(tile)
    return good


def milliseconds(kernel: str, call: Any, tile: Tile) -> float:
    """Median time of the call, with a cold L2 cache."""
    from triton.testing import do_bench

    with forced_tile(kernel, tile):
        return do_bench(call, warmup=10, rep=40, return_mode="median")


# ---- the tables


class Tuning:
    """What was tuned: in the tables themselves, or with a folder in tuning.json and tuned.tar there.

    A tuning.json of another GPU or of other code, or a damaged one, is put aside: tuning.before.json.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
        self.content: dict[str, Any] = {"gpu": gpu, "code": sources(), "entries": []}
        if folder is not None and (folder / "tuning.json").exists():
            try:
                before = json.loads((folder / "tuning.json").read_text(encoding="utf-8"))
                same = all(before[name] == self.content[name] for name in ("gpu", "code"))
            except (ValueError, KeyError, TypeError):
                same = False
            if same:
                self.content = before
            else:
                put_aside(folder / "tuning.json")

    def done(self, entry: Entry) -> bool:
        return any((e["kernel"], e["key"]) == (entry.kernel, entry.key) for e in self.content["entries"])

    def add(self, found: dict[str, Any]) -> None:
        self.content["entries"].append(found)
        self.write_tables({found["kernel"]})

    def write_tables(self, kernels: set[str]) -> None:
        for kernel in sorted(kernels):
            tiles = {e["key"]: e["tile"] for e in self.content["entries"] if e["kernel"] == kernel}
            write_table(kernel, tiles)
        self.write()

    def write(self) -> None:
        """Write tuning.json and tuned.tar, each as a whole."""
        if self.folder is None:
            return
        write_json(self.folder / "tuning.json", self.content)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(_launch.TUNED, arcname="llava_fast/ops/tuned", filter=_only_tables)
        temporary = self.folder / ".tuned.tar"
        temporary.write_bytes(archive.getvalue())
        temporary.replace(self.folder / "tuned.tar")


def _only_tables(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return info if info.isdir() or info.name.endswith(".json") else None


def write_table(kernel: str, tiles: dict[str, Tile]) -> None:
    """Write tiles into this architecture's entry of the table, one per line, and record their source."""
    table = json.loads(json.dumps(tile_table(kernel)))
    entry = table[architecture(DEVICE)]
    source = f"tuned on {torch.cuda.get_device_name()}, {date.today()}"
    others = [key for key in entry["tiles"] if key not in tiles]
    if others:
        # What was written about the others before this run, without its own words.
        source += f"; {', '.join(others)}: {_sources.setdefault(kernel, entry['source'])}"
    entry["tiles"].update(tiles)
    entry["source"] = source
    path = _launch.TUNED / f"{kernel}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump_table(table))
    temporary.replace(path)
    _launch.forget_tiles()


_sources: dict[str, str] = {}


def dump_table(table: dict[str, Any]) -> str:
    """The table as JSON with one line per tile."""
    parts = []
    for name, entry in table.items():
        tiles = ",\n".join(f"   {json.dumps(key)}: {json.dumps(tile)}" for key, tile in entry["tiles"].items())
        source = json.dumps(entry["source"], ensure_ascii=False)
        parts.append(f' "{name}": {{\n  "source": {source},\n  "tiles": {{\n{tiles}\n  }}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def describe(tile: Tile) -> str:
    return "/".join(str(value) for value in tile.values())


@contextmanager
def own_tables() -> Iterator[None]:
    """Inside the block, the tables are a copy that is thrown away."""
    shipped = _launch.TUNED
    with tempfile.TemporaryDirectory() as folder:
        _launch.TUNED = Path(shutil.copytree(shipped, Path(folder) / "tuned"))
        _launch.forget_tiles()
        try:
            yield
        finally:
            _launch.TUNED = shipped
            _launch.forget_tiles()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=operation_modules(), help="only this operation file")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no entry after this long")
    parser.add_argument("--out", type=Path, help="write tuned.tar and tuning.json here, and leave the tables alone")
    arguments = parser.parse_args(argv)
    missing = backend.unavailable("triton")
    if missing:
        parser.error(missing)
    deadline = time.monotonic() + arguments.seconds
    records: list[dict[str, Any]] = []
    if arguments.out and (arguments.out / "results.json").exists():
        records = json.loads((arguments.out / "results.json").read_text(encoding="utf-8"))["records"]
    tuning = Tuning(arguments.out)
    listed = [entry for entry in entries(arguments.op or operation_modules(), records) if not tuning.done(entry)]
    with own_tables() if arguments.out else nullcontext():
        tuning.write_tables({entry["kernel"] for entry in tuning.content["entries"]})
        compiling: AbstractContextManager[Any] = nullcontext(AllSound())
        if DEVICE.type == "cuda":
            compiling = closing(Candidates(listed, architecture(DEVICE)))
        with compiling as candidates:
            for line in tune(listed, deadline, candidates, tuning):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
