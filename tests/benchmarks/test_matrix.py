"""What the matrix of versions makes of compilations and of tests, good and bad ones."""

import os
from pathlib import Path

from benchmarks import compile_report, matrix


def test_what_is_wrong_is_counted_and_listed():
    variant = {"kernel": "a_kernel", "arch": "sm_80", "dtype": "bf16", "tile": {"BLOCK": 16}, "flags": {}}
    clean = {"spill_bytes": 0, "spill_instructions": 0, "spills_in_loop": 0, "shared_bytes": 512}
    limit = compile_report.SHARED_LIMIT["sm_80"]
    found = matrix.summary(
        [
            {**variant, **clean},
            {**variant, **clean, "spill_bytes": 16, "spill_instructions": 4},
            {**variant, **clean, "shared_bytes": limit + 1},
            {**variant, "error": "it does not compile"},
        ]
    )
    counts = {"compiled": 3, "failed": 1, "spilling": 1, "shared_bytes": limit + 1}
    assert found["kernels"] == {"a_kernel": {"sm_80": counts}}
    name = "a_kernel sm_80 bf16 {'BLOCK': 16} {}"
    wrong = ["it does not compile", "16 bytes spilled", f"{limit + 1} bytes shared"]
    assert matrix.problems(found) == [f"{name}: {what}" for what in wrong]


def test_the_compilers_own_error_is_the_reason():
    with matrix.standard_error() as said:
        os.write(2, b"kernel.py:7:1: error: 'arith.maxnumf' op requires the same encoding\nnote: more\n")
    assert (
        matrix.reason(RuntimeError("PassManager::run failed"), said) == "'arith.maxnumf' op requires the same encoding"
    )
    assert matrix.reason(RuntimeError("PassManager::run failed\nmore"), []) == "RuntimeError: PassManager::run failed"


def test_tests_are_counted_by_their_outcome(tmp_path: Path):
    report = tmp_path / "report.xml"
    cases = ["/>", "><skipped/></testcase>", "><failure message='assert 1 == 2&#10;more'/></testcase>"]
    tests = "".join(f"<testcase classname='tests.a' name='test_{i}'{case}" for i, case in enumerate(cases))
    report.write_text(f"<testsuites><testsuite>{tests}</testsuite></testsuites>")
    failed = [{"test": "tests.a::test_2", "error": "assert 1 == 2"}]
    assert matrix.counts(report) == {"passed": 1, "skipped": 1, "failed": failed}


def test_other_versions_of_pytorch_choose_their_triton():
    wanted = matrix.constraints("2.14.1").splitlines()
    assert "torch==2.14.1" in wanted and not any(line.startswith("triton") for line in wanted)
    assert any(line.startswith("transformers==") for line in wanted)


def test_a_version_is_done_once_for_a_source(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(matrix, "BUILD", tmp_path)
    made: list[str] = []

    def make() -> dict:
        made.append("made")
        return {"passed": 3}

    first = matrix.outcome("torch", "1.0", "source", make)
    assert matrix.outcome("torch", "1.0", "source", make) == first and made == ["made"]
    assert matrix.outcome("torch", "1.0", "another", make)["source"] == "another" and len(made) == 2
