"""Writes docs/evidence.md: what is known of each kernel without a GPU, and with one. `make docs` runs it.

Kernels and operations are read from the sources, the rest from benchmarks/evidence/ (`make matrix`, `make evidence`)
and from the results of GPUs in benchmarks/results/.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPS, CSRC = ROOT / "llava_fast" / "ops", ROOT / "csrc"
EVIDENCE, RESULTS = ROOT / "benchmarks" / "evidence", ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "evidence.md"
ARCHITECTURES = ("sm_80", "sm_90")
NONE = "none yet"

INTRO = """\
# Evidence

<!-- written by `make docs` from benchmarks/evidence/ and benchmarks/results/; edits here are lost -->

What each kernel has been through. A cell with "none yet" is a gap. What is stored is true of the commit that is named
with it; kernels and tiles may have changed since.

- **Reference**: the operations that launch the kernel and have a reference in plain PyTorch to be tested against.
- **Interpreter**: dtypes in which tests run the kernel on a CPU, in Triton's interpreter; how many such tests passed.
- **Second executor**: cases in bf16 in which the compiled IR ran on a CPU, without an access out of bounds, a race, or
  a result that depends on memory nobody wrote.
- **Emulator**: tests in which the CUDA C++ function ran on a CPU, in an emulated GPU.
- **Compiled**: the versions of the compiler with which all variants and shipped tiles compile without spills, for A100
  (sm_80) and H100 (sm_90).
