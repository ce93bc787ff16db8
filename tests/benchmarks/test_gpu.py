"""`make gpu`: the dry run leaves the same files; a failing or endless step stops no other."""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_python_that_is_given_is_used_as_it_is():
    with_their_own = make("-n", "gpu", "OUT=dir", "SUBJECT=norm", "PYTHON=python3").stdout
    assert with_their_own == "python3 -m benchmarks.gpu --out dir --subject norm\n"
    assert ".venv/bin/python -m benchmarks.gpu --out build/gpu" in make("-n", "gpu").stdout


@pytest.mark.parametrize(
    ("subject", "tests"),
    [
        ("norm", {"test_norm"}),
        ("attention", {"test_kernels", "test_decode"}),
        ("decode_attention", {"test_decode"}),
        ("tower", set()),
    ],
)
def test_tests_of_a_subject(subject: str, tests: set[str]):
    found = {Path(argument).stem for command in gpu.tests_commands(subject) for argument in command[7:]}
    assert tests <= found and bool(found) == bool(tests)
    assert found <= {Path(argument).stem for argument in gpu.tests_commands(None)[0][7:]}


@pytest.mark.skipif(not gpu.DRY, reason="a dry run is what happens where there is no GPU")
def test_a_dry_run_leaves_the_same_files(tmp_path: Path):
    out = tmp_path / "out"
    tables = {path: path.read_bytes() for path in (ROOT / "llava_fast/ops/tuned").glob("*.json")}
    done = make("gpu", f"OUT={out}", "SUBJECT=norm", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("No GPU: a dry run\n") or "\nNo GPU: a dry run\n" in done.stdout
    assert done.stdout.endswith("every step succeeded\n")
    assert sorted(path.name for path in out.iterdir()) == ["log", "results.json", "tuned.tar"]
    assert all(path.stat().st_size < 16 * 2**20 for path in out.iterdir())

    results = json.loads((out / "results.json").read_text())
    assert results["dry_run"] is True
    assert [step["step"] for step in results["steps"]] == ["extension", "tune", "tests", "benchmarks"]
    assert {step["outcome"] for step in results["steps"]} <= {"ok", "nothing to do"}
    cases = {(r["op"], r["direction"]) for r in results["records"]}
    assert cases == {(op, d) for op in ("rms_norm", "layer_norm") for d in ("forward", "forward+backward")}
    assert "\nlayer_norm 577x256 fp32 forward: " in done.stdout
    log = (out / "log").read_text()
    assert "norm_fwd 4096: 6 tiles agree; not timed, there is no GPU" in log
    with tarfile.open(out / "tuned.tar") as tar:
        for path, content in tables.items():
            assert tar.extractfile(path.relative_to(ROOT).as_posix()).read() == content == path.read_bytes()


@pytest.mark.slow
def test_a_failing_step_stops_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    endless = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('put away', flush=True)"
    monkeypatch.setattr(gpu, "extension_commands", lambda: [python("print('built')"), python("exit(3)"), python("1")])
    monkeypatch.setattr(gpu, "tune_commands", lambda subject: [python(endless)])
    monkeypatch.setattr(gpu, "tests_commands", lambda subject: [["/no/such/program"]])
    monkeypatch.setattr(gpu, "benchmarks_commands", lambda subject, results: [python("print('measured')")])
    monkeypatch.setattr(gpu, "LIMITS", {"extension": 5, "tune": 0.5, "tests": 5, "benchmarks": 30})
    log = io.FileIO(tmp_path / "log", "w")
    start = time.monotonic()
    outcomes = {step["step"]: step["outcome"] for step in gpu.steps(None, tmp_path, log)}
    assert time.monotonic() - start < 50
    assert outcomes["extension"].startswith("exit code 3: ")
    assert outcomes["tune"].startswith("out of time: ")
    assert "/no/such/program" in outcomes["tests"]
    assert outcomes["benchmarks"] == "ok"
    written = (tmp_path / "log").read_text()
    assert all(text in written for text in ("built", "put away", "measured"))


def test_failure_is_the_exit_code_and_the_files_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def steps(subject, measured, log):
        log.write(b"Traceback: the reason\n")
        yield {"step": "tests", "seconds": 1.0, "outcome": "exit code 1: pytest"}

    monkeypatch.setattr(gpu, "steps", steps)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "Traceback: the reason" in printed
    assert printed.endswith("failed: tests\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "results.json", "tuned.tar"]
    assert json.loads((tmp_path / "results.json").read_text())["records"] == []


def test_an_unknown_subject_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--subject", "norms"])
    assert "invalid choice: 'norms'" in capsys.readouterr().err


def test_every_test_file_for_a_gpu_is_run():
    (command,) = gpu.tests_commands("norm")
    assert command[-1] == ROOT / "tests/ops/test_norm.py"
    names = {path.name for path in gpu.tests_commands(None)[0] if isinstance(path, Path)}
    assert {"test_norm.py", "test_extension.py"} <= names
    assert "test_labels.py" not in names
    assert gpu.tests_commands("nothing of this name") == []
