"""The harness: what is wrong is not timed, providers take turns, memory is counted, records reach their files."""

import dataclasses
import importlib
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, records, test_norm
from benchmarks.harness import Case, LiveStorages, Measurement, function, measured, verify

ROOT = Path(__file__).resolve().parents[2]


def square_case(providers: dict, *, backward: bool = False) -> Case:
    return Case(
        op="square",
        shape=(64, 32),
        dtype=torch.float32,
        backward=backward,
        inputs=lambda: {"x": torch.randn(64, 32)},
        reference=lambda x: (x * x,),
        providers={name: function(fn) for name, fn in providers.items()},
        bytes_moved=2 * 64 * 32 * 4,
        flops=64 * 32,
    )


def verdicts(case: Case) -> dict:
    inputs = case.inputs()
    return verify(case, inputs, harness.draw_cotangents(case, inputs))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SECONDS_PER_CASE", 0.0)
    monkeypatch.setattr(harness, "ROUNDS", (4, 4))


def test_a_wrong_provider_is_not_timed(quick: None):
    calls = []

    def wrong(x):
        calls.append(x)
        return (x * x + 1e-3,)

    def not_finite(x):
        return (x * x / torch.zeros(()),)

    def broken(x):
        raise RuntimeError("no such kernel")

    case = square_case({"reference": lambda x: (x.square(),), "hf": wrong, "triton": not_finite, "liger": broken})
    found = measured(case)
    assert len(calls) == 1  # verified, and never again
    assert isinstance(found["reference"], Measurement)
    assert len(found["reference"].samples) == 4
    assert found["reference"].max_rel_error < 1e-6
    assert isinstance(found["hf"], AssertionError)
    assert "it is not timed" in str(found["hf"])
    assert isinstance(found["triton"], AssertionError)
    assert str(found["liger"]) == "no such kernel"


def test_a_peer_may_round_elsewhere_but_our_own_code_may_not():
    def off(x):
        return (x * x * (1 + 2e-6),)

    found = verdicts(square_case({"liger": off, "triton": off}))
    assert found["liger"] == pytest.approx(2e-6, rel=0.1)
    assert isinstance(found["triton"], AssertionError)


def product_case(providers: dict) -> Case:
    """One number, with a rounding error of some units in the last place."""
    return Case(
        op="product",
        shape=(1000,),
        dtype=torch.float32,
        backward=False,
        inputs=lambda: {"x": torch.rand(1000) / 4 + 0.875},
        reference=lambda x: (x.view(-1, 10).prod(0).prod(),),
        providers={name: function(fn) for name, fn in providers.items()},
        bytes_moved=4000,
        flops=1000,
    )


def test_few_elements_are_judged_over_several_draws(monkeypatch: pytest.MonkeyPatch):
    """By one draw it is luck who is right; by several it is the same for every seed."""

    def verdicts_of(seed: int) -> dict:
        torch.manual_seed(seed)
        another_order, off = (lambda x: (x.view(10, -1).prod(1).prod(),)), (lambda x: (x.prod() * (1 + 5e-6),))
        return verdicts(product_case({"reference": another_order, "triton": off}))

    for seed in range(20):
        found = verdicts_of(seed)
        assert isinstance(found["reference"], float), (seed, found)
        assert "(root mean square of 16 draws); it is not timed" in str(found["triton"]), (seed, found)
    monkeypatch.setattr(harness, "extra_draws", lambda case: 0)
    right_by_one_draw = [isinstance(verdicts_of(seed)["reference"], float) for seed in range(20)]
    assert any(right_by_one_draw) and not all(right_by_one_draw)


def test_one_wrong_draw_and_one_wrong_element_are_found():
    calls = itertools.count()

    def once(x):
        return (x.prod() + 1e-2 * x.prod() * (next(calls) == 5),)

    case = product_case({"reference": once})
    assert isinstance(verdicts(case)["reference"], AssertionError)
    few = dataclasses.replace(
        case,
        reference=lambda x: (x.view(-1, 10).sum(0),),
        providers={"triton": function(lambda x: (x.view(-1, 10).sum(0) + 1e-3 * (torch.arange(10) == 3),))},
    )
    assert isinstance(verdicts(few)["triton"], AssertionError)


