"""Residual add and norm in one: RMSNorm of the language model, LayerNorm of the vision tower.

Both outputs count, the normalised tensor and the sum, and with backward their gradients with respect to the input, the
residual and the weights. Rows are tokens: one prefill (640), one training sample (832), a pack; one image, eight, 32.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.harness import Case, Tensors, benchmark_of, function, report, with_weights
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.ops import norm

try:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
except ImportError:
    LigerFusedAddRMSNormFunction = LigerLayerNormFunction = None

EPS = 1e-5


def cases(gpu: bool) -> list[Case]:
    """The cases on a GPU (LLaVA-1.5-7B's shapes, bf16), and smaller ones on a CPU."""
    dtype = torch.bfloat16 if gpu else torch.float32
    shapes = {
        "rms_norm": [(640, 4096), (832, 4096), (4096, 4096)] if gpu else [(64, 512), (640, 512)],
        "layer_norm": [(577 * images, 1024) for images in (1, 8, 32)] if gpu else [(65, 256), (577, 256)],
    }
    return [
        norm_case(op, rows, width, dtype, backward)
        for op, sizes in shapes.items()
        for rows, width in sizes
        for backward in (False, True)
    ]


def norm_case(op: str, rows: int, width: int, dtype: torch.dtype, backward: bool) -> Case:
    centred = op == "layer_norm"

    def inputs() -> Tensors:
        def draw(*size: int, shift: float = 0.0) -> torch.Tensor:
            return (torch.randn(size, device=DEVICE) + shift).to(dtype)

        tensors = {"x": draw(rows, width), "residual": draw(rows, width), "weight": draw(width, shift=1.0)}
        return {**tensors, "bias": draw(width)} if centred else tensors

    # Forward reads x and the residual, writes the sum and the result; backward reads both gradients and the sum, and
    # writes one gradient for x and residual. Weights and statistics are left out: they are 1/rows and 1/width of it.
    passes = 8 if backward else 4
    # Per element: add, square, sum, two scalings; backward about twice that.
    operations = 15 if backward else 5
    reference = _reference(op)
    return Case(
        op=op,
        shape=(rows, width),
        dtype=dtype,
        backward=backward,
        inputs=inputs,
        reference=reference,
        providers=providers(op, reference, backward),
        bytes_moved=passes * rows * width * dtype.itemsize,
        flops=operations * rows * width,
    )


def _reference(op: str) -> Callable:
    if op == "layer_norm":
        return lambda x, residual, weight, bias: norm.layer_norm_reference(x, weight, bias, EPS, residual)
    return lambda x, residual, weight: norm.rms_norm_reference(x, weight, EPS, residual)


def providers(op: str, reference: Callable, backward: bool) -> dict[str, Callable[[Tensors], Callable]]:
    """The providers. `torch` is PyTorch's own fused norm after an add; `hf` is the module of transformers."""
    found = {"torch": function(_torch_layer_norm if op == "layer_norm" else _torch_rms_norm), "hf": _hf}
    if not torch.cuda.is_available():
        return {**found, "reference": function(reference)}
    found["compile"] = function(torch.compile(reference))
    if LigerLayerNormFunction is not None:
        found["liger"] = function(_liger_layer_norm if op == "layer_norm" else _liger_rms_norm)
    if not backend.unavailable("triton"):
        found["triton"] = function(_triton_layer_norm if op == "layer_norm" else _triton_rms_norm)
    if not backend.unavailable("cuda") and op == "rms_norm" and not backward:
        found["cuda"] = function(_cuda_rms_norm)
    return found


def _torch_rms_norm(x, residual, weight):
    s = x + residual
    return F.rms_norm(s, weight.shape, weight, EPS), s


def _torch_layer_norm(x, residual, weight, bias):
    s = x + residual
    return F.layer_norm(s, weight.shape, weight, bias, EPS), s


def _hf(inputs: Tensors) -> Callable:
    x, residual, weights = inputs["x"], inputs["residual"], {n: inputs[n] for n in ("weight", "bias") if n in inputs}
    module = torch.nn.LayerNorm(x.shape[-1], EPS) if "bias" in weights else LlamaRMSNorm(x.shape[-1], EPS)
    with_weights(module, **weights)

    def call():
        s = x + residual
        return module(s), s

    return call


def _triton_rms_norm(x, residual, weight):
    with backend.use_backend("triton", "rms_norm"):
        return norm.rms_norm(x, weight, eps=EPS, residual=residual)


def _triton_layer_norm(x, residual, weight, bias):
    with backend.use_backend("triton", "layer_norm"):
        return norm.layer_norm(x, weight, bias, eps=EPS, residual=residual)


def _liger_rms_norm(x, residual, weight):
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def _liger_layer_norm(x, residual, weight, bias):
    s = x + residual
    return LigerLayerNormFunction.apply(s, weight, bias, EPS), s


def _cuda_rms_norm(x, residual, weight):
    with backend.use_backend("cuda", "rms_norm"):
        return norm.rms_norm(x, weight, eps=EPS, residual=residual)


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_norm(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
