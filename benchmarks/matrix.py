"""Compiles every kernel with several versions of Triton, and runs tests with several versions of PyTorch.

    python -m benchmarks.matrix [--triton 3.8.0 …] [--torch oldest …] [--jobs 2]

Without arguments all versions. Each has an environment of its own below build/matrix/, made with pip. A version that is
done for the same source is not done again. Outcomes are written to RESULT, each with its date and commit, which is
to be committed; `make docs` makes docs/evidence.md of it.

- A version of Triton compiles what benchmarks/compile_report.py compiles, for all architectures, with the PyTorch that
  runs this. A kernel that does not compile, spills, or needs more shared memory than the GPU has is listed. With nvcc,
  the CUDA C++ kernels are compiled likewise.
- A version of PyTorch brings its own Triton, and runs TESTS without the slow ones. "oldest" is the oldest version of
  every package that pyproject.toml allows, from constraints-oldest.txt: `make oldest`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import compile_report
from benchmarks.records import ROOT, commit

TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
NVCC = "nvcc"
TORCHES = ("oldest", "2.14.1")
RESULT = ROOT / "benchmarks" / "evidence" / "versions.json"
BUILD = ROOT / "build" / "matrix"

TESTS = (
    "ops",
    "model",
    "processor",
    "checkpoint",
    "test_sequence.py",
    "test_drop_in.py",
    "test_attention_interface.py",
)
# What these tests import beside the library and its extra "train".
TOOLS = ("pytest", "hypothesis", "matplotlib", "mistral-common", "scikit-image")
# What an outcome depends on.
COMPILED = ("llava_fast/ops/**/*.py", "llava_fast/ops/tuned/*.json", "csrc/*", "benchmarks/compile_report.py")
TESTED = ("llava_fast/**/*.py", "llava_fast/**/*.json", "tests/**/*.py", "constraints*.txt", "pyproject.toml")

Outcome = dict[str, Any]


def digest(patterns: Iterable[str]) -> str:
    """Of the contents of the files that match."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}):
        found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


# ---- one version of Triton: in a process of its own, which has it first on its path


@contextmanager
def standard_error() -> Iterator[list[str]]:
    """Lines that the process, C++ included, writes to standard error inside the block; there when it ends."""
    lines: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def reason(error: Exception, said: Iterable[str]) -> str:
    """Why a kernel did not compile, in one line: the compiler's own error, where it wrote one."""
    written = [line.partition("error: ")[2] for line in said if "error: " in line]
    return (written or [f"{type(error).__name__}: {error}".splitlines()[0]])[0].strip()


def records(architecture: str, op: str, dtype: str) -> list[dict[str, Any]]:
    """One record for each variant of the operation's kernels; those that do not compile have an "error"."""
    found = []
    for launch in compile_report.launches(op, architecture, dtype):
        tile = {name: value for name, value in launch.constexprs.items() if name.startswith("BLOCK")}
        record = {
            **{"kernel": launch.name.strip("_"), "arch": architecture, "dtype": dtype},
            "tile": {**tile, "num_warps": launch.num_warps, "num_stages": launch.num_stages},
            "flags": {name: value for name, value in launch.constexprs.items() if name not in tile},
        }
        try:
            with standard_error() as said:
                resources = compile_report.compile_launch(launch, architecture)
        except Exception as error:
            found.append({**record, "error": reason(error, said)})
        else:
            found.append({**record, **resources})
    return found


def cuda_records(architecture: str, source: Path) -> list[dict[str, Any]]:
    try:
        return compile_report.cuda_records(architecture, source)
    except subprocess.CalledProcessError as error:
        kernels = re.findall(r"\b\w+_kernel(?=\()", source.read_text())
        failed = {"arch": architecture, "dtype": "", "tile": {}, "flags": {}}
        return [{"kernel": name, **failed, "error": reason(error, error.stderr.splitlines())} for name in kernels]


