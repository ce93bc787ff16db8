"""The tile tuner: only tiles that agree, only where it pays, only this architecture's entries."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import compile_report, tune
from llava_fast.ops import _launch, norm
from llava_fast.ops._launch import tile_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A table of one kernel in a folder of its own; the GPU is an H100 by name."""
    tiles = {"64": {"BLOCK": 1}, "128": {"BLOCK": 2}}
    part = {"source": "chosen by register count, not measured", "tiles": tiles}
    (tmp_path / "doubled.json").write_text(tune.dump_table({"sm_80": part, "sm_90": part}))
    monkeypatch.setattr(_launch, "TUNED", tmp_path)
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    yield tmp_path / "doubled.json"
    _launch.forget_tiles()


def current(key: int) -> dict[str, int]:
    return _launch.tile("doubled", key, torch.device("cpu"))


def test_the_norms_offer_tiles_for_every_entry():
    offered = [(e.kernel, str(e.key)) for e in norm.examples(torch.device("cpu"), torch.float16) if e.tiles]
    for kernel in ("norm_fwd", "norm_bwd"):
        assert [key for name, key in offered if name == kernel] == [*tile_table(kernel)["sm_90"]["tiles"]]


def test_tiles_of_the_norms_agree_in_the_interpreter():
    example = next(e for e in norm.examples(torch.device("cpu"), torch.float32) if e.tiles)
    shipped = _launch.tile(example.kernel, example.key, torch.device("cpu"))
    assert tune.verified(example.kernel, example.call, shipped, example.tiles[:3]) == example.tiles[:3]


@pytest.mark.parametrize("op", compile_report.operation_modules())
def test_examples_launch_the_kernel_they_name_at_every_entry(op: str):
    """Dry, on tensors without memory: with another tile for the entry, the launches of its kernel are others."""
    entries = set()
    for dtype in (torch.float32, torch.bfloat16):
        for example in compile_report.examples_of(op, torch.device("meta"), dtype):
            entry = example.kernel, str(example.key)
            entries.add(entry)
            for architecture in _launch.ARCHITECTURES:
                shipped = tile_table(entry[0])[architecture]["tiles"][entry[1]]
                if shipped.get("LIBRARY") and example.tiles:
                    continue  # the library's GEMM launches no kernel of ours
                with _launch.recorded(dry=True, architecture=architecture) as launches:
                    example.call()
                with _launch.forced_tile(entry[0], {**shipped, "num_warps": 99}):
                    with _launch.recorded(dry=True, architecture=architecture) as forced:
                        example.call()
                assert any(launch.num_warps == 99 for launch in forced), entry
                assert shipped["num_warps"] in {launch.num_warps for launch in launches}, entry
    kernels = {kernel for kernel, _ in entries}
    shipped = {(kernel, key) for kernel in kernels for key in tile_table(kernel)["sm_80"]["tiles"]}
    assert entries == shipped


def test_every_table_is_of_an_operation():
    kernels = {
        example.kernel
        for op in compile_report.operation_modules()
        for example in compile_report.examples_of(op, torch.device("meta"), torch.float32)
    }
    assert kernels == {path.stem for path in _launch.TUNED.glob("*.json")}


def test_a_tile_with_other_results_is_an_error(table: Path):
    def call() -> torch.Tensor:
        return torch.full((3,), float(current(64)["BLOCK"] == 4))

    assert tune.verified("doubled", call, {"BLOCK": 1}, [{"BLOCK": 2}]) == [{"BLOCK": 2}]
    with pytest.raises(AssertionError, match="not close"):
        tune.verified("doubled", call, {"BLOCK": 1}, [{"BLOCK": 2}, {"BLOCK": 4}])


class Compiled:
    """Candidates of which some spill."""

    def __init__(self, spilling: tuple[int, ...] = ()):
        self.spilling = spilling

    def sound(self, entry: tune.Entry, deadline: float) -> tuple[list, list[str]]:
        good = [tile for tile in entry.tiles if tile["BLOCK"] not in self.spilling]
        return good, [f"{block}: spills" for block in self.spilling]


def run_tune(
    monkeypatch: pytest.MonkeyPatch,
    times: dict[int, float],
    *,
    spilling: tuple[int, ...] = (),
    seconds: float = 60.0,
    folder: Path | None = None,
) -> list[str]:
    """Tune the table's kernel as on a GPU, where the tile BLOCK=b takes times[b] milliseconds."""
    candidates = [{"BLOCK": block} for block in times]

    def examples(op: str, device: torch.device, dtype: torch.dtype):
        for key in (64, 128):
            if dtype == torch.bfloat16 or key == 64:
                yield _launch.Example("doubled", key, lambda: torch.ones(2), candidates)
            yield _launch.Example("doubled", key, lambda: torch.ones(2))  # a variant that is compiled only

    def milliseconds(kernel: str, call: Callable, tile: dict[str, int]) -> float:
        return times[tile["BLOCK"]]

    monkeypatch.setattr(tune, "examples_of", examples)
    monkeypatch.setattr(tune, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune.time, "monotonic", iter(range(1000)).__next__)
    tuning = tune.Tuning(folder)
    listed = [entry for entry in tune.entries(["doubled"]) if not tuning.done(entry)]
    return list(tune.tune(listed, seconds, Compiled(spilling), tuning))


def test_the_fastest_tile_that_does_not_spill_ships(table: Path, monkeypatch: pytest.MonkeyPatch):
    before = json.loads(table.read_text())
    run_tune(monkeypatch, {1: 1.0, 2: 1.0, 4: 0.5, 8: 0.4}, spilling=(8,))
    after = json.loads(table.read_text())
    assert after["sm_80"] == before["sm_80"]
    assert after["sm_90"]["tiles"] == {"64": {"BLOCK": 4}, "128": {"BLOCK": 4}}
    assert after["sm_90"]["source"].startswith("tuned on NVIDIA H100 80GB HBM3, 20")
    assert current(64) == {"BLOCK": 4}  # the process itself uses it from now on


