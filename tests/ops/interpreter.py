"""bfloat16 in Triton's interpreter, for tests without a GPU.

The interpreter holds a bfloat16 as its 16 bits, in a uint16. As released it cuts float32 off where a GPU rounds, and it
multiplies, adds and compares those bits as if they were integers. `install` replaces the methods that do so:

- a conversion to bfloat16 rounds to nearest even; one from bfloat16 is exact;
- an operation on bfloat16 computes in float32 and rounds once;
- `tl.dot` multiplies in float32, where a product of two bfloat16 is exact, and adds in the accumulator's dtype.

What it does not mend, such as a sum of bfloat16, raises NotImplementedError: kernels widen to float32 first.
tests/conftest.py installs it; the library does not know it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

# The methods that are replaced or wrapped, and the digests of their source in the Tritons this was tested with.
METHODS = ("cast_impl", "binary_op", "unary_op", "create_dot")
REFUSED = ("create_fp_to_fp", "create_fma", "create_clampf", "create_atomic_rmw", "create_atomic_cas")
KNOWN = {"6dceb3c6adac": "3.6, 3.7, 3.8"}


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as uint16, in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, as uint16; halfway between two, to the one that ends in a zero bit."""
    bits = x.view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def digest(builder: type) -> str:
    """Of the source of METHODS."""
    source = "".join(inspect.getsource(getattr(builder, name)) for name in METHODS)
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def install() -> None:
    """Replace the methods in this process.

    Raises:
        RuntimeError: this Triton's methods are not those of a version in KNOWN.
    """
    import triton
    from triton.runtime import interpreter

    found = digest(interpreter.InterpreterBuilder)
    if found not in KNOWN:
        raise RuntimeError(
            f"Triton {triton.__version__} has another interpreter than {', '.join(KNOWN.values())}: one of "
            f"{', '.join(METHODS)} differs. Read them; if tests/ops/test_interpreter.py passes with the digest {found} "
            "in KNOWN of tests/ops/interpreter.py, keep it there"
        )
    mend(interpreter)


def mend(interpreter: Any) -> None:
    """Replace the methods of the module `interpreter`, whichever version it is."""
    builder, Handle, bf16 = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.tl.bfloat16
    cast_impl, dot = builder.cast_impl, builder.create_dot

    def is_bf16(x: Any) -> bool:
        return isinstance(x, Handle) and x.dtype.scalar == bf16

    def wide(x: Any) -> Any:
        return Handle(widened(x.data), interpreter.tl.float32) if is_bf16(x) else x

    def narrow(numbers: np.ndarray) -> Any:
        return Handle(rounded(numbers.astype(np.float32)), bf16)

    def cast(self: Any, x: Any, dtype: Any) -> Any:
        if dtype.scalar != bf16:
            return cast_impl(self, wide(x), dtype)
        numbers = wide(x).data
        if not np.array_equal(numbers.astype(np.float32), numbers, equal_nan=True):
            raise NotImplementedError(f"{x.dtype.scalar} to bfloat16 would be rounded twice, first to float32")
        return narrow(numbers)

    def in_float32(original: Callable) -> Callable:
        def method(self: Any, x: Any, *rest: Any) -> Any:
            if not is_bf16(x):
                return original(self, x, *rest)
            result = original(self, wide(x), *map(wide, rest))
            return result if result.data.dtype == bool else narrow(result.data)

        return method

    def refusing(name: str) -> Callable:
        original = getattr(builder, name)

        def method(self: Any, *arguments: Any, **options: Any) -> Any:
            if any(is_bf16(x) or getattr(x, "scalar", None) == bf16 for x in arguments):
                raise NotImplementedError(f"{name} of bfloat16, which the interpreter gets wrong; widen to float32")
            return original(self, *arguments, **options)

        return method

    def check_tensor(self: Any, tensors: Any) -> None:
        if any(is_bf16(x.handle) for x in tensors):
            raise NotImplementedError("a reduction of bfloat16, which the interpreter gets wrong; widen to float32")
        check(self, tensors)

    check = interpreter.ReduceScanOpInterface.check_tensor
    interpreter.ReduceScanOpInterface.check_tensor = check_tensor
    for name in REFUSED:
        setattr(builder, name, refusing(name))
    builder.cast_impl = cast
    builder.binary_op, builder.unary_op = in_float32(builder.binary_op), in_float32(builder.unary_op)
    builder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    builder.get_bf16 = lambda self, value: narrow(np.array([value]))
