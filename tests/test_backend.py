"""Which implementation runs, what is said when it cannot, and that torch.compile sees through the choice."""

import logging
import subprocess
import sys
import threading
import time
from types import ModuleType

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from llava_fast import backend
from llava_fast.backend import (
    BackendUnavailable,
    choose,
    differentiated,
    observed,
    register,
    register_peer,
    use_backend,
)


def plain(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def fast(x: torch.Tensor) -> torch.Tensor:
    return x + 2


def other(x: torch.Tensor) -> torch.Tensor:
    return x + 3


def only_float32(x: torch.Tensor) -> bool | str:
    return True if x.dtype == torch.float32 else f"needs float32, got {x.dtype}"


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operation with a reference and a Triton implementation, on a machine where Triton can run."""
    monkeypatch.setattr(backend, "_registry", {})
    monkeypatch.setattr(backend, "_preferred", {})
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    monkeypatch.setattr(backend, "_no_gpu", lambda: "")
    monkeypatch.setattr(backend, "_request", {None: "auto"})
    monkeypatch.setattr(backend, "_environment", "auto")
    register("add", "reference", plain)
    register("add", "triton", fast, only_float32)
    return "add"


def test_auto_takes_the_fast_one_where_it_can(op: str):
    assert choose(op, torch.ones(1)) is fast
    assert choose(op, torch.ones(1, dtype=torch.float64)) is plain


def test_auto_logs_a_fallback_once(op: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="llava_fast.backend"):
        for _ in range(3):
            choose(op, torch.ones(1, dtype=torch.float64))
        choose(op, torch.ones(1))
    assert [record.getMessage() for record in caplog.records] == [
        "add runs on reference (triton: needs float32, got torch.float64)"
    ]


def test_tensors_are_checked_at_each_choice(op: str):
    dtypes = (torch.float32, torch.float64, torch.float32, torch.float64)
    assert [choose(op, torch.ones(1, dtype=dtype)) for dtype in dtypes] == [fast, plain, fast, plain]
    with use_backend("triton"):
        for _ in range(2):
            assert choose(op, torch.ones(1)) is fast
            with pytest.raises(BackendUnavailable, match="needs float32"):
                choose(op, torch.ones(1, dtype=torch.float16))


def test_what_is_registered_later_is_chosen(op: str):
    register("mul", "reference", plain)
    assert choose("mul", torch.ones(1)) is plain
    register("mul", "triton", fast)
    assert choose("mul", torch.ones(1)) is fast


@pytest.mark.parametrize("request_", ["auto", "reference", "triton"])
def test_a_choice_takes_less_than_two_microseconds(op: str, request_: str):
    x = torch.ones(1)
    with use_backend(request_):
        expected = choose(op, x)
        seconds = []
        for _ in range(300):  # the shortest of many short runs: between two interruptions of a busy machine
            start = time.perf_counter()
            for _ in range(50):
                choose(op, x)
            seconds.append((time.perf_counter() - start) / 50)
        assert choose(op, x) is expected
    assert min(seconds) <= 2e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_choice_outside_of_compiled_code_does_not_compile_it_again(op: str):
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return choose(op, x)(x) * 10

    for _ in range(2):
        assert compiled(torch.zeros(1)).item() == 20
        assert choose(op, torch.zeros(1)) is fast
    assert counter.frame_count == 1


def test_a_request_by_name_is_met_or_refused(op: str):
    with use_backend("reference"):
        assert choose(op, torch.ones(1)) is plain
    with use_backend("triton"):
        assert choose(op, torch.ones(1)) is fast
        with pytest.raises(BackendUnavailable, match=r"'triton' was asked for.*'add'.*needs float32"):
            choose(op, torch.ones(1, dtype=torch.float16))
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match="'add' has only: reference, triton"):
        choose(op, torch.ones(1))


def test_a_machine_that_cannot_says_why(op: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    assert choose(op, torch.ones(1)) is plain
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="triton is not installed"):
        choose(op, torch.ones(1))


def test_blocks_nest_and_end_with_an_error(op: str):
    with use_backend("reference"):
        with pytest.raises(RuntimeError, match="inside"), use_backend("triton"):
            assert backend.requested() == "triton"
            raise RuntimeError("inside")
        assert backend.requested() == "reference"
    assert backend.requested() == "auto"


def test_a_block_in_one_thread_outlives_one_in_another(op: str):
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with use_backend("triton"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with use_backend("reference"):
        thread.start()
        assert entered.wait(10)
        assert backend.requested() == "triton"  # the one entered last
    assert backend.requested() == "triton"  # leaving took back only its own
    leave.set()
    thread.join(10)
    assert backend.requested() == "auto"


def test_a_request_can_be_for_one_operation(op: str):
    register("mul", "reference", plain)
    with use_backend("triton", "add"):
        assert choose(op, torch.ones(1)) is fast
        assert choose("mul", torch.ones(1)) is plain
        with use_backend("reference"):
            assert choose(op, torch.ones(1)) is plain
        with use_backend("reference", "mul"):
            assert choose(op, torch.ones(1)) is fast
    with pytest.raises(KeyError, match="no operation 'ad'"), use_backend("triton", "ad"):
        pass


@pytest.fixture
def peer(op: str) -> list[str]:
    """A peer "theirs" of the operation, and why it cannot be used here: the first of the list, while there is one."""
    missing: list[str] = []
    register_peer(op, "theirs", other, only_float32, lambda: missing[0] if missing else "")
    return missing


def test_a_peer_runs_only_where_it_is_named_with_its_operation(op: str, peer: list[str]):
    assert list(backend.peers(op)) == ["theirs"]
    assert choose(op, torch.ones(1)) is fast
    register("mul", "reference", plain)
    with use_backend("theirs", op):
        assert backend.requested(op) == "theirs"
        assert backend.requested() == backend.requested("mul") == "auto"
        assert choose(op, torch.ones(1)) is other
        assert choose("mul", torch.ones(1)) is plain
        with pytest.raises(BackendUnavailable, match=r"'theirs' was asked for, but cannot run 'add': needs float32"):
            choose(op, torch.ones(1, dtype=torch.float16))
        peer.append("theirs is not installed")
        with pytest.raises(BackendUnavailable, match=r"'theirs' was asked for.*: theirs is not installed"):
            choose(op, torch.ones(1))
    assert choose(op, torch.ones(1)) is fast
    assert backend._registry[op].keys() == {"reference", "triton", "theirs"}


def test_auto_takes_no_peer_even_where_nothing_else_can(op: str, peer: list[str]):
    del backend._registry[op]["reference"]
    with pytest.raises(BackendUnavailable, match="no implementation of 'add' can run: triton: needs float32"):
        choose(op, torch.ones(1, dtype=torch.float64))


def test_a_peer_asked_for_otherwise_is_an_error_that_lists_the_names(op: str, peer: list[str]):
    register("mul", "reference", plain)
    names = "auto, reference, triton, cuda; with operation 'add' named also theirs"
    for request in (("theirs",), ("theirs", "mul"), ("theirs", op, "mul"), ("thiers", op)):
        with pytest.raises(ValueError, match=f"backend is '{request[0]}'; it must be one of {names}"):
            with use_backend(*request):
                pass
    with pytest.raises(KeyError, match="no operation 'ad'"), use_backend("theirs", "ad"):
        pass
    with pytest.raises(ValueError, match="peer 'triton' of operation 'add' has the name of a backend"):
        register_peer(op, "triton", other, only_float32, str)
    with pytest.raises(ValueError, match="operation 'add' already has a 'theirs' implementation: other"):
        register_peer(op, "theirs", fast, only_float32, str)


def test_status_says_which_peers_can_run(op: str, peer: list[str]):
    entry = backend.status()[op]
    assert (entry["backend"], entry["registered"]) == ("triton", ["reference", "triton"])
    assert entry["peers"] == {"theirs": "available"}
    peer.append("theirs is not installed")
    assert backend.status()[op]["peers"] == {"theirs": "theirs is not installed"}
    with use_backend("theirs", op):
        entry = backend.status()[op]
    assert entry["backend"] is None
    assert "theirs is not installed" in entry["reason"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_follows_a_request_for_a_peer(op: str, peer: list[str]):
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return choose(op, x)(x) * 10

    assert compiled(torch.zeros(1)).item() == 20
    with use_backend("theirs", op):
        assert compiled(torch.zeros(1)).item() == 30
    assert compiled(torch.zeros(1)).item() == 20


def test_the_interpreter_runs_only_what_is_asked_for(op: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "_INTERPRETED", True)
    assert choose(op, torch.ones(1)) is plain
    with use_backend("triton"):
        assert choose(op, torch.ones(1)) is fast


def test_a_recomputed_forward_keeps_the_request(op: str):
    """Activation checkpointing runs the forward again inside backward, maybe in a thread of autograd's."""
    chosen = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        chosen.append(choose(op, x))
        return chosen[-1](x) ** 2

    x = torch.ones(3, requires_grad=True)
    with use_backend("reference"):
        torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False).sum().backward()
    assert chosen == [plain, plain]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_follows_the_request(op: str):
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return choose(op, x)(x) * 10

    assert compiled(torch.zeros(1)).item() == 20
    with use_backend("reference"):
        assert compiled(torch.zeros(1)).item() == 10
    assert compiled(torch.zeros(1)).item() == 20


