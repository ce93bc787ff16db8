"""The plugin that notes which kernels the tests ran."""

import json
import subprocess
import sys
from pathlib import Path

from tests.evidence import ROOT

CASES = """
import pytest, torch
from llava_fast.backend import use_backend
from llava_fast.ops.activation import swiglu
from llava_fast.ops._launch import recorded

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("good", [True, False])
def test_case(dtype, good):
    with use_backend("triton", "swiglu"):
        swiglu(torch.randn(3, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype))
    assert good

def test_without_a_kernel():
    swiglu(torch.randn(3, 4), torch.randn(3, 4))

def test_that_counts_launches_itself():
    x = torch.randn(3, 4)
    for _ in range(2):
        with use_backend("triton", "swiglu"), recorded() as launched:
            swiglu(x, x)
        assert len(launched) == 1

def test_dry():
    with use_backend("triton", "swiglu"), recorded(dry=True) as launched:
        swiglu(torch.randn(3, 4).half(), torch.randn(3, 4).half())
    assert len(launched) == 1
"""


def test_only_tests_that_pass_count(tmp_path: Path):
    (tmp_path / "test_cases.py").write_text(CASES)
    file = tmp_path / "evidence.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.evidence",
        "--evidence",
        file,
        "-p",
        "no:cacheprovider",
    ]
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-p", "tests.conftest", tmp_path]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert "2 failed, 5 passed" in done.stdout, done.stdout + done.stderr
    assert json.loads(file.read_text())["interpreter"] == {"activation_fwd_kernel": {"fp16": 1, "fp32": 2}}
