"""The benchmark harness: verifies all providers of a case, times them in turns, and makes one record per provider.

A `Case` is one operation × shape × dtype × direction; speed, memory and correctness are all measured on it. Before
timing, each provider's results (and gradients) are compared with the reference in float64. Then the providers take
turns in one process, so that a slowdown of the machine affects all of them.

GPU: a sample is a burst of calls on different inputs, together larger than the L2 cache, so that the cache is cold for
every call. A burst is replayed as one CUDA graph, without Python overhead and launch gaps, and timed by CUDA events; if
a provider cannot be captured, the whole case is timed without graphs, and the records say so (`timer`).
CPU: a sample is repeated calls on the same inputs, at least a millisecond in total, by the wall clock.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.records import CEILINGS, DEVICE, device_name
from llava_fast.backend import BackendUnavailable

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# Code of this repository must be as exact as its reference (see `verify`). A peer may round at other places, so its
# error may also be this share of the largest value.
OURS = ("reference", "triton", "cuda")
PEER_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Results with at most this many elements are verified over several random draws: see `verify`.
FEW_ELEMENTS = 64
EXTRA_DRAWS = (7, 15)  # at least, at most
DRAWN_FLOPS = 2 * 10**11  # limit for all extra draws together, beyond the minimum number

SECONDS_PER_CASE = 2.0
ROUNDS = (10, 100)  # at least, at most
COLD_BYTES = 256 * 2**20  # several times the L2 cache of a GPU

Tensors = Mapping[str, torch.Tensor]
Call = Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Case:
    """One operation at one shape, and its providers.

    Attributes:
        shape: as in the records; plots use its product as size.
        inputs: new random inputs by name, on `DEVICE`; with `backward` the floating ones require grad.
        reference: `reference(**inputs)` -> outputs, in any dtype; the expected result is computed in float64.
        providers: name -> function of the inputs that returns the call to be measured. That function does the work that
            is not measured (modules, masks that a user makes once).
        bytes_moved, flops: the minimum for any implementation.
        capturable: whether all providers can be captured in a CUDA graph, that is do not synchronise with the GPU.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    backward: bool
    inputs: Callable[[], Tensors]
    reference: Callable[..., Sequence[torch.Tensor]]
    providers: Mapping[str, Callable[[Tensors], Call]]
    bytes_moved: int
    flops: int
    capturable: bool = True

    @property
    def identity(self) -> dict[str, str]:
        return {
            "op": self.op,
            "shape": "x".join(map(str, self.shape)),
            "dtype": DTYPE_NAMES[self.dtype],
            "direction": "forward+backward" if self.backward else "forward",
        }

    def __str__(self) -> str:
        return " ".join(self.identity.values())

    @property
    def floor_ms(self) -> float | None:
        """The minimum time by this GPU's bandwidth and FLOP/s; None if these are unknown (a CPU, another dtype)."""
        ceilings = CEILINGS.get(device_name().removeprefix("nvidia-"))
        if ceilings is None or self.dtype.itemsize != 2:
            return None
        return 1e3 * max(self.flops / ceilings[0], self.bytes_moved / ceilings[1])


def function(fn: Callable[..., Sequence[torch.Tensor]]) -> Callable[[Tensors], Call]:
    """A provider that is a plain function of the inputs."""
    return lambda inputs: partial(fn, **inputs)


def with_weights(module: torch.nn.Module, **weights: torch.Tensor) -> torch.nn.Module:
    """The module with its parameters replaced by these tensors."""
    for name, tensor in weights.items():
        delattr(module, name)
        setattr(module, name, tensor)
    return module


# ---- verification


def step(case: Case, provider: Callable[[Tensors], Call], inputs: Tensors, cotangents: Sequence[torch.Tensor]) -> Call:
    """The call to be measured: outputs, and with `backward` the gradients of all floating inputs after them."""
    leaves = {name: t.detach().requires_grad_(case.backward and t.is_floating_point()) for name, t in inputs.items()}
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    call = provider(leaves)
    if case.backward:
        return lambda: [*(outputs := call()), *torch.autograd.grad(outputs, wanted, cotangents)]
    return torch.no_grad()(call)