def test_a_difference_within_the_noise_changes_no_tile(table: Path, monkeypatch: pytest.MonkeyPatch):
    run_tune(monkeypatch, {1: 1.0, 2: 1.0, 4: 0.99})
    assert json.loads(table.read_text())["sm_90"]["tiles"] == {"64": {"BLOCK": 1}, "128": {"BLOCK": 2}}


def test_where_no_candidate_is_sound_the_shipped_tile_stays(table: Path, monkeypatch: pytest.MonkeyPatch):
    lines = run_tune(monkeypatch, {1: 1.0, 2: 1.0, 4: 0.5}, spilling=(1, 2, 4))
    assert lines[0] == "doubled 64: 1 1000.0 µs, before 1 1000.0 µs; 0 timed, 3 not"
    assert json.loads(table.read_text())["sm_90"]["tiles"] == {"64": {"BLOCK": 1}, "128": {"BLOCK": 2}}


def test_what_time_did_not_allow_says_so(table: Path, monkeypatch: pytest.MonkeyPatch):
    lines = run_tune(monkeypatch, {1: 1.0, 2: 1.0, 4: 0.5}, seconds=0.5)
    assert lines[-1] == "out of time before doubled 128; what is not measured stays"
    part = json.loads(table.read_text())["sm_90"]
    assert part["tiles"] == {"64": {"BLOCK": 4}, "128": {"BLOCK": 2}}
    assert part["source"].endswith("; 128: chosen by register count, not measured")


def test_a_second_call_goes_on_and_the_tables_stay(table: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    shipped, out = table.read_text(), tmp_path / "out"
    out.mkdir()
    for call in (1, 2):
        with tune.own_tables():
            tune.Tuning(out).write_tables({"doubled"} if call == 2 else set())
            lines = run_tune(monkeypatch, {1: 1.0, 2: 1.0, 4: 0.5}, seconds=0.5, folder=out)
        assert lines[0].startswith(f"doubled {64 * call}: 4 500.0 µs, before {call} 1000.0 µs; 3 timed")
    assert table.read_text() == shipped and current(64) == {"BLOCK": 1}
    with tarfile.open(out / "tuned.tar") as tar:
        packed = json.loads(tar.extractfile("llava_fast/ops/tuned/doubled.json").read())
    assert packed["sm_90"]["tiles"] == {"64": {"BLOCK": 4}, "128": {"BLOCK": 4}}
    assert packed["sm_90"]["source"].startswith("tuned on NVIDIA H100") and ";" not in packed["sm_90"]["source"]
    kept = json.loads((out / "tuning.json").read_text())["entries"]
    assert [(e["key"], e["ms"], e["shipped_ms"], len(e["timed"])) for e in kept] == [
        *(("64", 0.5, 1.0, 3), ("128", 0.5, 1.0, 3))
    ]
    monkeypatch.setattr(tune, "sources", lambda: "other code")
    assert tune.Tuning(out).content["entries"] == []
    assert json.loads((out / "tuning.before-2.json").read_text())["entries"] == kept


def test_the_largest_share_of_a_step_comes_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "DEVICE", torch.device("cuda"))  # the dtypes of a GPU; entries need no tensors
    ops = compile_report.operation_modules()
    order = [(entry.kernel, entry.key) for entry in tune.entries(ops)]
    assert {*tune.STEP} <= {*order}
    assert {*order[: len(tune.STEP)]} == {*tune.STEP}
    # A norm that reaches a hundredth of its floor has a larger share than one at half.
    slow = {"op": "rms_norm", "direction": "forward", "provider": "triton", "pct_of_floor": 1.0}
    assert order[0] != ("norm_fwd", "4096")
    assert tune.share("norm_fwd", 4096, [slow]) == pytest.approx(50 * tune.share("norm_fwd", 4096, []))
    assert tune.entries(ops, [slow])[0].kernel == "norm_fwd"
    assert tune.share("norm_fwd", 128, [slow]) == 0.0


def test_written_tables_look_like_the_shipped_ones():
    for path in (ROOT / "llava_fast/ops/tuned").glob("norm_*.json"):
        assert tune.dump_table(json.loads(path.read_text())) == path.read_text()


def test_candidates_are_compiled_before_they_are_timed(tmp_path: Path):
    """By the compiler, in a process without Triton's interpreter, and by its workers."""
    code = """
import time, torch
from benchmarks import tune
if __name__ == "__main__":
    tiles = tuple({"BLOCK_R": block, "num_warps": warps, "num_stages": 1} for block, warps in ((1, 8), (16, 4)))
    entry = tune.Entry("norm", "norm_fwd", "4096", torch.bfloat16, tiles)
    candidates = tune.Candidates([entry], "sm_90")
    good, others = candidates.sound(entry, time.monotonic() + 300)
    print([tile["BLOCK_R"] for tile in good], others)
    candidates.close()
    candidates = tune.Candidates([entry], "sm_90")
    print(candidates.sound(entry, time.monotonic())[1])
    candidates.close()
"""
    script = tmp_path / "candidates.py"
    script.write_text(code)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=env, capture_output=True, text=True)
    good, late = done.stdout.splitlines()
    assert good.startswith("[1] ['16/4/1: spills "), done.stderr
    assert late == "['1/8/1: not compiled in time', '16/4/1: not compiled in time']"
