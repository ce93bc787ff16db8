"""`python -m llava_fast.train`: Ctrl-C, and packages that are not installed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_fast.train.__main__ import main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def interrupted(recipe: Path, *overrides: str, at: str) -> subprocess.CompletedProcess:
    """Run a recipe, press Ctrl-C as soon as `at` exists or is printed, and wait for the end."""
    log = recipe.with_suffix(".log")
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "llava_fast.train", str(recipe), *overrides],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        started = time.monotonic()
        while at not in log.read_text() and not Path(at).exists() and process.poll() is None:
            assert time.monotonic() - started < 120
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes: workers, too
        _, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, log.read_text(), errors)


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume(recipe_for, tmp_path):
    recipe, path = recipe_for(max_steps=5000, save_steps=2, save_total_limit=1, workers=2), tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    done = interrupted(path, at=str(tmp_path / "out" / "checkpoint-2"))
    assert done.returncode == 130
    last = done.stderr.strip().splitlines()[-1]
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert last == f"interrupted; resume=true continues from {checkpoint}"
    assert "Traceback" not in done.stderr
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    again = interrupted(path, "resume=true", at=str(tmp_path / "out" / f"checkpoint-{step + 2}"))
    assert again.returncode == 130 and "resume=true continues from" in again.stderr


def test_what_to_do_after_ctrl_c_before_the_first_checkpoint(recipe_for, tmp_path, monkeypatch, capsys):
    def interrupt(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_fast.train.trainer.run", interrupt)
    path, none = (
        tmp_path / "recipe.yaml",
        f"interrupted; there is no checkpoint in {tmp_path / 'out'} yet, so nothing to ",
    )
    path.write_text(recipe_for().to_yaml())
    assert main([str(path)]) == 130
    assert capsys.readouterr().err.strip() == f"{none}resume: start again; set save_steps to have checkpoints"
    assert main([str(path), "save_steps=5"]) == 130
    assert capsys.readouterr().err.strip() == f"{none}resume: start again"


def test_ctrl_c_while_modules_are_imported(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_fast.train.__main__._train", interrupt)
    assert main(["recipe.yaml"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["yaml", "pydantic"])
def test_a_missing_extra_is_one_line(package, recipe_for, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_for().to_yaml())
    for name in [name for name in sys.modules if name.startswith("llava_fast.train.") and "__main__" not in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main([str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {package} is not installed; pip install 'llava-fast[train]' brings it\n"
    assert printed.out == "" and not (tmp_path / "out").exists()


def test_a_package_that_no_extra_brings_is_not_explained_away(monkeypatch):
    monkeypatch.setitem(sys.modules, "llava_fast.train.recipe", None)
    with pytest.raises(ModuleNotFoundError, match=r"llava_fast\.train\.recipe"):
        main(["recipe.yaml"])