def verify(case: Case, inputs: Tensors, cotangents: Sequence[torch.Tensor]) -> dict[str, float | Exception]:
    """For each provider its largest error relative to the largest value, or the exception.

    The error against float64 may be at most twice that of the reference in the case's dtype, plus a unit in the last
    place of the largest value; a peer's may be `PEER_TOLERANCE` of the largest value. Both errors are the maximum over
    a result's elements. With few elements the maximum is random: if the reference's only loss happened to be exact, the
    limit would be almost zero. So for few elements both errors are root mean squares over several draws of inputs and
    cotangents; the given ones are the first draw.
    """
    checks: dict[str, list[_Check]] = {}
    verdicts: dict[str, float | Exception] = {}
    for draw in range(1 + extra_draws(case)):
        if draw:
            inputs = case.inputs()
            cotangents = draw_cotangents(case, inputs)
        doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        reference = function(case.reference)
        truth = _detached(step(case, reference, doubles, [c.double() for c in cotangents])())
        usual = _detached(step(case, reference, inputs, cotangents)())
        for name, provider in case.providers.items():
            if name in verdicts:
                continue
            try:
                found = _detached(step(case, provider, inputs, cotangents)())
                of_name = checks.setdefault(name, [_Check() for _ in truth])
                for check, *tensors in zip(of_name, found, usual, truth, strict=True):
                    # Results with many elements use only the first draw.
                    if not draw or tensors[2].numel() <= FEW_ELEMENTS:
                        check.add(*tensors)
            except Exception as error:
                verdicts[name] = error  # raised by this provider's test; the others are still measured
        if all(t.numel() > FEW_ELEMENTS for t in truth):
            break
    for name in case.providers.keys() - verdicts.keys():
        try:
            verdicts[name] = max(check.error(name, i) for i, check in enumerate(checks[name]))
        except AssertionError as error:
            verdicts[name] = error
    return {name: verdicts[name] for name in case.providers}


