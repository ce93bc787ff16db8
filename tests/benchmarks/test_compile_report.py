"""The offline compile gate, on the operations that compile in seconds, and that it can fail.

`make compile-report` compiles every kernel with every tile that ships, in minutes; `.ci/run` does so.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compile_report
from llava_fast.ops._launch import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"kernel", "arch", "dtype", "tile", "registers", "spill_bytes", "shared_bytes", "mma", "loop"}
QUICK = ("norm", "activation", "merge")


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Python with a Triton that compiles, unlike the one of these tests, which interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """The records of an operation; compiled once."""

    @cache
    def report(op: str) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp(op) / "report.json"
        done = python("-m", "benchmarks.compile_report", "--op", op, "--out", out)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        records = json.loads(out.read_text())
        assert f"{len(records)} kernels compiled, 0 problems" in done.stdout
        return records

    return report


@pytest.mark.parametrize("op", QUICK)
def test_what_ships_compiles_and_spills_nothing(op: str, report_of: Callable):
    records = report_of(op)
    assert {r["arch"] for r in records} == set(ARCHITECTURES)
    assert {r["dtype"] for r in records} >= {"bf16", "fp32"}
    for r in records:
        assert r.keys() >= FIELDS
        assert r["tile"].keys() >= {"num_warps", "num_stages"}
        assert (r["spill_bytes"], r["spill_instructions"], r["spills_in_loop"]) == (0, 0, 0)
        assert 0 < r["registers"] <= 255
        assert 0 <= r["shared_bytes"] <= compile_report.SHARED_LIMIT[r["arch"]]
        assert r["warps_per_sm"] >= r["tile"]["num_warps"]


def test_every_file_with_kernels_has_examples():
    for op in compile_report.operation_modules():
        file = ROOT / f"llava_fast/ops/{op}.py"
        source = (file if file.exists() else ROOT / f"llava_fast/ops/{op}/__init__.py").read_text()
        if "launch(" in source:
            assert "def examples(" in source, op


def test_every_tile_of_the_norms_is_compiled(report_of: Callable):
    compiled = {(r["kernel"], r["arch"], r["tile"]["BLOCK_D"]) for r in report_of("norm")}
    assert compiled == {
        (f"norm_{way}_kernel", arch, int(key))
        for way in ("fwd", "bwd")
        for arch in ARCHITECTURES
        for key in json.loads((ROOT / f"llava_fast/ops/tuned/norm_{way}.json").read_text())[arch]["tiles"]
    }


def test_a_tile_that_is_too_large_is_reported(tmp_path: Path):
    out = tmp_path / "report.json"
    code = f"""
import sys, torch
from functools import partial
from benchmarks import compile_report
from llava_fast.ops import norm
from llava_fast.ops._launch import Example, forced_tile
x = torch.empty(64, 4096, dtype=torch.bfloat16)
large = Example("norm_fwd", 4096, partial(norm.norm_forward, x, x[0], None, x, 1e-5))
norm.examples = lambda device, dtype: [large] if dtype == x.dtype else []
with forced_tile("norm_fwd", {{"BLOCK_R": 8, "num_warps": 4, "num_stages": 1}}):
    sys.exit(compile_report.main(["--op", "norm", "--out", {str(out)!r}]))
"""
    done = python("-c", code)
    assert done.returncode == 1, done.stderr
    records = json.loads(out.read_text())
    assert [r["arch"] for r in records] == list(ARCHITECTURES)
    assert all(r["spill_bytes"] > 0 and r["spill_instructions"] > 0 for r in records)
    assert "2 kernels compiled, 2 problems" in done.stdout
    assert done.stdout.count("problem: norm_fwd_kernel sm_") == 2


def test_the_interpreter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        compile_report.main(["--op", "norm", "--out", str(tmp_path / "report.json")])
    assert "TRITON_INTERPRET=1 turns the compiler off" in capsys.readouterr().err


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                /* 0x00000a0000017a02 */
                                                                         /* 0x000fc40000000f00 */
        /*0010*/                   STL [R1+0x4], R2 ;                    /* 0x0000040201007387 */
        /*0020*/                   LDG.E R4, [R2.64] ;                   /* 0x0000000402047981 */
        /*0030*/               @P1 LDL.LU R2, [R1+0x4] ;                 /* 0x0000040001027983 */
        /*0040*/                   STL.64 [R1], R8 ;                     /* 0x0000000801007387 */
        /*0050*/               @P0 BRA 0x20 ;                            /* 0xffffffc000007947 */
        /*0060*/                   LDL R6, [R1] ;                        /* 0x0000000001067983 */
        /*0070*/                   BRA 0x90 ;                            /* 0x0000001000007947 */
        /*0080*/                   EXIT ;                                /* 0x000000000000794d */
        /*0090*/                   BRA 0x90;                             /* 0xfffffff000007947 */
"""


def test_spills_between_a_backward_branch_and_its_target_are_in_a_loop():
    assert compile_report.spills_in_loop(SASS) == 2
    # A branch forward, and one to itself, are no loops.
    assert compile_report.spills_in_loop(SASS.replace("@P0 BRA 0x20", "@P0 BRA 0x60")) == 0
    # An outer loop takes in what is before the inner one.
    assert compile_report.spills_in_loop(SASS.replace("BRA 0x90 ;", "BRA 0x10 ;")) == 4
    assert compile_report.spills_in_loop("") == 0


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "architecture", "expected"),
    [
        (32, 0, 4, "sm_80", 64),  # full
        (255, 0, 8, "sm_80", 8),  # one block of 256 threads has all the registers
        (33, 0, 4, "sm_80", 48),  # 33 registers take as much as 40
        (32, 40 * 1024, 4, "sm_80", 16),  # shared memory: four blocks of 41 KiB in 164
        (32, 40 * 1024, 4, "sm_90", 20),  # five in 228
        (32, 0, 1, "sm_80", 32),  # 32 blocks at the most
        (32, 200 * 1024, 4, "sm_80", 0),  # does not fit at all
    ],
)
def test_occupancy(registers: int, shared: int, warps: int, architecture: str, expected: int):
    assert compile_report.occupancy(registers, shared, warps, architecture) == expected


def test_problems_are_spills_and_too_much_shared_memory():
    good = {
        **{"kernel": "k", "arch": "sm_80", "dtype": "bf16", "tile": {"BLOCK": 8}, "flags": {}, "shared_bytes": 0},
        **{"spill_bytes": 0, "spill_instructions": 0, "spills_in_loop": 0},
    }
    assert compile_report.problems([good]) == []
    (line,) = compile_report.problems([{**good, "spill_bytes": 8, "spills_in_loop": 2}])
    assert "spills 8 bytes (2 accesses in a loop)" in line
    assert len(compile_report.problems([{**good, "spill_instructions": 1}])) == 1
    large = {**good, "shared_bytes": 164 * 1024}
    (line,) = compile_report.problems([large])
    assert line.endswith(f"{164 * 1024} bytes of shared memory, over {163 * 1024}")
    assert compile_report.problems([{**large, "arch": "sm_90"}]) == []
