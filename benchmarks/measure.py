"""Measures cases, most wanted first, and stores each at once: it can be killed at any moment, and goes on from there.

    python -m benchmarks.measure --results DIR/results.json [--subject norm] [--seconds 250]

The file is what `make report ADD=FILE` takes. Its parts besides "run" and "records":

    absent      cases that were tried and providers without a record, each with its reason
    missing     libraries, and files of benchmarks, that are not measured at all, each with its reason
    measuring   the case in progress; after a second death in the same case, that case is given up

Each subject has seconds of its own; what it does not need goes to the next, and what it did not reach comes after all
the others. Providers that compile for long ("compile", "flex") come last: their cases are measured once more, with all
providers in turns. A case that takes longer than `CASE_SECONDS` is given up, with its process.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Case
from benchmarks.records import DEVICE, ROOT, put_aside, run_info, sources, write_json
from llava_fast import backend

# Seconds of each subject, most wanted first; none of these needs the CUDA extension. The others follow, with OTHER
# seconds each.
FIRST = {"attention": 70, "decode_attention": 20, "train_step": 60, "int8_attention": 15, "tower": 25, "loss": 20}
OTHER = 15
CASE_SECONDS = 75.0  # the longest: a training step whose model and kernels are made first
SLOW_TO_COMPILE = ("compile", "flex")
AGAIN = 75  # exit code: this process is of no use any more, another one should go on

Key = tuple[str, ...]


def subjects() -> list[str]:
    """The benchmarks, most wanted first."""
    found = sorted(path.stem.removeprefix("test_") for path in (ROOT / "benchmarks").glob("test_*.py"))
    return [*FIRST, *(name for name in found if name not in FIRST)]


def gpu_cases(subject: str) -> list[Case]:
    return importlib.import_module(f"benchmarks.test_{subject}").cases(True)


def key_of(identity: dict[str, Any]) -> Key:
    return tuple(identity[name] for name in ("op", "direction", "shape", "dtype"))


def missing() -> dict[str, str]:
    """Why peers and the CUDA extension are not measured here; nothing about those that are."""
    importlib.import_module("llava_fast.ops.attention")  # registers its peers
    reasons = {"cuda": backend.unavailable("cuda")}
    for name, state in backend.status()["attention"]["peers"].items():
        reasons[name] = "" if state == "available" else state
    if importlib.util.find_spec("liger_kernel") is None:
        reasons["liger"] = "liger_kernel is not installed"
    if DEVICE.type == "cpu":
        reasons |= dict.fromkeys(SLOW_TO_COMPILE, "measured on a GPU only")
    return {name: reason for name, reason in reasons.items() if reason}


# What has to be equal for two runs to be one.
SAME = ("device", "gpu", "driver", "torch", "triton", "transformers", "liger-kernel", "python", "commit", "code")


class Results:
    """results.json. A file of another commit, GPU or version, or a damaged one, is put aside: results.before.json."""

    def __init__(self, path: Path):
        self.path = path
        run = {**run_info(), "code": sources()}
        self.content: dict[str, Any] = {"run": run, "dry_run": DEVICE.type == "cpu", "steps": [], "records": []}
        if path.exists():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
                same = all(before["run"].get(name) == run.get(name) for name in SAME)
            except (ValueError, KeyError, TypeError):
                same = False
            if same:
                self.content = before
            else:
                put_aside(path)
        self.content.setdefault("absent", [])
        self.content["missing"] = missing()
        self.deaths = defaultdict(int, self.content.get("deaths", {}))
        if died := self.content.pop("measuring", None):
            self.deaths[" ".join(key_of(died))] += 1
            if self.deaths[" ".join(key_of(died))] > 1:
                self.give_up(died, "the process died twice while this was measured")
        self.write()

    def write(self) -> None:
        write_json(self.path, {**self.content, "deaths": self.deaths})

    def started(self, case: Case) -> None:
        self.content["measuring"] = case.identity
        self.write()

    def give_up(self, identity: dict[str, Any], reason: str) -> None:
        """Leave out a case as a whole."""
        self.content.pop("measuring", None)
        self.content["absent"].append({**identity, "provider": None, "reason": reason})
        self.write()

    def add(self, case: Case, found: dict[str, harness.Measurement | Exception]) -> None:
        """Replace what is known of a case."""
        for name in ("records", "absent"):
            self.content[name] = [r for r in self.content[name] if key_of(r) != key_of(case.identity)]
        for provider, result in found.items():
            if isinstance(result, Exception):
                reason = f"{type(result).__name__}: {str(result).splitlines()[0] if str(result) else ''}"
                self.content["absent"].append({**case.identity, "provider": provider, "reason": reason})
            else:
                self.content["records"].append(result.record(case, provider))
        self.content.pop("measuring", None)
        self.write()

    def has(self, case: Case) -> bool:
        """Whether all providers of the case, or the case as a whole, are settled."""
        known = {
            r["provider"]
            for name in ("records", "absent")
            for r in self.content[name]
            if key_of(r) == key_of(case.identity)
        }
        return None in known or case.providers.keys() <= known


# ---- the order


def quick_part(case: Case) -> Case:
    """The case without the providers that compile for long."""
    providers = {name: p for name, p in case.providers.items() if name not in SLOW_TO_COMPILE}
    return dataclasses.replace(case, providers=providers)


def in_order(names: list[str], results: Results, clock: Any = time.monotonic) -> Iterator[Case]:
    """The cases that are not settled, in the order of the text at the top of this file."""
    deadline, late = clock(), []
    for name in names:
        deadline += FIRST.get(name, OTHER)
        for i, case in enumerate(cases_of(name)):
            if not results.has(quick_part(case)):
                if clock() < deadline:
                    yield quick_part(case)
                else:
                    late.append((name, i))
    for name, i in late:
        yield quick_part(cases_of(name)[i])
    for name in names:
        for case in cases_of(name):
            if not results.has(case):
                yield case


def cases_of(subject: str) -> list[Case]:
    """The subject's cases for this machine; none if it has none for a GPU. Made anew each time, since a case keeps the
    model that it made."""
    if not gpu_cases(subject):
        return []
    return importlib.import_module(f"benchmarks.test_{subject}").cases(DEVICE.type == "cuda")


def measure(names: list[str], results: Results, seconds: float) -> Iterator[str]:
    """Measure until the time is over; yields a line per case. Exits with code AGAIN if the process is of no use."""
    end = time.monotonic() + seconds
    usable = []
    for name in names:
        try:
            cases_of(name)
            usable.append(name)
        except Exception as error:  # a package that its file imports is not there
            results.content["missing"][_file(name)] = f"{type(error).__name__}: {error}"
            yield f"{_file(name)}: {type(error).__name__}: {error}"
    results.write()
    for case in in_order(usable, results):
        if time.monotonic() > end:
            yield "out of time; the next call goes on here"
            return
        results.started(case)
        watchdog = threading.Timer(CASE_SECONDS, _too_long, (case, results))
        watchdog.daemon = True
        watchdog.start()
        try:
            found: dict[str, Any] = harness.measured(case)
        except Exception as error:  # its inputs or its reference fail
            found = dict.fromkeys(case.providers, error)
        watchdog.cancel()
        results.add(case, found)
        failed = [f"{name}: {error}" for name, error in found.items() if isinstance(error, Exception)]
        yield "; ".join([f"{case}: {len(found) - len(failed)} measured", *failed])
        harness.measured.cache_clear()
        gc.collect()
        if DEVICE.type == "cuda":
            _check_context()


def _file(subject: str) -> str:
    return f"benchmarks/test_{subject}.py"


def _too_long(case: Case, results: Results) -> None:
    results.give_up(case.identity, f"longer than {CASE_SECONDS:.0f} s")
    print(f"{case}: longer than {CASE_SECONDS:.0f} s", flush=True)
    faulthandler.dump_traceback()
    os._exit(AGAIN)


def _check_context() -> None:
    """After an error on the GPU (an illegal address), every later call of this process fails."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(error, flush=True)
        sys.stdout.flush()
        os._exit(AGAIN)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="the file to begin or to go on with")
    parser.add_argument("--subject", action="append", choices=subjects(), help="only this benchmark")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no case after so long")
    arguments = parser.parse_args(argv)
    results = Results(arguments.results.resolve())
    if DEVICE.type == "cuda":
        harness.SECONDS_PER_CASE = 1.0
    try:
        for line in measure(arguments.subject or subjects(), results, arguments.seconds):
            print(line, flush=True)
    except KeyboardInterrupt:  # the step's clock: not the fault of the case in progress
        results.content.pop("measuring", None)
        results.write()
        return 1
    return int(any(name.startswith("benchmarks/") for name in results.content["missing"]))


if __name__ == "__main__":
    sys.exit(main())