def test_wrong_names_are_refused(op: str):
    with pytest.raises(ValueError, match="'tritn'; it must be one of auto, reference, triton, cuda"):
        with use_backend("tritn"):
            pass
    with pytest.raises(ValueError, match="'fast' of operation 'add' is not one of"):
        register("add", "fast", plain)
    with pytest.raises(ValueError, match="already has a 'reference' implementation: plain"):
        register("add", "reference", fast)
    with pytest.raises(KeyError, match="no operation 'sub'"):
        choose("sub", torch.ones(1))
    assert register("add", "reference", plain) is plain


def test_status_says_what_runs_and_why(op: str, monkeypatch: pytest.MonkeyPatch):
    entry = backend.status()["add"]
    assert entry == {
        "backend": "triton",
        "reason": "first choice",
        "registered": ["reference", "triton"],
        "peers": {},
    }
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    entry = backend.status()["add"]
    assert (entry["backend"], entry["reason"]) == ("reference", "triton: triton is not installed")
    with use_backend("triton"):
        entry = backend.status()["add"]
    assert entry["backend"] is None
    assert "triton is not installed" in entry["reason"]


def in_a_new_process(code: str, value: str) -> subprocess.CompletedProcess[str]:
    environment = {"LLAVA_FAST_BACKEND": value}
    return subprocess.run(
        [sys.executable, "-c", f"import os; os.environ.update({environment}); {code}"],
        capture_output=True,
        text=True,
    )


