"""`pytest --benchmark`, in the root or on benchmarks/: the benchmarks and nothing else."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks and nothing else")
    parser.addoption("--results", metavar="DIR", help="with --benchmark: store records below DIR, by device and date")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark"):
        config.option.benchmark_only = True
        if config.args_source != pytest.Config.ArgsSource.ARGS:
            config.args[:] = [str(config.rootpath / "benchmarks")]