def extra_draws(case: Case) -> int:
    """Draws after the first, for results with few elements: at least EXTRA_DRAWS[0], more if they are cheap."""
    return max(EXTRA_DRAWS[0], min(EXTRA_DRAWS[1], DRAWN_FLOPS // max(case.flops, 1)))


def _detached(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [result.detach() for result in results]


class _Check:
    """Errors of one result of one provider, and of the reference, relative to the largest value of the draw.

    Squared errors are summed over draws: of each element if there are few, else only the largest.
    """

    def __init__(self) -> None:
        self.draws = 0
        self.sums: list[torch.Tensor] = []  # of the provider, of the reference
        self.unit = 0.0  # the dtype's unit in the last place; 0 where all values are
        self.dtype = torch.float64

    def add(self, found: torch.Tensor, usual: torch.Tensor, truth: torch.Tensor) -> None:
        largest, squares = float(truth.abs().max()), []
        for tensor in (found, usual):
            error = (tensor.double() - truth).abs()
            error = error if error.numel() <= FEW_ELEMENTS else error.max()
            squares.append((error / (largest or 1.0)).square())
        self.sums = [x + y for x, y in zip(self.sums, squares)] if self.sums else squares
        self.draws += 1
        self.dtype = usual.dtype
        self.unit = torch.finfo(usual.dtype).eps if largest else self.unit

    def error(self, name: str, i: int) -> float:
        """The largest error; `AssertionError` if it is over the limit."""
        ours, theirs = ((float(total.max()) / self.draws) ** 0.5 for total in self.sums)
        limit = 2 * theirs + self.unit
        if name not in OURS and self.unit:
            limit = max(limit, PEER_TOLERANCE[self.dtype])
        if not ours <= limit:  # NaN too
            over = f"over {limit:.3e}" + (f" (root mean square of {self.draws} draws)" if self.draws > 1 else "")
            raise AssertionError(f"{name}: relative error {ours:.3e} in result {i}, {over}; it is not timed")
        return ours


# ---- memory


def peak_bytes(call: Callable[[], Any]) -> int:
    """Peak memory allocated during `call()`, beyond that before the call, its results included."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveStorages() as live:
        call()
    return live.peak


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of live tensors that operators have returned, and their peak.

    Memory that an operator allocates and frees internally is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._known.setdefault(
                id(s := tensor.untyped_storage()), weakref.ref(s)
            )  # allocated before the call: not counted
        results = func(*args, **kwargs)
        for tensor in _tensors(results):
            self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        known = self._known.get(key)
        if known is not None and known() is storage:
            return

        def freed(_: weakref.ref) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


# ---- speed


def bursts(case: Case, names: Sequence[str], sets: int) -> tuple[dict[str, Callable[[], Any]], dict[str, int], str]:
    """Per provider a function to time and its number of calls; and the timer's name."""
    steps = {name: [] for name in names}
    for _ in range(sets):
        inputs = case.inputs()
        cotangents = draw_cotangents(case, inputs)
        for name in names:
            steps[name].append(step(case, case.providers[name], inputs, cotangents))
    if DEVICE.type == "cpu":
        calls = {}
        for name, (call,) in steps.items():
            call()
            start = time.perf_counter()
            call()
            calls[name] = max(1, round(1e-3 / (time.perf_counter() - start)))
        return {name: partial(_loop, steps[name][0], calls[name]) for name in names}, calls, "perf_counter"
    plain = {name: partial(_repeat, of_name) for name, of_name in steps.items()}
    calls = dict.fromkeys(names, sets)
    if not case.capturable:
        return plain, calls, "cuda events"
    try:
        return {name: _captured(burst) for name, burst in plain.items()}, calls, "cuda graph"
    except RuntimeError:
        torch.cuda.synchronize()
        return plain, calls, "cuda events"


def _repeat(calls: Sequence[Call]) -> list[Sequence[torch.Tensor]]:
    # Keep all results: the next call would reuse freed memory, which may be in the cache.
    return [call() for call in calls]


def _loop(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def _captured(burst: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            burst()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = burst()

    def replay(graph=graph, results=results) -> None:  # the default argument keeps the graph's outputs alive
        graph.replay()

    return replay


def one_round(order: Sequence[str], timed: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds that each provider's burst takes, in this order."""
    if DEVICE.type == "cpu":
        seconds = {}
        for name in order:
            start = time.perf_counter()
            timed[name]()
            seconds[name] = time.perf_counter() - start
        return seconds
    # An untimed first burst keeps the GPU busy until the timed ones are queued.
    timed[order[-1]]()
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
    for name in order:
        events[name][0].record()
        timed[name]()
        events[name][1].record()
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def draw_cotangents(case: Case, inputs: Tensors) -> list[torch.Tensor]:
    """A random gradient for each output of the case."""
    with torch.no_grad():
        return [torch.randn_like(output) for output in case.reference(**inputs)]


@dataclass(frozen=True)
class Measurement:
    """Seconds per call, one sample per round; the peak of one call; its error against float64."""

    samples: list[float]
    peak_bytes: int
    max_rel_error: float
    timer: str

    def record(self, case: Case, provider: str) -> dict[str, Any]:
        p20, median, p80 = (
            float(q) * 1e3 for q in torch.tensor(self.samples, dtype=torch.float64).quantile(_QUANTILES)
        )
        return {
            **case.identity,
            "provider": provider,
            "ms_median": median,
            "ms_p20": p20,
            "ms_p80": p80,
            "peak_mib": self.peak_bytes / 2**20,
            "floor_ms": case.floor_ms,
            "tflops_per_s": case.flops / median / 1e9,
            "pct_of_floor": case.floor_ms and 100 * case.floor_ms / median,
            "max_rel_error": self.max_rel_error,
            "timer": self.timer,
            "samples": len(self.samples),
        }


_QUANTILES = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)


@cache
def measured(case: Case) -> dict[str, Measurement | Exception]:
    """Verify all providers of a case, then measure them in turns; an exception replaces a failed one's measurement."""
    torch.manual_seed(0)
    if {"compile", "flex"} & case.providers.keys():
        # Otherwise torch.compile would use dynamic shapes from the second shape on, which is slower.
        torch.compiler.reset()
    inputs = case.inputs()
    cotangents = draw_cotangents(case, inputs)
    errors = verify(case, inputs, cotangents)
    names = [name for name, error in errors.items() if not isinstance(error, Exception)]
    peaks = {name: peak_bytes(step(case, case.providers[name], inputs, cotangents)) for name in names}
    del inputs, cotangents
    if not names:
        return errors

    sets = max(2, -(-COLD_BYTES // case.bytes_moved)) if DEVICE.type == "cuda" else 1
    timed, calls, timer = bursts(case, names, min(sets, 64))
    for _ in range(2):
        one_round(names, timed)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + SECONDS_PER_CASE
    for i in range(ROUNDS[1]):
        if i >= ROUNDS[0] and time.perf_counter() > end:
            break
        turn = i % len(names)
        for name, seconds in one_round(names[turn:] + names[:turn], timed).items():
            samples[name].append(seconds / calls[name])
    done = {name: Measurement(samples[name], peaks[name], errors[name], timer) for name in names}
    return {name: done.get(name, error) for name, error in errors.items()}


# ---- into pytest-benchmark, and into files

RECORDS: list[dict[str, Any]] = []


@dataclass
class _Replay:
    """A clock for pytest-benchmark: the two readings around a round differ by the next stored sample."""

    samples: list[float] = field(default_factory=list)
    inside: bool = False

    def read(self) -> float:
        self.inside = not self.inside
        return 0.0 if self.inside else self.samples.pop(0)


_replay = _Replay()


def stored_samples() -> float:
    """The timer that pytest-benchmark is given."""
    return _replay.read()


def benchmark_of(cases: Sequence[Case]) -> Callable[[Callable], Callable]:
    """Parametrise a test over `case` and `provider`; pytest-benchmark then compares the providers of a case."""
    params = [
        pytest.param(
            case,
            provider,
            id=f"{case}-{provider}".replace(" ", "-"),
            marks=pytest.mark.benchmark(group=str(case), timer=stored_samples),
        )
        for case in cases
        for provider in case.providers
    ]
    return pytest.mark.parametrize(("case", "provider"), params)


def report(benchmark: Any, case: Case, provider: str, measure: Callable[[Case], Mapping[str, Any]] = measured) -> None:
    """Measure the case, unless that is done, and hand this provider's samples to pytest-benchmark."""
    measurement = measure(case)[provider]
    if isinstance(measurement, BackendUnavailable):
        pytest.skip(str(measurement))
    if isinstance(measurement, Exception):
        raise measurement
    record = measurement.record(case, provider)
    RECORDS.append(record)
    benchmark.extra_info.update(record)
    _replay.samples, _replay.inside = list(measurement.samples), False
    benchmark.pedantic(lambda: None, rounds=len(measurement.samples), iterations=1)
