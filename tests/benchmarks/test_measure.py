"""The measuring process: most wanted first, stored case by case, and never the same twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness, measure, report
from benchmarks.harness import Case, Measurement
from llava_fast.backend import BackendUnavailable

ROOT = Path(__file__).resolve().parents[2]


def made(op: str, rows: int, *providers: str) -> Case:
    return Case(
        op=op,
        shape=(rows, 4),
        dtype=torch.float32,
        backward=False,
        inputs=lambda: {"x": torch.ones(rows, 4)},
        reference=lambda x: (x * 2,),
        providers={name: harness.function(lambda x: (x * 2,)) for name in providers},
        bytes_moved=32 * rows,
        flops=4 * rows,
    )


@pytest.fixture
def results(tmp_path: Path) -> measure.Results:
    return measure.Results(tmp_path / "results.json")


@pytest.fixture
def subjects(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two subjects of two cases each; the first has a provider that compiles for long."""
    cases = {
        "first": [("first", 1, "torch", "compile", "reference"), ("first", 2, "torch", "reference")],
        "second": [("second", 1, "torch", "reference"), ("second", 2, "torch", "reference")],
    }
    monkeypatch.setattr(measure, "cases_of", lambda name: [made(*case) for case in cases[name]])
    monkeypatch.setattr(measure, "FIRST", {"first": 10, "second": 10})
    monkeypatch.setattr(harness, "SECONDS_PER_CASE", 0.0)
    return [*cases]


def names(cases) -> list[str]:
    return [f"{case.op} {case.shape[0]} {' '.join(case.providers)}" for case in cases]


def test_what_compiles_for_long_comes_last(subjects: list[str], results: measure.Results):
    assert names(measure.in_order(subjects, results)) == [
        *("first 1 torch reference", "first 2 torch reference"),
        *("second 1 torch reference", "second 2 torch reference"),
        # Nothing was stored meanwhile, so all are due again; those without such a provider would be settled.
        *("first 1 torch compile reference", "first 2 torch reference"),
        *("second 1 torch reference", "second 2 torch reference"),
    ]


def test_a_subject_beyond_its_time_waits_for_the_others(subjects: list[str], results: measure.Results):
    now = iter([0.0, 5.0, 15.0, 15.0, 25.0])  # the first case takes longer than its subject has
    order = names(measure.in_order(subjects, results, clock=now.__next__))
    assert [name[:8] for name in order[:4]] == ["first 1 ", "second 1", "first 2 ", "second 2"]


def test_everything_is_stored_at_once_and_nothing_measured_twice(subjects: list[str], results: measure.Results):
    lines = measure.measure(subjects, results, 60.0)
    assert next(lines) == "first 1x4 fp32 forward: 2 measured"
    stored = json.loads(results.path.read_text())
    assert [(r["op"], r["shape"], r["provider"]) for r in stored["records"]] == [
        *(("first", "1x4", "torch"), ("first", "1x4", "reference"))
    ]
    lines.close()

    again = measure.Results(results.path)
    lines = list(measure.measure(subjects, again, 60.0))
    assert lines == [
        *("first 2x4 fp32 forward: 2 measured", "second 1x4 fp32 forward: 2 measured"),
        *("second 2x4 fp32 forward: 2 measured", "first 1x4 fp32 forward: 3 measured"),
    ]
    providers = [r["provider"] for r in again.content["records"] if (r["op"], r["shape"]) == ("first", "1x4")]
    assert providers == ["torch", "compile", "reference"]  # measured in turns, in place of the first two
    assert len(again.content["records"]) == 9
    assert list(measure.measure(subjects, measure.Results(results.path), 60.0)) == []


def test_no_case_begins_after_the_end(subjects: list[str], results: measure.Results):
    assert list(measure.measure(subjects, results, -1.0)) == ["out of time; the next call goes on here"]
    assert results.content["records"] == []


def test_what_has_no_record_has_a_reason(results: measure.Results):
    case = made("norm", 1, "torch", "reference", "liger")
    found = Measurement([1.0, 1.0], 0, 0.0, "perf_counter")
    errors = {"reference": AssertionError("reference: relative error\nmore"), "liger": BackendUnavailable("no liger")}
    results.add(case, {"torch": found, **errors})
    assert results.has(case)
    assert [(a["provider"], a["reason"]) for a in results.content["absent"]] == [
        ("reference", "AssertionError: reference: relative error"),
        ("liger", "BackendUnavailable: no liger"),
    ]
    assert not results.has(made("norm", 1, "torch", "flex"))
    assert not results.has(made("norm", 2, "torch"))


