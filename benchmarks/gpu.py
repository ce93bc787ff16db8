"""Measures, tests and tunes on a GPU in ten minutes (`make gpu OUT=dir [SUBJECT=norm] [CACHE=dir] [WHEELS=dir]`).

    python -m benchmarks.gpu --out DIR [--subject norm] [--cache DIR] [--wheels DIR] [--resume FILE] [--seconds 570]

Needs no network, and installs nothing into the Python that runs it. Everything that was found is on disk as soon as it
was found, so the run may be killed at any moment, and a second one with the same DIR goes on where it ended:

    DIR/results.json    what was measured, for `make report ADD=DIR/results.json` (see benchmarks/measure.py)
    DIR/tuning.json     what the tuner timed; DIR/tuned.tar has its tiles, to be unpacked in the repository's root
    DIR/log             the output of all steps

`--cache` is a folder of binaries from `python -m benchmarks.prime`, `--wheels` one of wheels of other libraries (they
are installed below build/), `--resume` the results of an earlier run that are not in DIR.

If a step fails, it is reported, the others still run, and the exit code is 1. Without a GPU it is a dry run: the small
shapes are measured on the CPU, GPU tests are collected and skipped, and tiles are compared in Triton's interpreter
instead of timed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks import measure, tune
from benchmarks.compile_report import operation_modules
from benchmarks.records import DEVICE, ROOT, write_json
from benchmarks.report import case_key, digits, duration
from llava_fast.ops._launch import architecture

# Seconds for each step, in this order; unused seconds go to the next step. "first" measures what is wanted most, before
# anything that it does not need; "rest" what "benchmarks" did not reach.
LIMITS = {
    **{"wheels": 15, "kernels": 50, "first": 180, "extension": 40},
    **{"benchmarks": 90, "tests": 80, "tune": 80, "rest": 35},
}
LOG_BYTES = 15 * 2**20
# The same folder as in tests/test_extension.py, so that it is compiled once.
BUILD = ROOT / "build" / "test-extension"
SITE = ROOT / "build" / "wheels"
DRY = DEVICE.type == "cpu"

Command = Sequence[str | Path]


def subjects() -> list[str]:
    """Valid values of `--subject`: operations, and benchmarks."""
    return sorted({*operation_modules(), *measure.subjects()})


# ---- the commands of each step, given the seconds that it has


def wheels_commands(wheels: Path | None) -> list[Command]:
    """One command per wheel, so that one for another Python stops no other."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    found = sorted(wheels.glob("*.whl")) if wheels else []
    return [[*pip, "--disable-pip-version-check", "--upgrade", "--target", SITE, wheel] for wheel in found]


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


def kernels_commands(subject: str | None, cache: Path | None, seconds: float) -> list[Command]:
    """Fill Triton's cache: carried binaries, and what they lack. It needs no GPU, and would allocate on one."""
    if DRY or (subject is not None and subject not in measure.subjects()):
        return []
    only = ["--subject", subject] if subject else []
    carried = ["--carried", cache] if cache else []
    command = [sys.executable, "-m", "benchmarks.prime", "--architecture", architecture(DEVICE)]
    return [["env", "CUDA_VISIBLE_DEVICES=", *command, "--seconds", f"{seconds - 10:.0f}", *carried, *only]]


def benchmarks_commands(names: Sequence[str], subject: str | None, results: Path, seconds: float) -> list[Command]:
    """Measure those of these benchmarks that are the subject."""
    wanted = [name for name in names if subject in (None, name)]
    if not wanted:
        return []
    only = [argument for name in wanted for argument in ("--subject", name)]
    # A case takes up to about ten seconds; the one that has begun is finished.
    limit = max(1.0, seconds - 10)
    return [[sys.executable, "-m", "benchmarks.measure", "--results", results, "--seconds", f"{limit:.0f}", *only]]