def summary(found: Iterable[dict[str, Any]]) -> Outcome:
    """By kernel and architecture, how many variants compile and the most shared memory of one; and what is wrong."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    failures, spills, too_large = [], [], []
    for record in found:
        architecture = record["arch"]
        counts = kernels.setdefault(record["kernel"], {}).setdefault(
            architecture, {"compiled": 0, "failed": 0, "spilling": 0, "shared_bytes": 0}
        )
        variant = {key: record[key] for key in ("kernel", "arch", "dtype", "tile", "flags")}
        if "error" in record:
            counts["failed"] += 1
            failures.append({**variant, "error": record["error"]})
            continue
        counts["compiled"] += 1
        counts["shared_bytes"] = max(counts["shared_bytes"], record["shared_bytes"])
        if record["spill_bytes"] or record["spill_instructions"]:
            counts["spilling"] += 1
            spills.append({**variant, **{key: record[key] for key in ("spill_bytes", "spills_in_loop")}})
        if record["shared_bytes"] > compile_report.SHARED_LIMIT[architecture]:
            too_large.append({**variant, "shared_bytes": record["shared_bytes"]})
    return {"kernels": kernels, "failures": failures, "spills": spills, "too_much_shared_memory": too_large}


def compile_all(operations: list[str], jobs: int) -> Outcome:
    """The summary of all operations; "csrc" stands for the CUDA C++ kernels."""
    import torch
    import triton

    architectures = compile_report.ARCHITECTURES
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        if operations == ["csrc"]:
            sources = sorted(compile_report.CSRC.glob("*.cu"))
            pairs = [(architecture, source) for architecture in architectures for source in sources]
            parts = list(pool.map(cuda_records, *zip(*pairs)))
            told = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
            compiler = {"nvcc": re.search(r"release ([\d.]+)", told)[1]}
        else:
            tasks = [(a, op, dtype) for a in architectures for op in operations for dtype in compile_report.DTYPES]
            parts = list(pool.map(records, *zip(*tasks)))
            compiler = {"triton": triton.__version__, "torch": torch.__version__}
    return {**compiler, **summary(record for part in parts for record in part)}


def installed_triton(version: str) -> Path:
    """The folder of a version of Triton, without its dependencies; installed if it is not there."""
    folder = BUILD / f"triton-{version}"
    if not (folder / "triton").is_dir():
        pip("install", "--no-deps", "--target", folder, f"triton=={version}")
    return folder


def of_triton(version: str, operations: list[str], jobs: int) -> Outcome:
    folder = None if version == NVCC else installed_triton(version)
    paths = [str(path) for path in (folder, ROOT) if path]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(BUILD / f"cache-{version}")}
    command = [sys.executable, "-m", "benchmarks.matrix", "--compile", *operations, "--jobs", str(jobs)]
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    outcome = json.loads(done.stdout.splitlines()[-1])
    if folder and outcome["triton"] != version:
        raise RuntimeError(f"Triton {outcome['triton']} was imported, not {version} from {folder}")
    return outcome


# ---- one version of PyTorch


def pip(*arguments: object, python: object = sys.executable) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, *arguments, "--quiet"]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def constraints(version: str) -> str:
    """The versions that are tested together, with another PyTorch, whose Triton is its own choice."""
    if version == "oldest":
        return (ROOT / "constraints-oldest.txt").read_text()
    pinned = (ROOT / "constraints.txt").read_text()
    return re.sub(r"^(torch|triton)==.*\n", "", pinned, flags=re.MULTILINE) + f"torch=={version}\n"


def environment(version: str) -> Path:
    """The Python of an environment with a version of PyTorch; made anew when its constraints change."""
    folder = BUILD / f"torch-{version}"
    made_with, wanted = folder / "constraints.txt", constraints(version)
    if not made_with.exists() or made_with.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        # Without pip: some Pythons have no ensurepip. That of this environment installs into the other one.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(wanted)
            file.flush()
            pip("install", "-c", file.name, "-e", ".[train]", *TOOLS, python=folder / "bin" / "python")
        made_with.write_text(wanted)
    return folder / "bin" / "python"


def counts(report: Path) -> Outcome:
    """How many tests passed and were skipped, and which failed, from pytest's JUnit report."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = []
    for case in cases:
        problem = next((part for part in case if part.tag in ("failure", "error")), None)
        if problem is not None:
            line = (problem.get("message") or "").strip().splitlines()
            failed.append({"test": f"{case.get('classname')}::{case.get('name')}", "error": line[0] if line else ""})
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - skipped - len(failed), "skipped": skipped, "failed": failed}