def test_libraries_that_are_not_there_are_named(results: measure.Results):
    missing = results.content["missing"]
    assert missing["flash_attn_3"] == "FlashAttention-3 is not installed"
    assert "liger" not in missing  # it is installed where tests run
    assert all(missing.values())


def test_a_case_that_kills_twice_is_given_up(results: measure.Results):
    case = made("norm", 1, "torch")
    for _ in range(2):
        results.started(case)
        assert not results.has(case)
        results = measure.Results(results.path)
    assert results.has(case)
    assert results.content["absent"][0]["reason"] == "the process died twice while this was measured"


def test_another_commit_begins_anew(results: measure.Results):
    results.add(made("norm", 1, "torch"), {"torch": Measurement([1.0], 0, 0.0, "perf_counter")})
    stored = json.loads(results.path.read_text())
    stored["run"]["code"] = "another"
    results.path.write_text(json.dumps(stored))
    assert measure.Results(results.path).content["records"] == []
    before = json.loads(results.path.with_name("results.before.json").read_text())
    assert len(before["records"]) == 1


def test_results_that_are_put_aside_are_kept(results: measure.Results):
    for content in ("{", "[]", json.dumps({"run": {"code": "another"}, "records": []})):
        results.path.write_text(content)
        assert measure.Results(results.path).content["records"] == []
    aside = [results.path.with_name(f"results.before{suffix}.json").read_text() for suffix in ("", "-2", "-3")]
    assert aside == ["{", "[]", json.dumps({"run": {"code": "another"}, "records": []})]


def test_a_file_that_cannot_be_imported_stops_no_other(
    subjects: list[str], results: measure.Results, monkeypatch: pytest.MonkeyPatch
):
    of_others = measure.cases_of
    monkeypatch.setattr(measure, "cases_of", lambda name: 1 // 0 if name == "broken" else of_others(name))
    lines = list(measure.measure(["broken", *subjects], results, 60.0))
    assert lines[0] == "benchmarks/test_broken.py: ZeroDivisionError: integer division or modulo by zero"
    assert len(results.content["records"]) == 9
    assert "benchmarks/test_broken.py" in json.loads(results.path.read_text())["missing"]


def test_every_benchmark_has_cases():
    """Where a GPU is and where none is; those of a CPU alone have none on a GPU."""
    on_a_gpu = {name for name in measure.subjects() if measure.gpu_cases(name)}
    assert {*measure.subjects()} - on_a_gpu == {"generate", "host"}
    assert {*measure.FIRST} <= on_a_gpu


def test_a_case_beyond_its_time_ends_the_process(tmp_path: Path):
    code = (
        "import time, benchmarks.measure as measure, tests.benchmarks.test_measure as tests\n"
        "measure.CASE_SECONDS = 0.5\n"
        "case = tests.made('norm', 1, 'torch')\n"
        "measure.harness.measured = lambda case: time.sleep(60)\n"
        "measure.cases_of = lambda name: [case]\n"
        f"results = measure.Results(measure.Path({str(tmp_path / 'results.json')!r}))\n"
        "list(measure.measure(['norm'], results, 60.0))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == measure.AGAIN, done.stderr
    assert "time.sleep" in done.stderr or "in <lambda>" in done.stderr  # where it was
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [a["reason"] for a in stored["absent"]] == ["longer than 0 s"] and "measuring" not in stored


def test_part_of_a_run_can_be_reported(results: measure.Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`make report ADD=FILE` takes a file in which a case is in progress and others are absent."""
    results.add(made("rms_norm", 1, "torch"), {"torch": Measurement([1.0, 1.0], 1024, 0.0, "cuda graph")})
    results.give_up({**made("rms_norm", 2, "torch").identity}, "longer than 75 s")
    results.started(made("rms_norm", 3, "torch"))
    content = json.loads(results.path.read_text())
    content["dry_run"], content["run"] = False, {**content["run"], "device": "nvidia-h100", "gpu": "NVIDIA H100"}
    results.path.write_text(json.dumps(content))
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        (tmp_path / name).write_text(f"{report.START}\n{report.END}")
    options = ["--add", results.path, "--results", tmp_path / "stored", "--root", tmp_path]
    assert report.main([str(option) for option in options]) == 0
    stored = json.loads(Path(capsys.readouterr().out.strip()).read_text())
    assert [r["provider"] for r in stored["records"]] == ["torch"]
    assert "NVIDIA H100" in (tmp_path / "docs/benchmarks.md").read_text()
