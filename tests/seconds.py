"""What each test costs, and which tests `make quick` leaves out.

`pytest -p tests.seconds --seconds FILE` writes, as JSON, the processor seconds of every test function: of this process
and its children, all its cases together and the first case alone. A busy machine changes them little. A fixture that
several tests share is charged in full to each of them, for each would have to set it up alone.

`python -m tests.seconds FILE` rewrites tests/slow.txt from that: the costliest functions, until the rest takes at most
BUDGET seconds. tests/conftest.py marks their cases `slow`, all but the first where that takes at most FIRST_CASE
seconds: so every parametrised test has a part in `make quick`. `make durations` does both.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import pytest

SLOW = Path(__file__).with_name("slow.txt")
BUDGET = 60.0  # processor seconds of what is left: under three minutes on two cores with collection and lint
FIRST_CASE = 0.5
HEADER = """\
# The tests that `make quick` leaves out, with the processor seconds they take: all cases, the first case alone. Written
# by `make durations` from a run of all tests; a new slow test gets a line by hand until then. Tests whose cost it does
# not see, such as that of a server process, carry the mark themselves. See tests/seconds.py.
"""


class Cost(TypedDict):
    """Processor seconds of a test function, the shared fixtures that it needs included."""

    all: float
    first: float  # of its first case


def function_of(nodeid: str) -> str:
    """tests/test_a.py::test_b[1-x] -> tests/test_a.py::test_b."""
    return nodeid.partition("[")[0]


def slow_functions() -> dict[str, Cost]:
    """What tests/slow.txt lists."""
    lines = SLOW.read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    return {function: Cost(all=float(whole), first=float(first)) for whole, first, function in rows}


def slow_cases(nodeids: list[str]) -> set[str]:
    """Those of the collected tests that are slow."""
    functions, slow, seen = slow_functions(), set(), set()
    for nodeid in nodeids:
        function = function_of(nodeid)
        if function in functions and (function in seen or functions[function]["first"] > FIRST_CASE):
            slow.add(nodeid)
        seen.add(function)
    return slow


def saved(cost: Cost) -> float:
    """Seconds that leaving the function out saves."""
    return cost["all"] - (cost["first"] if cost["first"] <= FIRST_CASE else 0)


def choose(costs: dict[str, Cost], budget: float) -> list[str]:
    """The costliest functions, costliest first, until what is left takes at most `budget` seconds."""
    slow, rest = [], sum(cost["all"] for cost in costs.values())
    for function, cost in sorted(costs.items(), key=lambda entry: (-saved(entry[1]), entry[0])):
        if rest <= budget:
            break
        slow.append(function)
        rest -= saved(cost)
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
        self.tests: dict[str, list[float]] = defaultdict(list)  # by function, each case, without shared fixtures
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
            self.tests[function].append(_clock() - started - self.inner[0])
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
        costs = {}
        for function, cases in self.tests.items():
            shared = sum(self.fixtures[fixture] for fixture in self.used[function])
            costs[function] = Cost(all=round(sum(cases) + shared, 3), first=round(cases[0] + shared, 3))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(costs, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    measured: dict[str, Cost] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    chosen = choose(measured, BUDGET)
    rows = (f"{measured[function]['all']:8.1f} {measured[function]['first']:6.2f}  {function}\n" for function in chosen)
    SLOW.write_text(HEADER + "".join(rows), encoding="utf-8")
    left = sum(cost["all"] for cost in measured.values()) - sum(saved(measured[function]) for function in chosen)
    print(f"{SLOW.name}: {len(chosen)} of {len(measured)} test functions; what is left takes {left:.0f} s")