def of_torch(version: str) -> Outcome:
    python = environment(version)
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    names = ("torch", "triton", "transformers", "numpy")
    script = f"import json, importlib.metadata as m; print(json.dumps(dict((n, m.version(n)) for n in {names})))"
    told = subprocess.run([python, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([*command, *(f"tests/{name}" for name in TESTS)], cwd=ROOT, env=variables)
        if not report.exists():
            raise RuntimeError(f"pytest ran no test with PyTorch {version}")
        return {**json.loads(told), **counts(report)}


# ---- all of them


def outcome(kind: str, version: str, source: str, make: Any) -> Outcome:
    """What is kept of this version and this source in build/matrix/, or made now."""
    file = BUILD / f"{kind}-{version}.json"
    if file.exists() and (kept := json.loads(file.read_text()))["source"] == source:
        print(f"{kind} {version}: done before, with the same source")
        return kept
    started = time.perf_counter()
    print(f"{kind} {version} …", flush=True)
    began = {"source": source, "date": today(), "commit": commit()}
    found = {**began, **make(), "minutes": round((time.perf_counter() - started) / 60, 1)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def problems(found: Outcome) -> list[str]:
    """One line for each kernel that fails or spills, or test that fails."""
    lines = []
    for record in (*found.get("failures", ()), *found.get("spills", ()), *found.get("too_much_shared_memory", ())):
        *variant, (_, value) = [(key, record[key]) for key in record if key != "spills_in_loop"]
        name = " ".join(str(value) for _, value in variant)
        what = value if "error" in record else f"{value} bytes {'spilled' if 'spill_bytes' in record else 'shared'}"
        lines.append(f"{name}: {what}")
    return [*lines, *(f"{record['test']}: {record['error']}" for record in found.get("failed", ()))]


def store(found: dict[str, dict[str, Outcome]]) -> None:
    """Write RESULT: these outcomes by kind and version, in place of older ones."""
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    stored = {kind: dict(sorted({**before.get(kind, {}), **versions}.items())) for kind, versions in found.items()}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(stored, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__.split("\n")[0])
    parser.add_argument("--triton", nargs="*", choices=(*TRITONS, NVCC), help="only these versions of Triton")
    parser.add_argument("--torch", nargs="*", choices=TORCHES, help="only these versions of PyTorch")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels that are compiled at a time")
    parser.add_argument("--compile", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.compile:
        print(json.dumps(compile_all(arguments.compile, arguments.jobs)))
        return 0

    everything = arguments.triton is None and arguments.torch is None
    with_nvcc = [NVCC] if shutil.which(NVCC) else []
    tritons = [*TRITONS, *with_nvcc] if everything else arguments.triton or []
    torches = TORCHES if everything else arguments.torch or []
    found: dict[str, dict[str, Outcome]] = {"triton": {}, "torch": {}}
    for version in tritons:
        operations = ["csrc"] if version == NVCC else compile_report.operation_modules()
        found["triton"][version] = outcome(
            "triton",
            version,
            digest(COMPILED),
            lambda: of_triton(version, operations, arguments.jobs),  # noqa: B023
        )
        store(found)
    for version in torches:
        found["torch"][version] = outcome("torch", version, digest(TESTED), lambda: of_torch(version))  # noqa: B023
        store(found)
    wrong = {f"{kind} {name}": problems(of) for kind, group in found.items() for name, of in group.items()}
    for name, lines in wrong.items():
        print(f"{name}: {len(lines)} problems", *lines, sep="\n  ")
    print(f"written to {RESULT.relative_to(ROOT)}")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
