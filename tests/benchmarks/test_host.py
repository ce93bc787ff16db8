"""The host's part of a pass stays well under that of transformers' model; the stored benchmark has the figures."""

import pytest

from benchmarks import test_host as host

# Over the ratios that are stored in benchmarks/results/cpu, so that a busy machine does not fail the test.
LIMITS = {"host_decoding_static": 0.75, "host_decoding_dynamic": 0.85, "host_tower": 0.9}


@pytest.mark.parametrize("op", LIMITS)
def test_less_host_time_than_transformers(op: str) -> None:
    assert host.error(op) < 1e-5
    assert host.ratio(host.measure(op, rounds=15)) < LIMITS[op]
