"""Rotary positions on queries and keys: one prefill (640 tokens), one training sample (832), a decoding step.

The angles are inputs and not timed: a model makes them once for all layers.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.harness import Case, Tensors, benchmark_of, report
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.ops import rotary

try:
    from liger_kernel.ops.rope import LigerRopeFunction
except ImportError:
    LigerRopeFunction = None


def cases(gpu: bool) -> list[Case]:
    """The cases on a GPU (LLaVA-1.5-7B's shapes, bf16), and smaller ones on a CPU."""
    dtype = torch.bfloat16 if gpu else torch.float32
    shapes = [(1, 32, 128), (640, 32, 128), (832, 32, 128)] if gpu else [(64, 8, 64)]
    return [rotary_case(*shape, dtype, backward) for shape in shapes for backward in (False, True)]


def rotary_case(tokens: int, heads: int, dim: int, dtype: torch.dtype, backward: bool) -> Case:
    def inputs() -> Tensors:
        q, k = torch.randn(2, 1, tokens, heads, dim, device=DEVICE).to(dtype)
        return {"q": q, "k": k, "positions": torch.randint(4096, (1, tokens), device=DEVICE)}

    elements = 2 * tokens * heads * dim
    return Case(
        op="rotary",
        shape=(tokens, heads, dim),
        dtype=dtype,
        backward=backward,
        inputs=inputs,
        reference=_reference,
        providers=providers(),
        # Queries and keys read and written; backward their gradients. The angles are 1/heads of that.
        bytes_moved=(4 if backward else 2) * elements * dtype.itemsize,
        flops=(6 if backward else 3) * elements,
    )


def providers() -> dict[str, Callable[[Tensors], Callable]]:
    """The providers. `hf` is transformers' function, on its own layout [B, H, T, d]."""
    found = {"torch": _with_angles(rotary.rotary_reference), "hf": _with_angles(_hf)}
    if not torch.cuda.is_available():
        return found
    found["compile"] = _with_angles(torch.compile(rotary.rotary_reference))
    if LigerRopeFunction is not None:
        found["liger"] = _with_angles(_liger)
    if not backend.unavailable("triton"):
        found["triton"] = _with_angles(_triton)
    return found


def _angles(positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = like.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=like.device, dtype=torch.float64) / half)
    angle = (positions[..., None] * frequency).repeat(1, 1, 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _reference(q, k, positions):
    return rotary.rotary_reference(q, k, *_angles(positions, q))


def _with_angles(fn: Callable) -> Callable[[Tensors], Callable]:
    """A provider that gets precomputed angles."""

    def provider(inputs: Tensors) -> Callable:
        q, k = inputs["q"], inputs["k"]
        return partial(fn, q, k, *_angles(inputs["positions"], q))

    return provider


def _hf(q, k, cos, sin):
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _liger(q, k, cos, sin):
    # Its kernel works in place on [B, H, T, d].
    q, k = LigerRopeFunction.apply(q.transpose(1, 2).clone(), k.transpose(1, 2).clone(), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _triton(q, k, cos, sin):
    with backend.use_backend("triton", "rotary"):
        return rotary.rotary(q, k, cos, sin)


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_rotary(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
