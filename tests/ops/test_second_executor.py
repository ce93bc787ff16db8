"""Every kernel compiled and run on a CPU by a second executor, in bfloat16; and faults that it must report."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pkgutil import walk_packages

import pytest
import torch

from benchmarks.compile_report import examples_of, operation_modules
from llava_fast import ops
from llava_fast.ops._launch import recorded
from tests.ops.kernel_cases import CASES
from tests.ops.planted_faults import PLANTED, SOUND
from tests.ops.second_executor import variants


def kernels_of_the_library() -> set[str]:
    modules = (import_module(found.name) for found in walk_packages(ops.__path__, f"{ops.__name__}."))
    kernels = (value for module in modules for value in vars(module).values() if hasattr(value, "fn"))
    return {kernel.fn.__name__.strip("_") for kernel in kernels if kernel.fn.__name__.endswith("_kernel")}


def variants_of_the_library() -> set[str]:
    """What the operations' examples launch, which the compile report compiles."""
    with recorded(dry=True, architecture="sm_90") as launched:
        for operation in operation_modules():
            for example in examples_of(operation, torch.device("meta"), torch.bfloat16):
                example.call()
    return variants(launched)


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What became of the cases that the tests of this session ask for."""
    items = [item for item in request.session.items if item.path == request.path]
    names = [item.callspec.params["case"] for item in items if hasattr(item, "callspec")]
    if any(item.originalname == "test_every_kernel_has_a_case" for item in items):
        names = [*CASES, *(name for name in names if name not in CASES)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.second_executor", *names],
        cwd=request.config.rootpath,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {report["case"]: report for report in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", [*CASES, *SOUND])
def test_case(case: str, reports: dict[str, dict]) -> None:
    assert reports[case]["fault"] == ""


@pytest.mark.parametrize("case", PLANTED)
def test_planted_fault(case: str, reports: dict[str, dict]) -> None:
    assert PLANTED[case][0] in reports[case]["fault"]


def test_every_kernel_has_a_case(reports: dict[str, dict]) -> None:
    run = {kernel for case in CASES for kernel in reports[case]["kernels"]}
    assert "gemm_kernel" in kernels_of_the_library()
    assert "norm_fwd_kernel CENTRED=True" in variants_of_the_library()
    assert (kernels_of_the_library() | variants_of_the_library()) - run == set()