def tests_commands(subject: str | None) -> list[Command]:
    files = (ROOT / "tests").rglob("test_*.py")
    if subject is not None:  # tests/ops/test_norm.py, tests/ops/attention/*, tests/ops/attention/test_decode.py
        names = {f"test_{subject}.py", f"test_{subject.removesuffix('_attention')}.py"}
        of_ops = (ROOT / "tests/ops").rglob("test_*.py")
        files = (path for path in of_ops if path.name in names or path.parent.name == subject)
    # Other test files are not imported, since they need packages that a GPU machine may lack.
    files = [path for path in files if re.search(r"mark\.gpu|\bDEVICES\b", path.read_text(encoding="utf-8"))]
    return [[sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations=10", *sorted(files)]] if files else []


def tune_commands(subject: str | None, out: Path, seconds: float) -> list[Command]:
    if subject is not None and subject not in operation_modules():
        return []
    only = ["--op", subject] if subject else []
    limit = max(1.0, seconds - 10)  # to finish the entry that has begun
    return [[sys.executable, "-m", "benchmarks.tune", "--out", out, "--seconds", f"{limit:.0f}", *only]]


# ---- running them


def run(commands: Sequence[Command], deadline: float, log: IO[bytes], env: Mapping[str, str]) -> str:
    """Run commands one after the other; returns an empty string, or the error of the first that failed.

    A command that exits with `measure.AGAIN` is run once more. Commands die with this process, however it dies.
    """
    for command in commands:
        shown = " ".join(map(str, command))
        status = measure.AGAIN
        while status == measure.AGAIN:
            log.write(f"\n$ {shown}\n".encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent
                )
            except OSError as error:
                return str(error)
            try:
                status = process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                return f"out of time: {shown}"
        if status:
            return f"exit code {status}: {shown}"
    return ""


def _die_with_parent() -> None:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_each(commands: Sequence[Command], deadline: float, log: IO[bytes], env: Mapping[str, str]) -> str:
    """Run all commands, also after one that failed; returns the errors."""
    return "; ".join(filter(None, (run([command], deadline, log, env) for command in commands)))


def steps(
    subject: str | None, out: Path, log: IO[bytes], *, cache: Path | None, wheels: Path | None, seconds: float
) -> Iterator[dict[str, Any]]:
    """Run every step; yields its name, seconds and outcome ("ok", "nothing to do", or an error)."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(SITE), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if DRY:
        env["TRITON_INTERPRET"] = "1"
    results = out / "results.json"
    commands: dict[str, Callable[[float], list[Command]]] = {
        "wheels": lambda left: wheels_commands(wheels),
        "kernels": lambda left: kernels_commands(subject, cache, left),
        "first": lambda left: benchmarks_commands([*measure.FIRST], subject, results, left),
        "extension": lambda left: extension_commands(),
        "benchmarks": lambda left: benchmarks_commands(measure.subjects(), subject, results, left),
        "tests": lambda left: tests_commands(subject),
        "tune": lambda left: tune_commands(subject, out, left),
        "rest": lambda left: benchmarks_commands(measure.subjects(), subject, results, left),
    }
    start = deadline = time.monotonic()
    passed = {step["step"] for step in _stored(results).get("steps", []) if step["outcome"] == "ok"}
    for name, limit in LIMITS.items():
        began = time.monotonic()
        deadline = min(deadline + limit * seconds / sum(LIMITS.values()), start + seconds)
        listed = [] if name == "tests" and "tests" in passed else commands[name](deadline - began)
        outcome = (run_each if name == "wheels" else run)(listed, deadline, log, env)
        outcome = outcome or ("ok" if listed or name in passed else "nothing to do")
        yield {"step": name, "seconds": round(time.monotonic() - began, 1), "outcome": outcome}


def _stored(results: Path) -> dict[str, Any]:
    return json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}


# ---- what is printed


def case_lines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line per case: the providers, fastest first."""
    for (op, direction, shape, dtype), group in groupby(records, key=case_key):
        providers = []
        for r in sorted(group, key=lambda r: r["ms_median"]):
            floor = "" if r["pct_of_floor"] is None else f" ({digits(r['pct_of_floor'])} %)"
            providers.append(f"{r['provider']} {duration(r['ms_median'])}{floor}")
        yield f"{op} {shape} {dtype} {direction}: {', '.join(providers)}"


def prepare(out: Path, resume: Path | None) -> None:
    """The folder with the results to go on with, and a log that does not grow without end."""
    out.mkdir(parents=True, exist_ok=True)
    if resume is not None and not (out / "results.json").exists():
        for name in ("results.json", "tuning.json"):
            source = resume if name == "results.json" else resume.with_name(name)
            if source.exists():
                shutil.copyfile(source, out / name)
    log = out / "log"
    log.write_bytes(log.read_bytes()[-LOG_BYTES // 2 :] if log.exists() else b"")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, tuned.tar, tuning.json, log")
    parser.add_argument("--subject", choices=subjects(), help="only this operation")
    parser.add_argument("--cache", type=Path, help="a folder from python -m benchmarks.prime")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of other libraries")
    parser.add_argument("--resume", type=Path, help="results.json of an earlier run, to go on with")
    parser.add_argument("--seconds", type=float, default=sum(LIMITS.values()), help="for everything")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    try:
        prepare(out, arguments.resume)
    except OSError as error:
        parser.error(str(error))
    results = measure.Results(out / "results.json")
    tune.Tuning(out).write()
    print("No GPU: a dry run" if DRY else torch.cuda.get_device_name(), flush=True)
    print(f"{len(results.content['records'])} records so far", flush=True)

    before = results.content["steps"]
    done: list[dict[str, Any]] = []
    with (out / "log").open("ab") as log:
        options = {"cache": arguments.cache, "wheels": arguments.wheels, "seconds": arguments.seconds}
        for step in steps(arguments.subject, out, log, **options):
            done.append(step)
            print(f"{step['step']}: {step['outcome']} ({step['seconds']} s)", flush=True)
            earlier = [s for s in before if s["step"] not in {d["step"] for d in done}]
            write_json(out / "results.json", {**_stored(out / "results.json"), "steps": earlier + done})
    (out / "log").write_bytes((out / "log").read_bytes()[-LOG_BYTES:])

    failed = [step["step"] for step in done if step["outcome"] not in ("ok", "nothing to do")]
    if failed:
        end = (out / "log").read_text("utf-8", "replace").splitlines()[-40:]
        print(f"\nthe end of {out / 'log'}:\n" + "\n".join(end))
    print("", *case_lines(_stored(out / "results.json")["records"]), sep="\n")
    print(f"failed: {', '.join(failed)}" if failed else "every step succeeded")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
