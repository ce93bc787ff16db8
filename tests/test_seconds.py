"""Which tests are slow: how it is measured and chosen, and that the list names tests that exist."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import seconds
from tests.seconds import BUDGET, Cost, choose, function_of, slow_functions

ROOT = Path(__file__).resolve().parents[1]

MODULE = """
import time
import pytest

def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture(scope="module")
def shared():
    work(0.5)

@pytest.mark.parametrize("i", range(2))
def test_slow(i):
    work(0.2)

def test_first(shared):
    pass

def test_second(shared):
    pass

def test_quick():
    pass
"""


def test_each_test_is_charged_what_it_would_take_alone(tmp_path: Path):
    (tmp_path / "test_them.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.seconds", "--seconds", "out/seconds.json"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    costs = json.loads((tmp_path / "out/seconds.json").read_text())
    assert costs.keys() == {f"test_them.py::test_{name}" for name in ("slow", "first", "second", "quick")}
    assert 0.35 < costs["test_them.py::test_slow"]["all"] < 1
    assert 0.15 < costs["test_them.py::test_slow"]["first"] < 0.35
    assert costs["test_them.py::test_first"]["all"] > 0.45 and costs["test_them.py::test_second"]["all"] > 0.45
    assert costs["test_them.py::test_quick"]["all"] < 0.3


def test_the_costliest_are_slow_until_the_rest_fits():
    costs = {name: Cost(all=seconds, first=1.0) for name, seconds in {"a": 5.0, "b": 1.0, "c": 3.0, "d": 2.0}.items()}
    assert choose(costs, 6.0) == ["a"]
    assert choose(costs, 4.0) == ["a", "c"]
    assert choose(costs, 11.0) == []
    costs["a"]["first"] = 0.1  # this case stays
    assert choose(costs, 6.0) == ["a", "c"]
    assert 0 < BUDGET < 180


def test_a_quick_first_case_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(seconds, "SLOW", tmp_path / "slow.txt")
    seconds.SLOW.write_text("# why\n 9.0 0.20  a.py::quick_cases\n 8.0 2.00  a.py::slow_cases\n")
    cases = [
        "a.py::quick_cases[1]",
        "a.py::quick_cases[2]",
        "a.py::slow_cases[1]",
        "a.py::slow_cases[2]",
        "a.py::other",
    ]
    assert seconds.slow_cases(cases) == {"a.py::quick_cases[2]", "a.py::slow_cases[1]", "a.py::slow_cases[2]"}


def test_a_function_has_one_name_with_and_without_parameters():
    assert function_of("tests/a/test_b.py::test_c[1-[2]-x::y]") == "tests/a/test_b.py::test_c"
    assert function_of("tests/a/test_b.py::test_c") == "tests/a/test_b.py::test_c"


def test_the_list_names_tests_that_exist():
    functions = {function.partition("::")[::2] for function in slow_functions()}
    for file in {file for file, _ in functions}:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        named = {name for f, name in functions if f == file}
        assert named <= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, file
