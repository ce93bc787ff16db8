"""The operations of llava_fast.ops call the kernels of csrc/ rightly: real Python, real C++, an emulated GPU."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_fast.ops import norm, patch_embed, resize
from tests.csrc import emulated
from tests.csrc.emulated import Memory
from tests.csrc.test_kernels import compare
from tests.ops.test_resize_against_pil import GREY, by_pil, picture

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, to compile the kernels for the emulator"),
    pytest.mark.slow,  # the kernels are compiled first, unless an earlier run has left them
]

OUTPUTS = ("output", "residual_output", "between")


class Extension:
    """llava_fast._cuda, emulated: takes addresses of tensors on the CPU as those of the device."""

    DType = SimpleNamespace(float32="float32", float16="float16", bfloat16="bfloat16")

    def __init__(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.library = library
        self.tensors: dict[int, torch.Tensor] = {}  # by address
        address_of = torch.Tensor.data_ptr

        def data_ptr(tensor: torch.Tensor) -> int:
            span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            self.tensors[address_of(tensor)] = tensor.as_strided((span,), (1,))  # whatever lies between, too
            return address_of(tensor)

        monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)

    def __getattr__(self, function: str) -> Any:
        def call(*, stream: int, **arguments: Any) -> None:
            assert stream == 7
            taken = {name: self.tensors[value] for name, value in arguments.items() if value in self.tensors}
            memory = {name: Memory(tensor, is_input=name not in OUTPUTS) for name, tensor in taken.items()}
            numbers = {name: value for name, value in arguments.items() if name not in memory}
            results = emulated.call(self.library, function, memory, **numbers)
            for name in memory.keys() & set(OUTPUTS):
                taken[name].copy_(results.tensors[name])

        return call


@pytest.fixture(autouse=True)
def extension(monkeypatch: pytest.MonkeyPatch) -> Extension:
    made = Extension(emulated.extension(emulated.sources()), monkeypatch)
    for module in (norm, patch_embed, resize):
        monkeypatch.setattr(module, "extension", lambda: made)
    monkeypatch.setattr(patch_embed, "multiprocessors", lambda device: 108)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype: torch.dtype, with_residual: bool):
    x, weight = torch.randn(6, 100).to(dtype)[:, :64], torch.randn(64).to(dtype)  # rows that are 100 apart
    residual = torch.randn(6, 128).to(dtype)[:, ::2] if with_residual else None
    tensors = (x, weight, 1e-5, residual)
    doubles = (x.double(), weight.double(), 1e-5, residual.double() if with_residual else None)
    y, s = norm._rms_norm_cuda(*tensors)
    torchs, sums = norm.rms_norm_reference(*tensors)
    compare("y", y, torchs, norm.rms_norm_reference(*doubles)[0])
    assert torch.equal(s, sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_patch_embed(dtype: torch.dtype):
    pixels = torch.randint(0, 256, (2, 3, 28, 42), dtype=torch.uint8).permute(0, 2, 3, 1)
    shapes = ((48, 3, 14, 14), (48,), (7, 48), (48,), (48,))
    tensors = [torch.randn(shape).to(dtype) / (14 if len(shape) == 4 else 1) for shape in shapes]
    numbers = (1e-5, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    found = patch_embed._patch_embed_cuda(pixels, *tensors, *numbers)
    torchs = patch_embed.patch_embed_reference(pixels, *tensors, *numbers)
    truth = patch_embed.patch_embed_reference(pixels, *(tensor.double() for tensor in tensors), *numbers)
    compare("tokens", found, torchs, truth)


@pytest.mark.parametrize("fill", [None, GREY])
def test_resize(fill: tuple[int, int, int] | None):
    images = [picture(40, 57), picture(90, 31, 1)]
    plan = resize.make_plan([(40, 57), (90, 31)], 28, fill)
    found = resize._resize_cuda(torch.cat([image.reshape(-1) for image in images]), plan)
    for image, square in zip(images, found):
        assert torch.equal(square, by_pil(image, 28, fill))
