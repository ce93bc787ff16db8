"""bfloat16 in the mended interpreter, against PyTorch's; without the mending the same tests fail."""

import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from triton.runtime import interpreter as triton_interpreter

from llava_fast.ops._triton import jit, tl
from tests.ops import interpreter

BF16 = torch.bfloat16
EVERY = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)


@jit
def _convert_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + m * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n)
    tl.store(out_ptr + m * N + n, tl.dot(a, b, tl.load(out_ptr + m * N + n)))


@jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + COUNT + i, x * y)
    tl.store(out_ptr + 2 * COUNT + i, x * 1.7)
    tl.store(out_ptr + 3 * COUNT + i, -x)
    tl.store(out_ptr + 4 * COUNT + i, tl.where(x < y, x, y))


@jit
def _sum_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, COUNT)), axis=0))


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _convert_kernel[(1,)](x, out, x.numel())
    return out


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, but for those of a NaN."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    different = (found.view(as_int) != expected.view(as_int)) & ~expected.isnan()
    assert not different.any(), (found[different][:5], expected[different][:5])


def floats(*words: int) -> torch.Tensor:
    return torch.tensor([struct.unpack("f", struct.pack("I", word))[0] for word in words])


def halfway() -> torch.Tensor:
    """For each pair of neighbours in bfloat16: what is halfway, and the float32 on both sides of it."""
    low = torch.arange(1 << 16) << 16
    return torch.cat([(low + part).to(torch.int32).view(torch.float32) for part in (0x7FFF, 0x8000, 0x8001, 0xFFFF)])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_every_bfloat16_converts(dtype: torch.dtype) -> None:
    assert_same(converted(EVERY, dtype), EVERY.to(dtype))
    if dtype != torch.float64:
        assert_same(converted(EVERY.to(dtype), BF16), EVERY.to(dtype).to(BF16))


def test_conversion_rounds_to_nearest_even() -> None:
    x = halfway()  # subnormal ones, and those beside infinity and NaN, among them
    assert_same(converted(x, BF16), x.to(BF16))
    assert_same(converted(x[:4096], BF16), x[:4096].to(BF16))
    # 1 + half a step: down to even; 1 + 3 halves: up to even; the largest float32: infinity; the smallest: 0.
    for x, y in ((0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x7F7FFFFF, 0x7F80), (0x80000001, 0x8000)):
        assert converted(floats(x), BF16).view(torch.int16).item() & 0xFFFF == y
    assert converted(floats(0x7F800001, 0xFF800001, 0xFFFFFFFF, 0x7FC00000), BF16).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16], ids=str)
def test_integers_convert(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    every = torch.arange(info.min, info.max + 1).to(dtype)
    assert_same(converted(every, BF16), every.to(BF16))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32], ids=str)
def test_to_integers(dtype: torch.dtype) -> None:
    x = torch.linspace(-100, 100, 256).to(BF16)
    assert torch.equal(converted(x, dtype), x.to(dtype))


def test_what_would_be_rounded_twice_is_refused() -> None:
    assert converted(torch.tensor([-(1 << 24)]), BF16) == -(1 << 24)
    for x in (torch.tensor([1 + 2.0**-30], dtype=torch.float64), torch.tensor([(1 << 24) + 1])):
        with pytest.raises(Exception, match="would be rounded twice"):
            converted(x, BF16)


@pytest.mark.parametrize("k", [1, 16, 64])
def test_dot(k: int) -> None:
    """Within the rounding of a float32 sum, and the sum itself in float32: not bfloat16 anywhere."""
    m, n = 16, 32
    a, b, acc = torch.randn(m, k).to(BF16), torch.randn(k, n).to(BF16), torch.randn(m, n)
    out = acc.clone()
    _dot_kernel[(1,)](a, b, out, m, k, n)
    exact = a.double() @ b.double() + acc.double()
    allowed = (k + 1) * 2**-24 * (a.double().abs() @ b.double().abs() + acc.double().abs())
    assert ((out - exact).abs() <= allowed).all()
    assert not torch.equal(out, out.to(BF16).float())


def test_dot_of_values_whose_bits_are_no_numbers() -> None:
    a, b = torch.eye(16).to(BF16), torch.full((16, 16), -1.5).to(BF16)
    a[3, 3], b[5, 2] = float("inf"), float("nan")
    out = torch.zeros(16, 16)
    _dot_kernel[(1,)](a, b, out, 16, 16, 16)
    expected = a.float() @ b.float()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_arithmetic_rounds_once() -> None:
    x, y = (torch.randn(4096) * 10 ** torch.randn(4096)).to(BF16), torch.randn(4096).to(BF16)
    out = torch.empty(5, 4096, dtype=BF16)
    _arithmetic_kernel[(1,)](x, y, out, 4096)
    scalar = torch.tensor(1.7).to(BF16)  # as Triton does: the number is rounded first
    for found, expected in zip(out, (x + y, x * y, x * scalar, -x, torch.minimum(x, y)), strict=True):
        assert_same(found, expected)


def test_a_sum_of_bfloat16_is_refused() -> None:
    with pytest.raises(Exception, match="a reduction of bfloat16"):
        _sum_kernel[(1,)](torch.ones(16, dtype=BF16), torch.empty(1), 16)


@pytest.mark.parametrize("name", interpreter.REFUSED)
def test_the_rest_is_refused(name: str) -> None:
    builder = triton_interpreter.interpreter_builder
    handle = triton_interpreter.TensorHandle(np.zeros(1, np.uint16), tl.bfloat16)
    with pytest.raises(NotImplementedError, match=f"{name} of bfloat16"):
        getattr(builder, name)(handle, handle, handle)


def test_other_dtypes_are_left_alone() -> None:
    x = halfway()[:4096]
    assert_same(converted(x, torch.float16), x.to(torch.float16))
    a, b, out = torch.randn(16, 16).half(), torch.randn(16, 16).half(), torch.zeros(16, 16)
    _dot_kernel[(1,)](a, b, out, 16, 16, 16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


UNMENDED = """
import torch
import test_interpreter as tests
from tests.ops import interpreter

def passes(test, *arguments):
    try:
        test(*arguments)
    except BaseException:  # pytest's "did not raise" is no Exception
        return False
    return True

checks = [
    (tests.test_conversion_rounds_to_nearest_even,),
    (tests.test_integers_convert, torch.int8),
    (tests.test_dot, 16),
    (tests.test_arithmetic_rounds_once,),
    (tests.test_a_sum_of_bfloat16_is_refused,),
]
print([passes(*check) for check in checks])
interpreter.install()
print([passes(*check) for check in checks])
interpreter.METHODS = ("create_dot", "create_trans")
try:
    interpreter.install()
except RuntimeError as error:
    print(error)
"""


def test_without_the_mending_these_tests_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join([p for p in sys.path if p]))
    done = subprocess.run([sys.executable, "-c", UNMENDED], capture_output=True, text=True)
    unmended, mended, refusal = done.stdout.splitlines() or [done.stderr, "", ""]
    assert unmended == str([False] * 5)
    assert mended == str([True] * 5), done.stderr
    assert "has another interpreter than 3.6, 3.7, 3.8:" in refusal and "create_trans differs" in refusal
