"""How many files a reader passes through: the counts of tests/walks.py stay within their goals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"image": 16, "row_alone": 25}  # files; no row passes through the loading of the model


@pytest.fixture(scope="module")
def counts() -> dict[str, dict]:
    """Counted in a process of its own, where no other test has filled a cache."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/walks.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("walk", "goal"), GOALS.items())
def test_walks_are_short(counts, walk: str, goal: int):
    files = sorted(counts[walk]["called"])
    assert len(files) <= goal, f"{len(files)} files: {', '.join(files)}"


def test_what_is_known_to_be_passed_is_counted(counts):
    assert "drop_in.py" in counts["image"]["called"]
    assert "processor/processor.py" in counts["image"]["called"]
    assert "train/trainer.py" in counts["row"]["called"]
    assert set(counts["row_alone"]["called"]) < set(counts["row"]["called"])
    assert set(counts["token_step"]["called"]) < set(counts["token"]["called"])
    for walk in counts.values():
        assert walk["files"] == len(walk["called"])
        assert walk["functions"] == sum(map(len, walk["called"].values()))
        assert not any(name.endswith(">") for names in walk["called"].values() for name in names)
