"""Constants, exact GELU and its derivative, shared by several kernels; launchers read a constant by `.value`."""

from __future__ import annotations

from typing import Any

from llava_fast.ops._triton import inlined, tl


def _constant(value: float) -> Any:
    """A global constant that Triton kernels may read."""
    return value if tl is None else tl.constexpr(value)


LOG2_E = _constant(1.4426950408889634)  # exp(x) = exp2(x · LOG2_E)
LN_2 = _constant(0.6931471805599453)  # ln(x) = log2(x) · LN_2
SQRT_HALF = _constant(0.7071067811865476)
NORMAL_PEAK = _constant(0.3989422804014327)  # 1 / sqrt(2π)


@inlined
def normal_below(x):
    """Φ(x), the cumulative distribution of a standard normal: GELU(x) = x · Φ(x)."""
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF))


@inlined
def gelu_slope(x, below):
    """GELU'(x) = Φ(x) + x · φ(x), given Φ(x)."""
    return below + x * (NORMAL_PEAK * tl.exp(-0.5 * x * x))
