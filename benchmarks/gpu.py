"""Builds, tunes, tests and measures on a GPU in ten minutes (`make gpu OUT=dir [SUBJECT=norm]`).

    python -m benchmarks.gpu --out DIR [--subject norm]

Needs no network and installs nothing: it uses the packages of the Python that runs it. Writes DIR/results.json (for
`make report ADD=DIR/results.json`), DIR/tuned.tar (to be unpacked in the repository's root) and DIR/log. If a step
fails, it is reported, the others still run, and the exit code is 1.

Without a GPU it is a dry run: tiles are compared in Triton's interpreter instead of timed and stay as they are, GPU
tests are collected and skipped, and the benchmarks measure their small shapes on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.compile_report import operation_modules
from benchmarks.records import DEVICE, ROOT, run_info
from benchmarks.report import case_key, digits, duration

# Seconds for each step, in this order; unused seconds go to the next step. Together under ten minutes.
LIMITS = {"extension": 70, "tune": 150, "tests": 140, "benchmarks": 200}
LOG_BYTES = 15 * 2**20
# The same folder as in tests/test_extension.py, so that it is compiled once.
BUILD = ROOT / "build" / "test-extension"
DRY = DEVICE.type == "cpu"

Command = Sequence[str | Path]


def subjects() -> list[str]:
    """Valid values of `--subject`: operations, and benchmarks."""
    measured = (path.stem.removeprefix("test_") for path in (ROOT / "benchmarks").glob("test_*.py"))
    return sorted({*operation_modules(), *measured})


def extension_commands() -> list[Command]:
    """Compile the CUDA extension and load it; on a GPU put it where `llava_fast` finds it."""
    if shutil.which("nvcc") is None:
        return []
    cmake, ninja = (shutil.which(name, path=Path(sys.executable).parent) or name for name in ("cmake", "ninja"))
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    load = f"import sys; sys.path.insert(0, {str(BUILD)!r}); import _cuda; print(_cuda.compiled_architectures())"
    return [
        [cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options],
        [cmake, "--build", BUILD],
        [sys.executable, "-c", load],
        *([] if DRY else [[cmake, "--install", BUILD, "--prefix", ROOT / "llava_fast"]]),
    ]


def tune_commands(subject: str | None) -> list[Command]:
    if subject is not None and subject not in operation_modules():
        return []
    only = ["--op", subject] if subject else []
    # Twenty seconds less than the step's limit, to finish the current entry and write the tables.
    return [[sys.executable, "-m", "benchmarks.tune", "--seconds", str(LIMITS["tune"] - 20), *only]]


def tests_commands(subject: str | None) -> list[Command]:
    files = (ROOT / "tests").rglob("test_*.py")
    if subject is not None:  # tests/ops/test_norm.py, tests/ops/attention/*, tests/ops/attention/test_decode.py
        names = {f"test_{subject}.py", f"test_{subject.removesuffix('_attention')}.py"}
        of_ops = (ROOT / "tests/ops").rglob("test_*.py")
        files = (path for path in of_ops if path.name in names or path.parent.name == subject)
    # Other test files are not imported, since they need packages that a GPU machine may lack.
    files = [path for path in files if re.search(r"mark\.gpu|\bDEVICES\b", path.read_text(encoding="utf-8"))]
    return [[sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations=10", *sorted(files)]] if files else []


def benchmarks_commands(subject: str | None, results: Path) -> list[Command]:
    target = ROOT / "benchmarks" if subject is None else ROOT / "benchmarks" / f"test_{subject}.py"
    if not target.exists():
        return []
    return [[sys.executable, "-m", "pytest", target, "--benchmark", "--results", results]]


def run(commands: Sequence[Command], deadline: float, log: IO[bytes], env: Mapping[str, str]) -> str:
    """Run commands one after the other; returns an empty string, or the error of the first that failed."""
    for command in commands:
        shown = " ".join(map(str, command))
        log.write(f"\n$ {shown}\n".encode())
        log.flush()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return str(error)
        try:
            status = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # On SIGINT pytest still writes its results.
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return f"out of time: {shown}"
        if status:
            return f"exit code {status}: {shown}"
    return ""


def steps(subject: str | None, measured: Path, log: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Run every step; yields its name, seconds and outcome ("ok", "nothing to do", or an error)."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if DRY:
        env["TRITON_INTERPRET"] = "1"
    commands = {
        "extension": extension_commands(),
        "tune": tune_commands(subject),
        "tests": tests_commands(subject),
        "benchmarks": benchmarks_commands(subject, measured),
    }
    deadline = time.monotonic()
    for name, limit in LIMITS.items():
        start = time.monotonic()
        deadline += limit
        outcome = run(commands[name], deadline, log, env) or ("ok" if commands[name] else "nothing to do")
        yield {"step": name, "seconds": round(time.monotonic() - start, 1), "outcome": outcome}


def case_lines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line per case: the providers, fastest first."""
    for (op, direction, shape, dtype), group in groupby(records, key=case_key):
        providers = []
        for r in sorted(group, key=lambda r: r["ms_median"]):
            floor = "" if r["pct_of_floor"] is None else f" ({digits(r['pct_of_floor'])} %)"
            providers.append(f"{r['provider']} {duration(r['ms_median'])}{floor}")
        yield f"{op} {shape} {dtype} {direction}: {', '.join(providers)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, tuned.tar and log")
    parser.add_argument("--subject", choices=subjects(), help="only this operation")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print("No GPU: a dry run" if DRY else torch.cuda.get_device_name(), flush=True)

    done = []
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "log"
        with log_file.open("wb") as log:
            for step in steps(arguments.subject, Path(folder) / "results", log):
                done.append(step)
                print(f"{step['step']}: {step['outcome']} ({step['seconds']} s)", flush=True)
        found = sorted(Path(folder).glob("results/*/*.json"))
        results = json.loads(found[0].read_text()) if found else {"run": run_info(), "records": []}
        (out / "log").write_bytes(log_file.read_bytes()[-LOG_BYTES:])
    (out / "results.json").write_text(json.dumps({**results, "dry_run": DRY, "steps": done}, indent=1) + "\n")
    with tarfile.open(out / "tuned.tar", "w") as tar:
        tar.add(ROOT / "llava_fast/ops/tuned", arcname="llava_fast/ops/tuned")

    failed = [step["step"] for step in done if step["outcome"] not in ("ok", "nothing to do")]
    if failed:
        print(
            f"\nthe end of {out / 'log'}:\n" + "\n".join((out / "log").read_text("utf-8", "replace").splitlines()[-40:])
        )
    print("", *case_lines(results["records"]), sep="\n")
    print(f"failed: {', '.join(failed)}" if failed else "every step succeeded")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
