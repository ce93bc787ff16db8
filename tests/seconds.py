"""What each test costs, and which tests `make quick` leaves out.

`pytest -p tests.seconds --seconds FILE` writes, as JSON, the processor seconds of every test function: of this process
and its children, all parameters together. A busy machine changes them little. A fixture that several tests share is
charged in full to each of them, for each would have to set it up alone.

`python -m tests.seconds FILE` rewrites tests/slow.txt from that: the costliest functions, until the rest takes at most
BUDGET seconds. tests/conftest.py gives those the mark `slow`. `make durations` does both.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

SLOW = Path(__file__).with_name("slow.txt")
BUDGET = 100.0  # processor seconds of what is left: under three minutes on two cores with collection and lint
HEADER = """\
# The tests that `make quick` leaves out, with the processor seconds they take (all parameters together, fixtures
# included). Written by `make durations` from a run of all tests; to leave out a new slow test until then, add a line.
"""


def function_of(nodeid: str) -> str:
    """tests/test_a.py::test_b[1-x] -> tests/test_a.py::test_b."""
    return nodeid.partition("[")[0]


def slow_functions() -> set[str]:
    """What tests/slow.txt lists."""
    lines = SLOW.read_text(encoding="utf-8").splitlines()
    return {line.split()[-1] for line in lines if line and not line.startswith("#")}


def choose(seconds: dict[str, float], budget: float) -> dict[str, float]:
    """The costliest functions, costliest first, until what is left takes at most `budget` seconds."""
    slow, rest = {}, sum(seconds.values())
    for function, cost in sorted(seconds.items(), key=lambda entry: (-entry[1], entry[0])):
        if rest <= budget:
            break
        slow[function] = cost
        rest -= cost
    return slow


# --------------------------------------------------------------------------------------------------- the plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", metavar="FILE", help="write the processor seconds of each test function to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seconds"):
        config.pluginmanager.register(_Recorder(Path(config.getoption("--seconds"))))


def _clock() -> float:
    return sum(os.times()[:4])


class _Recorder:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.tests: dict[str, float] = defaultdict(float)  # by function, without shared fixtures
        self.fixtures: dict[object, float] = defaultdict(float)  # shared ones, each without those it asks for
        self.used: dict[str, set[object]] = defaultdict(set)
        self.inner = [0.0]  # seconds of the shared fixtures inside the test or fixture that runs

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        started, self.inner = _clock(), [0.0]
        try:
            return (yield)
        finally:
            function = function_of(item.nodeid)
            self.tests[function] += _clock() - started - self.inner[0]
            definitions = getattr(item, "_fixtureinfo", None)
            for fixtures in definitions.name2fixturedefs.values() if definitions else ():
                self.used[function].update(fixtures)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        started = _clock()
        self.inner.append(0.0)
        try:
            return (yield)
        finally:
            whole, inside = _clock() - started, self.inner.pop()
            self.fixtures[fixturedef] += whole - inside
            self.inner[-1] += whole

    def pytest_sessionfinish(self) -> None:
        seconds = {
            function: round(own + sum(self.fixtures[fixture] for fixture in self.used[function]), 3)
            for function, own in self.tests.items()
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(seconds, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    measured: dict[str, float] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    chosen = choose(measured, BUDGET)
    SLOW.write_text(HEADER + "".join(f"{cost:8.1f}  {function}\n" for function, cost in chosen.items()), "utf-8")
    left = sum(measured.values()) - sum(chosen.values())
    print(f"{SLOW.name}: {len(chosen)} of {len(measured)} test functions; the others take {left:.0f} s")
