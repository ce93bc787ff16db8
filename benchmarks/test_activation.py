"""The point-wise activations: SwiGLU of the language model, quick-GELU of the vision tower, GELU of the projector.

Rows are tokens: one prefill (640), one training sample (832); one image and eight.
"""

from collections.abc import Callable

import torch
from transformers.activations import ACT2FN

from benchmarks.harness import Case, Tensors, benchmark_of, function, report
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.ops import activation

try:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
except ImportError:
    LigerSiLUMulFunction = None

# Tensors moved per element: forward, and forward with backward (which reads the inputs and one gradient again).
PASSES = {"swiglu": (3, 8), "quick_gelu": (2, 5), "gelu": (2, 5)}
REFERENCES = {
    "swiglu": activation.swiglu_reference,
    "quick_gelu": activation.quick_gelu_reference,
    "gelu": activation.gelu_reference,
}


def cases(gpu: bool) -> list[Case]:
    """The cases on a GPU (LLaVA-1.5-7B's shapes, bf16), and smaller ones on a CPU."""
    dtype = torch.bfloat16 if gpu else torch.float32
    shapes = {
        "swiglu": [(640, 11008), (832, 11008)] if gpu else [(64, 1376)],
        "quick_gelu": [(577, 4096), (8 * 577, 4096)] if gpu else [(65, 1024)],
        "gelu": [(576, 4096), (8 * 576, 4096)] if gpu else [(64, 512)],
    }
    return [
        activation_case(op, rows, columns, dtype, backward)
        for op, sizes in shapes.items()
        for rows, columns in sizes
        for backward in (False, True)
    ]


def activation_case(op: str, rows: int, columns: int, dtype: torch.dtype, backward: bool) -> Case:
    names = ("gate", "up") if op == "swiglu" else ("x",)

    def inputs() -> Tensors:
        return {name: (2 * torch.randn(rows, columns, device=DEVICE)).to(dtype) for name in names}

    return Case(
        op=op,
        shape=(rows, columns),
        dtype=dtype,
        backward=backward,
        inputs=inputs,
        reference=_listed(REFERENCES[op]),
        providers=providers(op),
        bytes_moved=PASSES[op][backward] * rows * columns * dtype.itemsize,
        # A sigmoid or erf and a few products; backward about twice that.
        flops=(30 if backward else 10) * rows * columns,
    )


def providers(op: str) -> dict[str, Callable[[Tensors], Callable]]:
    """The providers. `hf` is the function that transformers calls."""
    found = {"torch": function(_listed(REFERENCES[op])), "hf": function(_listed(_hf(op)))}
    if not torch.cuda.is_available():
        return found
    found["compile"] = function(_listed(torch.compile(REFERENCES[op])))
    if op == "swiglu" and LigerSiLUMulFunction is not None:
        found["liger"] = function(_listed(LigerSiLUMulFunction.apply))
    if not backend.unavailable("triton"):
        found["triton"] = function(_listed(_triton(op)))
    return found


def _listed(fn: Callable[..., torch.Tensor]) -> Callable[..., list[torch.Tensor]]:
    """`fn` with its output in a list, as the harness expects."""
    return lambda **tensors: [fn(*tensors.values())]


def _hf(op: str) -> Callable[..., torch.Tensor]:
    if op == "swiglu":
        return lambda gate, up: ACT2FN["silu"](gate) * up
    return ACT2FN[op]


def _triton(op: str) -> Callable[..., torch.Tensor]:
    def call(*tensors: torch.Tensor) -> torch.Tensor:
        with backend.use_backend("triton", op):
            return getattr(activation, op)(*tensors)

    return call


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_activation(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