- **Budget**: the kernel is part of a pass whose launches are counted and limited.
- **GPU**: the machines of which `benchmarks/results/` has a verified measurement of the operation.
"""


def stored(name: str) -> dict[str, Any]:
    """A file of benchmarks/evidence/; empty where it was not made yet."""
    file = EVIDENCE / name
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def triton_kernels() -> dict[str, Path]:
    """The file of each Triton kernel: functions under `jit` whose name ends in _kernel."""
    found = {}
    for file in sorted(OPS.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            decorated = isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "jit" for d in node.decorator_list)
            if decorated and node.name.endswith("_kernel"):
                found[node.name.strip("_")] = file
    return found


def cuda_kernels() -> dict[str, Path]:
    """The file of each CUDA C++ kernel."""
    return {
        name: file
        for file in sorted(CSRC.glob("*.cu"))
        for name in re.findall(r"__global__.*?\b(\w+_kernel)\s*\(", file.read_text(encoding="utf-8"), re.DOTALL)
    }


def files_of(file: Path) -> set[Path]:
    """The files whose operations launch the kernels of a file: itself, and what imports a launcher or a kernel of it.

    A file of a private name, or of a folder, may serve several operations; any other is one operation.
    """
    if file.parent == OPS and not file.name.startswith("_"):
        return {file}
    nodes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    launchers = {node.name for node in nodes if not node.decorator_list or node.name.endswith("_kernel")}
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    found = {file}
    for other in OPS.rglob("*.py"):
        for node in ast.walk(ast.parse(other.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == module:
                found |= {other} if launchers & {alias.name for alias in node.names} else set()
    return found


def references(files: Iterable[Path]) -> dict[str, str]:
    """The reference of each operation that is registered in the files."""
    registered = re.compile(r'^register\("(\w+)", "reference", (\w+)\)', re.MULTILINE)
    return dict(pair for file in sorted(files) for pair in registered.findall(file.read_text(encoding="utf-8")))


def tests_cell(counts: Mapping[str, int]) -> str:
    order = ("fp32", "fp16", "bf16", "integers")
    return ", ".join(f"{dtype} ({counts[dtype]})" for dtype in order if dtype in counts) or NONE


def compiled_cell(kernel: str, architecture: str, versions: Mapping[str, Any]) -> str:
    """The versions that compile all variants of the kernel, and what is wrong with others."""
    cells = []
    for version, found in versions.items():
        counts = found["kernels"].get(kernel, {}).get(architecture)
        if counts is None:
            continue
        wrong = [f"{counts[what]} {what}" for what in ("failed", "spilling") if counts[what]]
        wrong += ["too much shared memory"] * any(
            (record["kernel"], record["arch"]) == (kernel, architecture) for record in found["too_much_shared_memory"]
        )
        cells.append(f"{version} ({', '.join(wrong)})" if wrong else version)
    return ", ".join(cells) or NONE


def gpus(operations: Iterable[str]) -> str:
    """The GPUs that measured one of the operations by kernel."""
    wanted, found = set(operations), []
    for folder in sorted(RESULTS.iterdir()) if RESULTS.is_dir() else ():
        records = [
            record
            for file in (folder.glob("*.json") if folder.is_dir() and folder.name != "cpu" else ())
            for record in json.loads(file.read_text(encoding="utf-8"))["records"]
        ]
        if any(record["op"] in wanted and record["provider"] in ("triton", "cuda") for record in records):
            found.append(folder.name)
    return ", ".join(found) or NONE


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def nvcc_and_tritons() -> tuple[dict[str, Any], dict[str, Any]]:
    """What nvcc compiled, and what the versions of Triton did."""
    versions = stored("versions.json").get("triton", {})
    nvcc = {f"nvcc {found['nvcc']}": found for found in versions.values() if "nvcc" in found}
    return nvcc, {name: found for name, found in versions.items() if "nvcc" not in found}


def kernel_tables() -> list[str]:
    evidence = stored("tests.json")
    tests: Mapping[str, Any] = evidence.get("tests", {})
    nvcc, tritons = nvcc_and_tritons()
    rows = []
    for kernel, file in triton_kernels().items():
        known = references(files_of(file))
        ran = {executor: tests_cell(found.get(kernel, {})) for executor, found in tests.items()}
        budget = ("counted" if kernel in evidence["budgets"] else "not in one") if evidence else NONE
        rows.append(
            [
                f"`{kernel}`",
                ", ".join(f"`{name}`" for name in known) or NONE,
                *(ran.get(executor, NONE) for executor in ("interpreter", "second executor")),
                *(compiled_cell(kernel, architecture, tritons) for architecture in ARCHITECTURES),
                *(budget, gpus(known)),
            ]
        )
    heads = [f"compiled for {architecture}" for architecture in ARCHITECTURES]
    triton = table(["kernel", "reference", "interpreter", "second executor", *heads, "budget", "GPU"], rows)

    rows = []
    for kernel, file in cuda_kernels().items():
        emulated = tests_cell(tests.get("emulator", {}).get(f"{file.stem}_forward", {}))
        compiled = (compiled_cell(kernel, architecture, nvcc) for architecture in ARCHITECTURES)
        known = file.stem in references(OPS.rglob("*.py"))
        rows.append([f"`{kernel}`", f"`{file.stem}`" if known else NONE, emulated, *compiled, gpus([file.stem])])
    cuda = table(["kernel", "reference", "emulator", *heads, "GPU"], rows)
    when = f"Tests of {evidence['date']}, commit `{evidence['commit']}`." if evidence else "No tests are stored yet."
    return ["## Triton kernels", triton, "## CUDA C++ kernels", cuda, when]


def made(found: Mapping[str, Any]) -> list[str]:
    return [found["date"], f"`{found['commit']}`"]


def version_tables() -> list[str]:
    versions = stored("versions.json")
    if not versions:
        return ["## Versions", "None is stored yet: `make matrix`."]
    nvcc, tritons = nvcc_and_tritons()
    rows, wrong = [], []
    for name, found in {**{f"Triton {version}": of for version, of in tritons.items()}, **nvcc}.items():
        counts = [counts for of in found["kernels"].values() for counts in of.values()]
        numbers = [sum(count[what] for count in counts) for what in ("compiled", "failed", "spilling")]
        rows.append([name, *numbers, len(found["too_much_shared_memory"]), *made(found)])
        for record in (*found["failures"], *found["spills"], *found["too_much_shared_memory"]):
            spilled = f"{record.get('spill_bytes')} bytes spilled, {record.get('spills_in_loop')} accesses in a loop"
            shared = f"{record.get('shared_bytes')} bytes of shared memory"
            what = record.get("error") or (spilled if "spill_bytes" in record else shared)
            settings = " ".join(f"{key.removeprefix('BLOCK_')}={value}" for key, value in record["tile"].items())
            wrong.append([name, f"`{record['kernel']}`", record["arch"], record["dtype"], settings, what])
    parts = [
        "## Compilers",
        "Every kernel with every shipped tile, in bf16, fp16 and fp32, for sm_80 and sm_90: `make matrix`.",
        table(["version", "compiled", "failed", "spilling", "too much shared memory", "date", "commit"], rows),
    ]
    if wrong:
        parts.append(table(["version", "kernel", "architecture", "dtype", "tile", "problem"], wrong))
    rows, wrong = [], []
    for name, found in versions["torch"].items():
        packages = [found[package] for package in ("torch", "triton", "transformers", "numpy")]
        rows.append([name, *packages, found["passed"], len(found["failed"]), *made(found)])
        wrong += [[name, f"`{record['test']}`", record["error"]] for record in found["failed"]]
    heads = ["version", "torch", "triton", "transformers", "numpy", "passed", "failed", "date", "commit"]
    parts += [
        "## Versions of PyTorch",
        'Tests of operations (in the interpreter), model, checkpoints and processor, without the slow ones. "oldest": '
        "the oldest version of every package that is allowed.",
        table(heads, rows) if rows else "None is stored yet.",
    ]
    if wrong:
        parts.append(table(["version", "test", "problem"], wrong))
    return parts


def page() -> str:
    """The text of docs/evidence.md."""
    return "\n\n".join([INTRO.strip(), *kernel_tables(), *version_tables()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
