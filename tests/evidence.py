"""Which kernels the tests ran, by which executor and in which dtype: benchmarks/evidence/tests.json.

    python -m tests.evidence [PYTEST ARGUMENTS]

Runs the tests of operations and of csrc/ with this module as a plugin (`pytest -p tests.evidence --evidence FILE`),
the cases of the second executor, and a dry count of the budgets. Only what passed counts. `make evidence` also makes
docs/evidence.md of it.

An executor is "interpreter" (Triton's, on a CPU), "second executor" (tests/ops/second_executor.py), "emulator" (of CUDA
C++: tests/csrc/) or "gpu". The emulator is given a function of the extension, such as rms_norm_forward, not a kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "evidence" / "tests.json"
TESTS = [str(ROOT / "tests" / name) for name in ("ops", "csrc") if (ROOT / "tests" / name).is_dir()]
SECOND_EXECUTOR = "tests.ops.second_executor"
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

Ran = set[tuple[str, str, str]]  # executor, kernel, dtype


def dtype_of(tensors: list[torch.Tensor]) -> str:
    """The dtype in which a kernel was tested: bf16 or fp16 where one tensor has it; sums are fp32."""
    found = {tensor.dtype for tensor in tensors}
    wanted = (torch.bfloat16, torch.float16, torch.float32)
    return next((NAMES[dtype] for dtype in wanted if dtype in found), "integers")


# ---- the plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence", metavar="FILE", help="write how many tests ran each kernel to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--evidence"):
        config.pluginmanager.register(_Recorder(Path(config.getoption("--evidence"))))


class _Recorder:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.tests: dict[str, dict[str, dict[str, int]]] = {}  # passed tests by executor, kernel, dtype

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        from llava_fast.ops import _launch

        class Run(list[_launch.Launch]):
            def append(self, launch: _launch.Launch) -> None:
                if not _launch._dry and hasattr(
                    launch.kernel, "fn"
                ):  # a dry launch, or a test's stand-in, runs nothing
                    super().append(launch)

        ran: Ran = set()
        launched = Run()
        with mock.patch.object(_launch, "_records", [launched]), _emulated(ran):
            result = yield  # raises where the test fails
        for launch in launched:
            tensors = [x for x in launch.args if isinstance(x, torch.Tensor)]
            if tensors and not tensors[0].is_meta:
                executor = "gpu" if tensors[0].is_cuda else "interpreter"
                ran.add((executor, launch.name.strip("_"), dtype_of(tensors)))
        for executor, kernel, dtype in ran:
            dtypes = self.tests.setdefault(executor, {}).setdefault(kernel, {})
            dtypes[dtype] = dtypes.get(dtype, 0) + 1
        return result

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(self.tests), encoding="utf-8")


def _emulated(ran: Ran) -> Any:
    """Note, inside the block, which functions of the extension run in the emulator."""
    if find_spec("tests.csrc") is None:
        return mock.MagicMock()
    emulated = import_module("tests.csrc.emulated")
    call = emulated.call

    def noted(library: Path, function: str, memory: Any, **arguments: Any) -> Any:
        results = call(library, function, memory, **arguments)
        if memory:  # without it nothing is launched
            ran.add(("emulator", function, NAMES[getattr(torch, arguments.get("dtype", "float32"))]))
        return results

    return mock.patch.object(emulated, "call", noted)


# ---- everything


def by_the_tests(arguments: list[str]) -> dict[str, Any]:
    """What the plugin finds in a run of TESTS; tests may fail: they count for nothing."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "evidence.json"
        plugin = ["-p", "tests.evidence", "--evidence", str(file), "-p", "no:cacheprovider"]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *plugin, *TESTS, *arguments], cwd=ROOT)
        return json.loads(file.read_text())


def by_the_second_executor() -> dict[str, Any]:
    """Cases that ran each kernel without a fault, all in bf16."""
    if find_spec(SECOND_EXECUTOR) is None or find_spec("ttsem") is None:
        return {}
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    names = list(import_module(SECOND_EXECUTOR).CASES)
    command = [sys.executable, "-m", SECOND_EXECUTOR, *names]
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    kernels: dict[str, dict[str, int]] = {}
    for case in map(json.loads, filter(None, done.stdout.splitlines())):
        for kernel in () if case["fault"] else case["kernels"]:
            dtypes = kernels.setdefault(kernel, {"bf16": 0})
            dtypes["bf16"] += 1
    return {"second executor": kernels}


def in_budgets() -> list[str]:
    """Kernels that the passes with a budget launch."""
    from benchmarks import budgets
    from llava_fast.ops._launch import recorded

    with recorded() as launched:
        budgets.counted()
    return sorted({launch.name.strip("_") for launch in launched})


def main(arguments: list[str]) -> None:
    from benchmarks.records import commit

    os.environ["TRITON_INTERPRET"] = "1"  # on CPU tensors, kernels are only offered in the interpreter
    tests = {**by_the_tests(arguments), **by_the_second_executor()}
    result = {
        **{"date": datetime.now(timezone.utc).date().isoformat(), "commit": commit()},
        **{"torch": torch.__version__, "budgets": in_budgets()},
        "tests": tests,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"written to {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