def test_further_draws_are_bounded_and_made_for_few_elements_only():
    drawn = []

    def counted(case: Case) -> Case:
        def inputs():
            drawn.append(case)
            return case.inputs()

        return dataclasses.replace(case, inputs=inputs)

    small, square = product_case({"torch": lambda x: (x.prod(),)}), square_case({"torch": lambda x: (x * x,)})
    large = dataclasses.replace(small, flops=10**13)
    for case, draws in ((small, 16), (large, 8), (square, 1)):
        drawn.clear()
        verdicts(counted(case))
        assert len(drawn) == draws


def test_gradients_are_verified_too():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    def wrong(x):
        return (Doubled.apply(x),)

    assert isinstance(verdicts(square_case({"hf": wrong}))["hf"], float)
    assert "in result 1" in str(verdicts(square_case({"hf": wrong}, backward=True))["hf"])


def test_providers_take_turns(quick: None, monkeypatch: pytest.MonkeyPatch):
    rounds = []
    one_round = harness.one_round

    def spy(order, timed):
        rounds.append(list(order))
        return one_round(order, timed)

    monkeypatch.setattr(harness, "one_round", spy)
    measured(square_case({"torch": lambda x: (x * x,), "hf": lambda x: (x**2,), "triton": lambda x: (x.square(),)}))
    warm_up, turns = rounds[:2], rounds[2:]
    assert warm_up == [["torch", "hf", "triton"]] * 2
    assert [order[0] for order in turns] == ["torch", "hf", "triton", "torch"]
    assert all(sorted(order) == ["hf", "torch", "triton"] for order in turns)


def test_samples_are_seconds_per_call(quick: None):
    def slow(x):
        time.sleep(0.01)
        return (x * x,)

    (found,) = measured(square_case({"torch": slow})).values()
    assert 0.01 <= min(found.samples) < 0.05


