"""The tuner: times candidate tiles and writes the fastest to llava_fast/ops/tuned/*.json, for this GPU's architecture.

    python -m benchmarks.tune [--op norm] [--seconds 150]

Each operation has `examples(device, dtype)`; those with candidate tiles are entries of its tile tables. Each candidate
must give the shipped tile's results. The fastest one that does not spill in any dtype replaces the shipped tile if it
is at least 2 % faster. bf16 entries of all operations are tuned first, then float32. Entries for other architectures
are unchanged. In Triton's interpreter results are only compared, not timed, and the tables are unchanged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import torch

from benchmarks.compile_report import DTYPES, SHARED_LIMIT, compile_launch, examples_of, operation_modules
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.ops import _launch
from llava_fast.ops._launch import Example, Tile, architecture, forced_tile, recorded, tile_table

WORTHWHILE = 0.98  # a new tile's time, as a share of the shipped one's


def tune(ops: Sequence[str], deadline: float) -> Iterator[str]:
    """Tune these operations, and write their tables; yields a line per entry."""
    # The interpreter does not support tl.dot in bfloat16.
    dtypes = (torch.bfloat16, torch.float32) if DEVICE.type == "cuda" else (torch.float32, torch.float16)
    chosen: dict[str, dict[str, Tile]] = {}
    sources: dict[str, str] = {}
    for dtype, op in itertools.product(dtypes, ops):
        changed = set()
        for example in examples_of(op, DEVICE, dtype):
            kernel, key = example.kernel, str(example.key)
            if not example.tiles or key in chosen.setdefault(kernel, {}):
                continue
            if time.monotonic() > deadline:
                yield f"{op}: out of time before {kernel} {key}; what is not measured stays"
                break
            chosen[kernel][key], line = _tuned(op, example)
            changed.add(kernel)
            yield line
        for kernel in changed if DEVICE.type == "cuda" else ():
            source = sources.setdefault(kernel, tile_table(kernel)[architecture(DEVICE)]["source"])
            write_table(kernel, chosen[kernel], source)


def _tuned(op: str, example: Example) -> tuple[Tile, str]:
    """The tile to ship, and a line of text about it."""
    kernel, key = example.kernel, example.key
    shipped = _launch.tile(kernel, key, DEVICE)
    good = verified(kernel, example.call, shipped, example.tiles)
    if DEVICE.type == "cpu":
        return shipped, f"{kernel} {key}: {len(good)} tiles agree; not timed, there is no GPU"
    times = sorted(((milliseconds(kernel, example.call, tile), i) for i, tile in enumerate(good)))
    usual = milliseconds(kernel, example.call, shipped)
    best, best_ms = shipped, usual
    for ms, i in times:
        if ms > WORTHWHILE * usual:
            break
        if not wasteful(op, kernel, key, good[i]):
            best, best_ms = good[i], ms
            break
    now, before = (f"{describe(t)} {1e3 * ms:.1f} µs" for t, ms in ((best, best_ms), (shipped, usual)))
    return best, f"{kernel} {key}: {now}, before {before}"


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


def wasteful(op: str, kernel: str, key: int | str, tile: Tile) -> bool:
    """Whether this tile spills in any dtype or variant, or needs more shared memory than the GPU has."""
    here = architecture(DEVICE)
    for dtype in DTYPES.values():
        for example in examples_of(op, torch.device("meta"), dtype):
            if (example.kernel, str(example.key)) == (kernel, str(key)):
                with forced_tile(kernel, tile), recorded(dry=True, architecture=here) as launches:
                    example.call()
                for found in (compile_launch(launch, here) for launch in launches):
                    if (
                        found["spill_bytes"]
                        or found["spill_instructions"]
                        or found["shared_bytes"] > SHARED_LIMIT[here]
                    ):
                        return True
    return False


def write_table(kernel: str, tiles: dict[str, Tile], source_of_others: str) -> None:
    """Write tiles into this architecture's entry of the table, one per line, and record their source."""
    table = json.loads(json.dumps(tile_table(kernel)))
    entry = table[architecture(DEVICE)]
    source = f"tuned on {torch.cuda.get_device_name()}, {date.today()}"
    others = [key for key in entry["tiles"] if key not in tiles]
    if others:
        source += f"; {', '.join(others)}: {source_of_others}"
    entry["tiles"].update(tiles)
    entry["source"] = source
    path = _launch.TUNED / f"{kernel}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump_table(table))
    temporary.replace(path)
    tile_table.cache_clear()


def dump_table(table: dict[str, Any]) -> str:
    """The table as JSON with one line per tile."""
    entries = []
    for name, entry in table.items():
        tiles = ",\n".join(f"   {json.dumps(key)}: {json.dumps(tile)}" for key, tile in entry["tiles"].items())
        source = json.dumps(entry["source"], ensure_ascii=False)
        entries.append(f' "{name}": {{\n  "source": {source},\n  "tiles": {{\n{tiles}\n  }}\n }}')
    return "{\n" + ",\n".join(entries) + "\n}\n"


def describe(tile: Tile) -> str:
    return "/".join(str(value) for value in tile.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=operation_modules(), help="only this operation file")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no entry after this long")
    arguments = parser.parse_args(argv)
    missing = backend.unavailable("triton")
    if missing:
        parser.error(missing)
    deadline = time.monotonic() + arguments.seconds
    for line in tune(arguments.op or operation_modules(), deadline):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