def test_the_environment_variable_counts():
    code = "from llava_fast import backend; print(backend.requested())"
    assert in_a_new_process(code, "reference").stdout == "reference\n"
    assert in_a_new_process(code, "").stdout == "auto\n"
    wrong = in_a_new_process(code, "gpu")
    assert wrong.returncode != 0
    assert "ValueError: LLAVA_FAST_BACKEND is 'gpu'; it must be one of auto" in wrong.stderr


def test_the_module_itself_needs_no_torch():
    code = "import sys, llava_fast.backend; print('torch' in sys.modules)"
    assert in_a_new_process(code, "auto").stdout == "False\n"


def test_extension_and_its_status_agree():
    status = backend.extension_status()
    if status["loaded"]:
        assert backend.extension().device_count() == status["devices"]
    else:
        with pytest.raises(BackendUnavailable) as refusal:
            backend.extension()
        assert str(refusal.value) == status["reason"]


class Extension(ModuleType):
    """The compiled extension on a machine whose driver is of another version."""

    def __init__(self, runtime: int, driver: int, error: str = "") -> None:
        super().__init__("llava_fast._cuda")
        self.versions = lambda: (runtime, driver)
        self.compiled_architectures = lambda: [80, 90]
        self.error = error

    def device_count(self) -> int:
        if self.error:
            raise RuntimeError(self.error)
        return 1


def load(monkeypatch: pytest.MonkeyPatch, module: Extension) -> None:
    monkeypatch.setitem(sys.modules, "llava_fast._cuda", module)
    for name, value in zip(("_extension", "_extension_built", "_extension_error"), backend._load_extension()):
        monkeypatch.setattr(backend, name, value)