def test_a_provider_without_a_cuda_graph_sends_the_whole_case_to_events(monkeypatch: pytest.MonkeyPatch):
    """The GPU's path, as far as it goes without one: inputs per call, events in the order of the bursts."""
    clock = itertools.count()

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, end: "Event") -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(harness, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(harness, "_captured", lambda burst: burst)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    seen: dict[str, list[int]] = {"torch": [], "hf": []}

    def provider(name):
        def call(x):
            seen[name].append(x.data_ptr())
            return (x * x,)

        return call

    case = square_case({name: provider(name) for name in seen})
    timed, calls, timer = harness.bursts(case, ["torch", "hf"], sets=3)
    assert (calls, timer) == ({"torch": 3, "hf": 3}, "cuda graph")

    def refuse(burst):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(harness, "_captured", refuse)
    timed, calls, timer = harness.bursts(case, ["torch", "hf"], sets=3)
    assert (calls, timer) == ({"torch": 3, "hf": 3}, "cuda events")
    assert harness.one_round(["torch", "hf"], timed) == {"torch": 1e-3, "hf": 1e-3}
    assert len(set(seen["hf"])) == 3  # each call of a burst has inputs of its own
    assert len(seen["hf"]) == 6  # one burst unmeasured, in front, and one in its turn


def test_peak_memory_counts_what_is_alive():
    x = torch.ones(1000)
    kilo = 4000  # bytes of x

    with LiveStorages() as live:
        y = x + 1
        assert live.live == kilo
        view = y[:10].view(2, 5)
        view += 1
        assert live.live == kilo  # views and in-place operators allocate nothing
        del y
        assert live.live == kilo  # the view holds it
        del view
        assert live.live == 0
        for _ in range(3):
            z = x * 2
            z = z * 2
        assert live.live == kilo
    assert live.peak == 2 * kilo  # the old z and the new
    del z

    def call():
        leaf = x.requires_grad_()
        return torch.autograd.grad((leaf.exp() * 2).sum(), leaf)

    assert 2 * kilo <= harness.peak_bytes(call) <= 4 * kilo + 100


def test_floor_of_a_known_gpu(monkeypatch: pytest.MonkeyPatch):
    case = test_norm.norm_case("rms_norm", 4096, 4096, torch.bfloat16, False)
    assert case.floor_ms is None  # here
    monkeypatch.setattr(harness, "device_name", lambda: "nvidia-h100")
    assert case.floor_ms == pytest.approx(4 * 4096 * 4096 * 2 / 3.0e12 * 1e3)
    record = Measurement([1e-4, 2e-4, 3e-4], 2**21, 1e-3, "cuda graph").record(case, "triton")
    assert record["pct_of_floor"] == pytest.approx(100 * case.floor_ms / 0.2)
    assert record["ms_median"] == pytest.approx(0.2)
    assert record["ms_p20"] == pytest.approx(0.14)
    assert record["ms_p80"] == pytest.approx(0.26)
    assert record["peak_mib"] == 2
    assert test_norm.norm_case("rms_norm", 4096, 4096, torch.float32, False).floor_ms is None


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_the_kernels_of_the_norm_benchmark_verify(op: str, backward: bool):
    """In the interpreter, by the same functions that a GPU times."""
    case = test_norm.norm_case(op, 9, 96, torch.float32, backward)
    kernel = test_norm._triton_layer_norm if op == "layer_norm" else test_norm._triton_rms_norm
    case.providers["triton"] = function(kernel)
    found = verdicts(case)
    assert {"torch", "hf", "triton"} <= found.keys()
    assert all(isinstance(error, float) for error in found.values()), found


def test_the_bytes_of_a_norm_are_those_of_its_tensors():
    case = test_norm.norm_case("rms_norm", 8, 64, torch.bfloat16, False)
    tensors = case.inputs()
    outputs = case.reference(**tensors)
    moved = [tensors["x"], tensors["residual"], *outputs]
    assert case.bytes_moved == sum(t.nbytes for t in moved)


def pytest_run(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_from_the_root_to_the_records(request: pytest.FixtureRequest, tmp_path: Path):
    """`pytest --benchmark` runs the benchmarks alone; pytest-benchmark and the records say the same."""
    assert request.config.getini("testpaths") == ["tests"]  # without it none
    chosen = "rms_norm-64x512 and forward- and not backward"
    table = pytest_run(
        *("--benchmark", "-k", chosen),
        *("--results", tmp_path / "results", f"--benchmark-json={tmp_path / 'pytest.json'}"),
    )
    subjects = [importlib.import_module(f"benchmarks.{path.stem}") for path in (ROOT / "benchmarks").glob("test_*.py")]
    everything = [case for subject in subjects for case in subject.cases(torch.cuda.is_available())]
    collected = int(re.search(r"collected (\d+) items", table).group(1))
    assert collected == sum(len(case.providers) for case in everything)
    assert "benchmark 'rms_norm 64x512 fp32 forward': 3 tests" in table
    (file,) = (tmp_path / "results" / records.device_name()).glob("*.json")
    stored = json.loads(file.read_text())
    assert file.stem.startswith(stored["run"]["date"][:10])
    assert stored["run"].keys() >= {"gpu", "driver", "power_limit_w", "clocks", "torch", "triton", "commit", "date"}
    assert [r["provider"] for r in stored["records"]] == ["torch", "hf", "reference"]
    theirs = {b["params"]["provider"]: b for b in json.loads((tmp_path / "pytest.json").read_text())["benchmarks"]}
    for r in stored["records"]:
        assert r["ms_p20"] <= r["ms_median"] <= r["ms_p80"]
        assert theirs[r["provider"]]["stats"]["median"] * 1e3 == pytest.approx(r["ms_median"], rel=1e-9)
        assert theirs[r["provider"]]["stats"]["rounds"] == r["samples"] >= harness.ROUNDS[0]
        assert theirs[r["provider"]]["extra_info"]["max_rel_error"] == r["max_rel_error"] < 1e-5


def test_a_second_run_does_not_replace_the_first(tmp_path: Path):
    results = {"run": {"date": "2030-01-02T03:04:05", "commit": "abc", "device": "cpu"}, "records": []}
    names = [records.save(results, tmp_path).relative_to(tmp_path).as_posix() for _ in range(3)]
    assert names == ["cpu/2030-01-02-abc.json", "cpu/2030-01-02-abc-2.json", "cpu/2030-01-02-abc-3.json"]
