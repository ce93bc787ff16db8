"""`jit` and `tl` from Triton, with stand-ins where it is not installed, so that kernel files can still be imported."""

from __future__ import annotations

import torch

from llava_fast.backend import interpreting

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError:
    triton = tl = None

    def jit(fn):
        return fn


def inlined(fn):
    """`jit` for device functions. In the interpreter a plain function: it would patch a jit function at every call."""
    return fn if interpreting() else jit(fn)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def takes(*tensors: torch.Tensor) -> bool | str:
    """True when a Triton kernel can take these tensors, else one line saying why not."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"{tensor.dtype} is not one of float32, float16, bfloat16"
        if not tensor.is_cuda and not interpreting():
            return f"the tensors are on {tensor.device.type}"
    return True