@pytest.mark.parametrize(("runtime", "driver"), [(13000, 12080), (13010, 12090), (12040, 11080)])
def test_an_extension_newer_than_the_driver_is_not_used(
    op: str, runtime: int, driver: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Its first launch would fail with CUDA error 35, cudaErrorInsufficientDriver."""
    register("resize", "reference", plain)
    register("resize", "cuda", fast)
    with caplog.at_level(logging.WARNING, logger="llava_fast.backend"):
        load(monkeypatch, Extension(runtime, driver))
        assert [choose("resize", torch.ones(1)) for _ in range(3)] == [plain] * 3
    (said,) = [record.getMessage() for record in caplog.records]
    versions = [f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver)]
    reason = "the CUDA extension was built with CUDA {}, but the driver supports no more than {}".format(*versions)
    assert said == f"{reason}; operations run without it"
    assert backend.extension_status() == {"built": True, "loaded": False, "reason": reason}
    assert backend.status()["resize"]["reason"] == f"cuda: {reason}"
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match=reason):
        choose("resize", torch.ones(1))
    with pytest.raises(BackendUnavailable, match=reason):
        backend.extension()


@pytest.mark.parametrize(("runtime", "driver"), [(13000, 13000), (13020, 13000), (12080, 13000), (13000, 0)])
def test_an_extension_that_the_driver_runs_is_used(
    op: str, runtime: int, driver: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A newer minor version runs too; without any driver the extension only loads."""
    register("resize", "reference", plain)
    register("resize", "cuda", fast)
    load(monkeypatch, Extension(runtime, driver))
    assert choose("resize", torch.ones(1)) is fast and not caplog.records
    assert backend.extension_status() == {"built": True, "loaded": True, "architectures": [80, 90], "devices": 1}


def test_an_extension_that_finds_no_device_says_why(op: str, monkeypatch: pytest.MonkeyPatch):
    error = "CUDA error 803: system has unsupported display driver"
    load(monkeypatch, Extension(13000, 13000, error))
    status = {"built": True, "loaded": True, "architectures": [80, 90], "devices": 0}
    assert backend.extension_status() == {**status, "reason": f"the CUDA extension finds no device: {error}"}


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_kernels_run_under_no_transform(op: str):
    """They see only values, so a tangent would be lost."""
    register("mul", "reference", doubled)
    register("mul", "triton", lambda x: x.detach() * 2)
    register_peer("mul", "theirs", doubled, lambda x: True, str)
    x, tangent = torch.randn(2, 3)

    def mul(x: torch.Tensor) -> torch.Tensor:
        return choose("mul", x)(x)

    def forward_mode() -> torch.Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(mul(forward_ad.make_dual(x, tangent))).tangent

    compiled = torch.compile(mul, backend="eager")

    def forward_mode_of_compiled() -> torch.Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, tangent))).tangent

    assert compiled(x) is not None  # compiled without a tangent first
    transforms = {
        forward_mode_of_compiled: 2 * tangent,
        forward_mode: 2 * tangent,
        lambda: torch.func.jvp(mul, (x,), (tangent,))[1]: 2 * tangent,
        lambda: torch.func.grad(lambda x: mul(x).sum())(x): torch.full((3,), 2.0),
        lambda: torch.func.vmap(mul)(x): 2 * x,
    }
    for transform, expected in transforms.items():
        for request in (("auto",), ("reference",), ("theirs", "mul")):
            with use_backend(*request):
                torch.testing.assert_close(transform(), expected)
        with use_backend("triton"), pytest.raises(BackendUnavailable, match="'mul': its kernels have no rules for"):
            transform()
    assert choose("mul", x) is not doubled  # after the transforms


def test_who_must_see_an_operation():
    x, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    assert [differentiated(x, None), differentiated(x, leaf)] == [False, True]
    assert [observed(x, None), observed(x, leaf)] == [False, True]
    assert observed(TwoTensor(x, x))
    with torch.no_grad():
        assert not differentiated(leaf)
        assert not observed(leaf)
        assert not observed(torch.nn.Parameter(x))
    with FlopCounterMode(display=False):
        assert observed(x)
    assert torch.compile(lambda x: x + observed(x), fullgraph=True, backend="eager")(x).item() == 2
