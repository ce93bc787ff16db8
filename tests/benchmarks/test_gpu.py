"""`make gpu`: the dry run leaves the same files; a killed one goes on; a failing or endless step stops no other."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu, measure

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
    folders = make("-n", "gpu", "OUT=dir", "CACHE=a", "WHEELS=b", "RESUME=c", "PYTHON=python3").stdout
    assert folders == "python3 -m benchmarks.gpu --out dir --cache a --wheels b --resume c\n"
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
    """Killed in the middle, then run to the end."""
    out = tmp_path / "out"
    tables = {path: path.read_bytes() for path in (ROOT / "llava_fast/ops/tuned").glob("*.json")}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--subject", "norm"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        while first.poll() is None and len(stored(out)["records"]) < 6:
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    killed = stored(out)
    assert 6 <= len(killed["records"]) < 24

    done = make("gpu", f"OUT={out}", "SUBJECT=norm", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stdout
    assert "No GPU: a dry run\n" in done.stdout
    assert f"\n{len(killed['records'])} records so far\n" in done.stdout
    assert done.stdout.endswith("every step succeeded\n")
    assert sorted(p.name for p in out.iterdir()) == ["log", "results.json", "tuned.tar", "tuning.json"]
    assert all(path.stat().st_size < 16 * 2**20 for path in out.iterdir())

    results = stored(out)
    assert results["dry_run"] is True
    assert results["records"][: len(killed["records"])] == killed["records"]  # not measured again
    assert [step["step"] for step in results["steps"]] == [*gpu.LIMITS]
    assert {step["outcome"] for step in results["steps"]} <= {"ok", "nothing to do"}
    cases = {(r["op"], r["direction"]) for r in results["records"]}
    assert cases == {(op, d) for op in ("rms_norm", "layer_norm") for d in ("forward", "forward+backward")}
    assert "flash_attn_3" in results["missing"]
    assert "\nlayer_norm 577x256 fp32 forward: " in done.stdout
    assert "norm_fwd 4096: 6 tiles agree; not timed, there is no GPU" in (out / "log").read_text()
    with tarfile.open(out / "tuned.tar") as tar:
        for path, content in tables.items():
            assert tar.extractfile(path.relative_to(ROOT).as_posix()).read() == content == path.read_bytes()


def stored(out: Path) -> dict:
    """What a reader finds at any moment: nothing, or a whole file."""
    file = out / "results.json"
    return json.loads(file.read_text()) if file.exists() else {"records": []}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.slow
def test_a_failing_step_stops_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    endless = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('put away', flush=True)"
    counted = tmp_path / "counted"
    again = f"from pathlib import Path; p = Path({str(counted)!r}); n = p.exists(); p.touch(); exit(0 if n else 75)"
    monkeypatch.setattr(gpu, "wheels_commands", lambda wheels: [["/no/such/wheel"], python("print('installed')")])
    monkeypatch.setattr(gpu, "extension_commands", lambda: [python("print('built')"), python("exit(3)"), python("1")])
    monkeypatch.setattr(gpu, "tune_commands", lambda subject, out, seconds: [python(endless)])
    monkeypatch.setattr(gpu, "tests_commands", lambda subject: [["/no/such/program"]])
    monkeypatch.setattr(gpu, "benchmarks_commands", lambda *_: [python(again), python("print('measured')")])
    monkeypatch.setattr(gpu, "LIMITS", {"tune": 0.5, "wheels": 10, "extension": 10, "benchmarks": 30, "tests": 5})
    (tmp_path / "results.json").write_text("{}")
    with io.FileIO(tmp_path / "log", "w") as log:
        found = gpu.steps(None, tmp_path, log, cache=None, wheels=None, seconds=55.5)
        outcomes = {step["step"]: step["outcome"] for step in found}
    assert "/no/such/wheel" in outcomes["wheels"]
    assert outcomes["extension"].startswith("exit code 3: ")
    assert outcomes["benchmarks"] == "ok"
    assert "/no/such/program" in outcomes["tests"]
    assert outcomes["tune"].startswith("out of time: ")
    written = (tmp_path / "log").read_text()
    assert all(text in written for text in ("installed", "built", "put away", "measured"))
    assert written.count("exit(0 if n else 75)") == 2


def test_commands_die_with_the_run(tmp_path: Path):
    """Even if it is killed: nothing is left that goes on using the GPU."""
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import io, sys, time\nfrom benchmarks import gpu\n"
        f"gpu.run([[sys.executable, '-c', {child!r}]], time.monotonic() + 60, io.FileIO('/dev/null', 'w'), {{}})"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        parent.kill()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}/stat").exists()


def test_unused_time_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    given = {}
    for name in ("wheels", "extension", "kernels", "tests"):
        monkeypatch.setattr(gpu, f"{name}_commands", lambda *_: [])
    monkeypatch.setattr(gpu, "benchmarks_commands", lambda names, s, r, left: given.setdefault(len(given), left) and [])
    monkeypatch.setattr(gpu, "tune_commands", lambda subject, out, left: given.setdefault("tune", left) and [])
    found = [*gpu.steps(None, tmp_path, io.BytesIO(), cache=None, wheels=None, seconds=285.0)]
    assert [step["outcome"] for step in found] == ["nothing to do"] * len(gpu.LIMITS)
    total = sum(gpu.LIMITS.values())
    before = 285 / total  # half of the usual time
    assert given[0] == pytest.approx(before * sum(gpu.LIMITS[n] for n in ("wheels", "kernels", "first")), abs=1)
    assert given["tune"] == pytest.approx(285 - before * gpu.LIMITS["rest"], abs=1)


def test_tests_that_passed_are_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("wheels", "extension", "kernels", "benchmarks", "tune"):
        monkeypatch.setattr(gpu, f"{name}_commands", lambda *_: [])
    monkeypatch.setattr(gpu, "tests_commands", lambda subject: [python("exit(1)")])
    for outcome in ("ok", "exit code 1: pytest"):
        steps = [{"step": "tests", "seconds": 1.0, "outcome": outcome}]
        (tmp_path / "results.json").write_text(json.dumps({"steps": steps}))
        with io.FileIO(tmp_path / "log", "w") as log:
            found = [*gpu.steps(None, tmp_path, log, cache=None, wheels=None, seconds=60.0)]
        (tests,) = (step["outcome"] for step in found if step["step"] == "tests")
        assert (tests == "ok") == (outcome == "ok")


def test_failure_is_the_exit_code_and_the_files_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def steps(subject, out, log, **options):
        log.write(b"Traceback: the reason\n")
        log.flush()
        yield {"step": "tests", "seconds": 1.0, "outcome": "exit code 1: pytest"}
        assert stored(out)["steps"] == [{"step": "tests", "seconds": 1.0, "outcome": "exit code 1: pytest"}]

    monkeypatch.setattr(gpu, "steps", steps)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "Traceback: the reason" in printed
    assert printed.endswith("failed: tests\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "results.json", "tuned.tar", "tuning.json"]
    assert stored(tmp_path)["records"] == []


def test_results_can_come_from_elsewhere(tmp_path: Path):
    (tmp_path / "earlier").mkdir()
    for name in ("results.json", "tuning.json"):
        (tmp_path / "earlier" / name).write_text(name)
    gpu.prepare(tmp_path / "out", tmp_path / "earlier" / "results.json")
    assert (tmp_path / "out/tuning.json").read_text() == "tuning.json"
    (tmp_path / "out/results.json").write_text("its own")
    gpu.prepare(tmp_path / "out", tmp_path / "earlier" / "results.json")
    assert (tmp_path / "out/results.json").read_text() == "its own"


def test_wheels_are_installed_one_by_one(tmp_path: Path):
    for name in ("a-1-py3-none-any.whl", "b-1-py3-none-any.whl", "notes.txt"):
        (tmp_path / name).touch()
    commands = gpu.wheels_commands(tmp_path)
    assert [Path(command[-1]).name for command in commands] == ["a-1-py3-none-any.whl", "b-1-py3-none-any.whl"]
    assert all({"--no-index", "--no-deps"} <= {*command} for command in commands)
    assert gpu.wheels_commands(None) == []


def test_what_is_wanted_most_is_measured_first(tmp_path: Path):
    (command,) = gpu.benchmarks_commands([*measure.FIRST], None, tmp_path, 100.0)
    assert [a for a in command if a in measure.subjects()] == [*measure.FIRST]
    assert [*measure.FIRST][:3] == ["attention", "decode_attention", "train_step"]
    assert gpu.benchmarks_commands([*measure.FIRST], "norm", tmp_path, 100.0) == []
    assert "norm" in gpu.benchmarks_commands(measure.subjects(), "norm", tmp_path, 100.0)[0]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "file" / "out")])
    assert "error: [Errno 20] Not a directory" in capsys.readouterr().err


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
