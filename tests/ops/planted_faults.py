"""Faults that the second executor must report: in small kernels, which it must also run without them, and in ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import getsource
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from llava_fast.ops._triton import jit, tl
from tests.ops.kernel_cases import BF16, CASES


@jit
def _copy_kernel(x_ptr, out_ptr, count, LOADED: tl.constexpr, STORED: tl.constexpr):
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    x = tl.load(x_ptr + i, mask=i < count + LOADED, other=0.0)
    tl.store(out_ptr + i, x, mask=i < count + STORED)


@jit
def _add_kernel(x_ptr, out_ptr, STEP: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, 16)
    tl.store(out_ptr + i, tl.load(out_ptr + i) + tl.load(x_ptr + i))


@jit
def _round_kernel(x_ptr, out_ptr, CUT: tl.constexpr):
    i = tl.arange(0, 65536)
    x = tl.load(x_ptr + i)
    if CUT:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    tl.store(out_ptr + i, x.to(tl.bfloat16))


@jit
def _scatter_kernel(x_ptr, out_ptr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i // 2, tl.load(x_ptr + i))


@jit
def _total_kernel(x_ptr, parts_ptr, counter_ptr, out_ptr, SEM: tl.constexpr, WAIT: tl.constexpr):
    program, programs, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    part = row * programs + program
    tl.store(parts_ptr + part, tl.sum(tl.load(x_ptr + part * 16 + tl.arange(0, 16))))
    finished = tl.atomic_add(counter_ptr + row, 1, sem=SEM)
    if (finished == programs - 1) | (not WAIT):
        i = tl.arange(0, 4)
        tl.store(out_ptr + row, tl.sum(tl.load(parts_ptr + row * programs + i, mask=i < programs, other=0.0)))


def copy(loaded: int = 0, stored: int = 0) -> None:
    x, out = torch.randn(21), torch.empty(21)
    _copy_kernel[(2,)](x, out, 21, loaded, stored)
    assert torch.equal(x, out)


def add(zeroed: bool = True, step: int = 16) -> None:
    x = torch.randn(32)
    out = torch.zeros(32) if zeroed else torch.empty(32)
    _add_kernel[(2,)](x, out, step)
    assert torch.equal(x, out), "what was added to was not zero"


def rounding(cut: bool) -> None:
    """Of every bfloat16, the float32 halfway to the next, or one beside it."""
    part = torch.tensor([0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat(1 << 14)
    x = ((torch.arange(1 << 16) << 16) + part).to(torch.int32).view(torch.float32)
    x = x.masked_fill(x.isnan(), 0.0)
    out = torch.empty(1 << 16, dtype=BF16)
    _round_kernel[(1,)](x, out, cut)
    assert torch.equal(out, x.to(BF16)), "not rounded to nearest even"


def total(sem: str = "acq_rel", wait: bool = True) -> None:
    """The program of a row that finishes last adds up what the others stored."""
    x, parts, out = torch.randn(2, 3, 16), torch.empty(2, 3), torch.empty(2)
    _total_kernel[(3, 2)](x, parts, torch.zeros(2, dtype=torch.int32), out, sem, wait)
    torch.testing.assert_close(out, x.sum((1, 2)))


def scatter() -> None:
    _scatter_kernel[(1,)](torch.randn(16), torch.empty(8))


def mutant(case: str, module_name: str, kernel: str, old: str, new: str) -> None:
    """A case with `old` replaced by `new`, once, in the source of its kernel or of a device function beside it."""
    module = import_module(f"llava_fast.ops.{module_name}")
    functions = [
        f for f in vars(module).values() if getattr(f, "__module__", "") == module.__name__ and hasattr(f, "fn")
    ]
    source = "\n\n".join(getsource(f.fn) for f in sorted(functions, key=lambda f: f.fn.__code__.co_firstlineno))
    if source.count(old) != 1:
        raise LookupError(f"{old!r} is {source.count(old)} times in {module_name}: plant another fault")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mutant.py"
        file.write_text(source.replace(old, new))
        names: dict[str, Any] = dict(vars(module))
        exec(compile(file.read_text(), str(file), "exec"), names)
        with mock.patch.object(module, f"_{kernel}_kernel", names[f"_{kernel}_kernel"]):
            CASES[case]()


SOUND: dict[str, Callable[[], None]] = {
    "copy": copy,
    "add": add,
    "rounding": partial(rounding, False),
    "the last program adds up": total,
}

# name: (what must be reported, case)
PLANTED: dict[str, tuple[str, Callable[[], None]]] = {
    "a store past the end": ("writes 11 element(s) past the end", partial(copy, stored=20)),
    "a load past the end": ("reads 3 element(s) past the end", partial(copy, loaded=3)),
    "two programs at one element": ("program instances", partial(add, step=8)),
    "the last program, without an order": ("program instances", partial(total, sem="relaxed")),
    "another program than the last": ("program instances", partial(total, wait=False)),
    "memory that nobody wrote": ("what was added to was not zero", partial(add, zeroed=False)),
    "bfloat16 cut off": ("not rounded to nearest even", partial(rounding, True)),
    "two lanes at one element": ("undefined result", scatter),
    # The same in our kernels.
    "norm without the mask of rows": (
        "past the end",
        partial(
            mutant,
            "rms_norm",
            "norm",
            "norm_fwd",
            "tl.store(rstd_ptr + row, rstd, mask=row < rows)",
            "tl.store(rstd_ptr + row, rstd)",
        ),
    ),
    "norm with one row of partial sums": (
        "program instances",
        partial(mutant, "rms_norm", "norm", "norm_bwd", "program.to(tl.int64) * width", "program.to(tl.int64) * 0"),
    ),
    "merge without its mask": (
        "past the end",
        partial(
            mutant,
            "merge from ids",
            "merge",
            "merge_fwd",
            "tl.store(out_ptr, value.to(out_ptr.dtype.element_ty), mask=inside)",
            "tl.store(out_ptr, value.to(out_ptr.dtype.element_ty))",
        ),
    ),
    "merge that leaves rows out": (
        "is not finite",
        partial(
            mutant,
            "merge into embeddings",
            "merge",
            "merge_bwd",
            "tl.where(source < 0, dout, 0.0)\n",
            "tl.where(source < 0, dout, 0.0)\n        inside &= row > 0\n",
        ),
    ),
    "a cache with more tokens than slots": (
        "past the end",
        partial(mutant, "cache_write", "cache_write", "cache_write", "elif slot < slots:", "elif slot >= 0:"),
    ),
    "a product of more terms than there are": (
        "past the end",
        partial(mutant, "loss", "_gemm", "gemm", "wanted_k = first_k + step < depth", "wanted_k = first_k + step >= 0"),
    ),
    "logits without a mask": (
        "past the end",
        partial(
            mutant,
            "loss of a known count",
            "loss",
            "loss",
            "dz.to(logits_ptr.dtype.element_ty), mask=column < vocabulary",
            "dz.to(logits_ptr.dtype.element_ty)",
        ),
    ),
    "attention to keys of the future": (
        "PyTorch's in torch.bfloat16",
        partial(
            mutant, "attention of a pack", "attention.forward", "attention_fwd", " & (key[None, :] < end[:, None])", ""
        ),
    ),
    "attention that takes too many rows": (
        "past the end",
        partial(
            mutant,
            "attention of a pack",
            "attention.forward",
            "attention_fwd",
            "mask=row < row0 + count",
            "mask=row < row0 + BLOCK_M",
        ),
    ),
}
