"""pytest hooks of the benchmarks: run info for pytest-benchmark, and records written with `--results DIR`."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, records


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.update(records.run_info())


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.getoption("--results")
    if folder and harness.RECORDS:
        path = records.store(harness.RECORDS, Path(folder))
        session.config.pluginmanager.get_plugin("terminalreporter").write_line(f"\n{path}")
