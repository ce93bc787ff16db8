"""The CUDA extension: it compiles, loads with no GPU, checks what it is given, and its kernels spill nothing.

Built here with CMake into build/, where a second run finds it ready; needs nvcc.
"""

import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import compile_report
from llava_fast.ops import resize

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "test-extension"

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, to compile the CUDA extension"),
    pytest.mark.slow,  # the extension is compiled first, unless an earlier run has left it
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def tool(name: str) -> str:
    """A program of the CUDA toolkit or, where it is a slim one, the copy inside triton."""
    beside_triton = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / name
    return shutil.which(name) or str(beside_triton)


@pytest.fixture(scope="module")
def library() -> Path:
    scripts = Path(sys.executable).parent
    cmake, ninja = (shutil.which(name, path=scripts) or name for name in ("cmake", "ninja"))
    python = f"-DPython_EXECUTABLE={sys.executable}"
    run(cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", python)
    built = run(cmake, "--build", BUILD)
    assert "spill" not in built.lower()
    return BUILD / f"_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}"


@pytest.fixture(scope="module")
def cuda(library: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("_cuda", library)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(cuda: ModuleType) -> dict[str, Any]:
    """Well-formed arguments for 3 rows of 4096 bfloat16; the addresses are nobody's."""
    return {
        "output": 1 << 20,
        "input": 2 << 20,
        "weight": 3 << 20,
        "rows": 3,
        "columns": 4096,
        "output_stride": 4096,
        "input_stride": 4096,
        "eps": 1e-5,
        "dtype": cuda.DType.bfloat16,
    }


def test_it_loads_and_knows_its_gpus(cuda: ModuleType):
    assert cuda.compiled_architectures() == [80, 90]
    assert cuda.device_count() == torch.cuda.device_count()
    runtime, driver = cuda.versions()
    release = re.search(r"release (\d+)\.(\d+)", run("nvcc", "--version"))
    assert runtime == 1000 * int(release[1]) + 10 * int(release[2])
    assert (driver > 0) == torch.cuda.is_available()


def test_it_needs_neither_torch_nor_the_cuda_runtime(library: Path):
    """Only then can no PyTorch ABI break it, and it imports on a machine without CUDA."""
    needed = run("ldd", library)
    assert "libc.so" in needed
    assert not re.search("torch|c10|cudart|libcuda", needed)


@pytest.mark.parametrize(
    ("change", "plan"),
    [
        ({}, (8, 512, 3)),
        ({"columns": 1024}, (8, 128, 3)),
        ({"columns": 8}, (8, 32, 3)),
        ({"input": (2 << 20) + 2}, (1, 512, 3)),  # one pointer that is not aligned
        ({"weight": (3 << 20) + 8}, (1, 512, 3)),
        ({"input_stride": 4097}, (1, 512, 3)),  # rows that drift out of alignment
        ({"input_stride": 4097, "rows": 1}, (8, 512, 1)),  # there is only the first
        ({"columns": 4095}, (1, 512, 3)),
        ({"columns": 5}, (1, 32, 3)),
        ({"residual": 4 << 20, "residual_stride": 4096} | {"residual_output": 5 << 20}, None),
        ({"rows": 0, "input": 0, "output": 0}, (1, 32, 0)),
    ],
)
def test_loads_are_wide_where_everything_is_aligned(
    cuda: ModuleType, arguments: dict[str, Any], change: dict[str, int], plan: tuple[int, int, int] | None
):
    if plan is None:
        with pytest.raises(ValueError, match="residual_output_stride is 0, less than the 4096 columns"):
            cuda.rms_norm_plan(**arguments | change)
        change, plan = change | {"residual_output_stride": 4096}, (8, 512, 3)
    assert tuple(cuda.rms_norm_plan(**arguments | change).values()) == plan


def test_float32_loads_are_four_wide(cuda: ModuleType, arguments: dict[str, Any]):
    plan = cuda.rms_norm_plan(**arguments | {"dtype": cuda.DType.float32})
    assert plan == {"vector_elements": 4, "threads": 512, "blocks": 3}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rows": -1}, "rows is -1, less than 0"),
        ({"rows": 1 << 31}, "rows is 2147483648, more than"),
        ({"columns": 0}, "columns is 0, less than 1"),
        ({"columns": 1 << 30}, "columns is 1073741824, more than"),
        ({"eps": -1.0}, "eps is -1"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"input": 0}, "input is a null pointer"),
        ({"output": 0}, "output is a null pointer"),
        ({"weight": 0}, "weight is a null pointer"),
        ({"input": (2 << 20) + 1}, "input is not aligned to its elements of 2 bytes"),
        ({"output_stride": 4095}, "output_stride is 4095, less than the 4096 columns"),
        ({"residual": 4 << 20}, "residual and residual_output go together"),
        ({"residual_output": 4 << 20}, "residual and residual_output go together"),
    ],
)
def test_wrong_arguments_are_refused_by_name(
    cuda: ModuleType, arguments: dict[str, Any], change: dict[str, Any], complaint: str
):
    for function in (cuda.rms_norm_plan, cuda.rms_norm_forward):
        with pytest.raises(ValueError, match=complaint):
            function(**arguments | change)


def test_arguments_go_by_name_and_type(cuda: ModuleType, arguments: dict[str, Any]):
    with pytest.raises(TypeError):
        cuda.rms_norm_forward(*arguments.values())
    with pytest.raises(TypeError):
        cuda.rms_norm_forward(**arguments | {"dtype": 1})


def test_no_rows_need_no_gpu(cuda: ModuleType, arguments: dict[str, Any]):
    nothing = {"rows": 0, "input": 0, "output": 0}
    assert cuda.rms_norm_forward(**arguments | nothing) is None


def test_kernels_spill_nothing_and_load_16_bytes(library: Path):
    """Three dtypes, wide and narrow loads, with and without a residual, for each architecture."""
    usage = run(tool("cuobjdump"), "--dump-resource-usage", library)
    kernels = re.findall(r"Function \S*rms_norm_kernel\S*:\s+REG:(\d+) STACK:(\d+)", usage)
    assert len(kernels) == 2 * 12
    assert {int(stack) for _, stack in kernels} == {0}
    assert max(int(registers) for registers, _ in kernels) <= 64  # 2 blocks of 512 threads per SM and more
    code = run(tool("cuobjdump"), "-sass", library)
    assert not re.search(r"\b(STL|LDL)\b", code)
    assert len(re.findall(r"LDG\.E\.128", code)) >= 2 * 6
    assert len(re.findall(r"STG\.E\.128", code)) >= 2 * 6


def test_the_compile_report_reads_the_kernels():
    records = compile_report.cuda_records("sm_80", ROOT / "csrc" / "rms_norm.cu")
    variants = {(r["kernel"], r["dtype"], *r["flags"].values()) for r in records}
    assert variants == {
        ("rms_norm_kernel", dtype, elements, residual)
        for dtype, wide in (("fp32", 4), ("fp16", 8), ("bf16", 8))
        for elements in (1, wide)
        for residual in (0, 1)
    }
    assert compile_report.problems(records) == []
    assert all(r["registers"] > 0 and r["shared_bytes"] == 64 for r in records)  # a float for each of 16 warps
    assert compile_report.table(records).count("rms_norm_kernel") == len(records)


# ---- patch embedding


@pytest.fixture
def images(cuda: ModuleType) -> dict[str, Any]:
    """Well-formed arguments for 32 images of CLIP ViT-L/14 at 336 in bfloat16, on an A100; nobody's addresses."""
    names = ("output", "pixels", "weight", "cls", "position", "norm_weight", "norm_bias")
    return {
        **{name: (i + 1) << 20 for i, name in enumerate(names)},
        **{"images": 32, "height": 336, "width": 336, "patch": 14, "columns": 1024},
        **{"mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3), "eps": 1e-5},
        **{"dtype": cuda.DType.bfloat16, "multiprocessors": 108},
    }


@pytest.mark.parametrize(
    ("change", "strips", "row_tiles", "column_tiles", "blocks"),
    [
        ({}, 4, 3, 4, (192, 1)),  # four strips of 24 patches are 96 rows; a block makes all 1024 columns of them
        ({"images": 8}, 4, 3, 1, (48, 4)),  # fewer blocks than multiprocessors: the columns are shared out
        ({"images": 1}, 1, 1, 1, (24, 4)),  # then the rows; 96 blocks are the most there can be
        ({"images": 0}, 1, 1, 1, (0, 4)),
        ({"images": 8, "multiprocessors": 132}, 4, 3, 1, (48, 4)),
        ({"images": 64, "height": 224, "width": 224, "patch": 16}, 4, 2, 4, (224, 1)),  # 96 rows of 768 do not fit
        ({"columns": 264}, 4, 3, 2, (192, 1)),
    ],
)
def test_patches_are_shared_out_over_the_multiprocessors(
    cuda: ModuleType, images: dict[str, Any], change: dict[str, int], strips: int, row_tiles: int, column_tiles: int,
    blocks: tuple[int, int],
):  # fmt: skip
    plan = cuda.patch_embed_plan(**images | change)
    assert (plan["strips"], plan["row_tiles"]) == (strips, row_tiles)
    assert (plan["column_tiles"], plan["blocks"]) == (column_tiles, blocks)
    assert plan["shared_bytes"] <= 163 * 1024


def test_shared_memory_holds_the_patches_and_the_weight_or_two_strips(cuda: ModuleType, images: dict[str, Any]):
    patches, stages = 96 * (592 + 8) * 2, 4 * 16 * (256 + 8) * 2
    assert cuda.patch_embed_plan(**images)["shared_bytes"] == patches + stages
    wide = images | {"width": 1344, "height": 14}  # one strip of 96 patches
    assert cuda.patch_embed_plan(**images | {"patch": 2, "width": 96})["shared_bytes"] == 96 * (16 + 8) * 2 + stages
    with pytest.raises(ValueError, match="width 1344 with patch 14 makes a strip of 96 patches of 588 numbers"):
        cuda.patch_embed_plan(**wide)


@pytest.mark.parametrize(
    ("change", "copy_bytes", "pairs"),
    [
        ({}, 16, True),
        ({"pixels": (1 << 20) + 4}, 4, True),
        ({"pixels": (1 << 20) + 2}, 1, True),
        ({"height": 340, "width": 340}, 4, True),
        ({"width": 337}, 1, False),
        ({"patch": 7}, 16, False),
    ],
)
def test_copies_are_as_wide_as_the_pixels_are_aligned(
    cuda: ModuleType, images: dict[str, Any], change: dict[str, int], copy_bytes: int, pairs: bool
):
    plan = cuda.patch_embed_plan(**images | change)
    assert (plan["copy_bytes"], plan["pixel_pairs"]) == (copy_bytes, pairs)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"images": -1}, "images is -1, less than 0"),
        ({"images": 1 << 24}, "images is 16777216: more than 2147483647 tokens"),
        ({"patch": 0}, "patch is 0, less than 1"),
        ({"height": 13}, "height is 13, less than 14"),
        ({"width": 1 << 15}, "width is 32768, more than 16384"),
        ({"columns": 1020}, "columns is 1020, not a multiple of 8"),
        ({"columns": 8200}, "columns is 8200, more than 8192"),
        ({"multiprocessors": 0}, "multiprocessors is 0, less than 1"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"std": (0.3, 0.0, 0.3)}, r"std has 0\.0+; it must be more than 0"),
        ({"patch": 32}, "a strip of 10 patches of 3072 numbers, which does not fit into shared memory"),
        ({"pixels": 0}, "pixels is a null pointer"),
        ({"position": 0}, "position is a null pointer"),
        ({"weight": (3 << 20) + 8}, "weight is not aligned to 16 bytes"),
        ({"output": (1 << 20) + 2}, "output is not aligned to 16 bytes"),
    ],
)
def test_wrong_images_are_refused_by_name(
    cuda: ModuleType, images: dict[str, Any], change: dict[str, Any], complaint: str
):
    for function in (cuda.patch_embed_plan, cuda.patch_embed_forward):
        with pytest.raises(ValueError, match=complaint):
            function(**images | change)


def test_the_tensor_cores_take_no_float32(cuda: ModuleType, images: dict[str, Any]):
    with pytest.raises(ValueError, match="dtype is float32"):
        cuda.patch_embed_plan(**images | {"dtype": cuda.DType.float32})


def test_no_images_need_no_gpu(cuda: ModuleType, images: dict[str, Any]):
    assert cuda.patch_embed_forward(**images | {"images": 0, "pixels": 0, "output": 0}) is None


def test_patch_embedding_spills_nothing_and_multiplies_on_tensor_cores(library: Path):
    """Two dtypes, three heights of a tile, pixels by two or one; and the norm at three widths."""
    usage = run(tool("cuobjdump"), "--dump-resource-usage", library)
    kernels = re.findall(r"Function \S*(patch_embed|token_norm)_kernel\S*:\s+REG:(\d+) STACK:(\d+)", usage)
    assert len([name for name, _, _ in kernels if name == "patch_embed"]) == 2 * 12
    assert len([name for name, _, _ in kernels if name == "token_norm"]) == 2 * 6
    assert {int(stack) for _, _, stack in kernels} == {0}
    code = run(tool("cuobjdump"), "-sass", library)
    bodies = [part for part in code.split("Function : ") if "patch_embed_kernel" in part.split()[0]]
    assert len(bodies) == 2 * 12
    for body in bodies:
        assert "HMMA.16816.F32" in body and "LDGSTS.E.BYPASS.128" in body and "LDSM.16.MT88.4" in body


# ---- resize


@pytest.fixture
def resizing() -> dict[str, Any]:
    """Well-formed arguments for 8 images with 3000 lines between them; nobody's addresses."""
    names = ("output", "between", "pixels", "images", "tables")
    addresses = {name: (i + 1) << 20 for i, name in enumerate(names)}
    return {**addresses, "num_images": 8, "lines": 3000, "size": 336, "fill": (122, 116, 104)}


def test_a_line_is_a_block_in_one_pass_and_a_row_of_results_in_the_other(cuda: ModuleType, resizing: dict[str, Any]):
    assert cuda.resize_plan(**resizing) == {"threads": 128, "blocks": (3000, 8 * 336)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_images": -1}, "num_images is -1, less than 0"),
        ({"lines": 7}, "lines is 7, less than 8"),
        ({"lines": 1 << 31}, "lines is 2147483648, more than"),
        ({"size": 0}, "size is 0, less than 1"),
        ({"num_images": 1 << 20, "lines": 1 << 20, "size": 1 << 13}, r"num_images \* size is 8589934592, more than"),
        ({"fill": (0, 256, 0)}, "fill is 256, more than 255"),
        ({"pixels": 0}, "pixels is a null pointer"),
        ({"images": (4 << 20) + 4}, "images is not aligned to 8 bytes"),
    ],
)
def test_wrong_resizing_is_refused_by_name(
    cuda: ModuleType, resizing: dict[str, Any], change: dict[str, Any], complaint: str
):
    for function in (cuda.resize_plan, cuda.resize_forward):
        with pytest.raises(ValueError, match=complaint):
            function(**resizing | change)


def test_nothing_to_resize_needs_no_gpu(cuda: ModuleType, resizing: dict[str, Any]):
    nothing = dict.fromkeys(("output", "between", "pixels", "images", "tables", "num_images", "lines"), 0)
    assert cuda.resize_forward(**resizing | nothing) is None


def test_the_plan_s_fields_are_the_kernel_s():
    """Both sides write the names of an image's numbers down; in one order."""
    struct = re.search(r"struct ResizeImage \{(.*?)\};", (ROOT / "csrc/resize.h").read_text(), re.DOTALL).group(1)
    assert tuple(re.findall(r"\w+", struct.replace("std::int64_t", ""))) == resize.FIELDS


def test_resize_spills_nothing(library: Path):
    usage = run(tool("cuobjdump"), "--dump-resource-usage", library)
    kernels = re.findall(r"Function \S*resize_(first|second)_kernel\S*:\s+REG:(\d+) STACK:(\d+)", usage)
    assert len(kernels) == 2 * 2
    assert {int(stack) for _, _, stack in kernels} == {0}
    assert max(int(registers) for _, registers, _ in kernels) <= 64


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "offset"), [(1, 1, 0), (17, 577, 0), (5, 4096, 0), (5, 4096, 1)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_results_equal_pytorch(cuda: ModuleType, name: str, rows: int, columns: int, offset: int, with_residual: bool):
    dtype = DTYPES[name]

    def matrix() -> torch.Tensor:
        """[rows, columns], a view that starts `offset` elements into its storage."""
        storage = torch.randn(rows * columns + offset, device="cuda", dtype=dtype)
        return storage[offset:].view(rows, columns)

    x, residual, weight = matrix(), matrix(), torch.randn(columns, device="cuda", dtype=dtype)
    output, residual_output = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    extra = {
        "residual": residual.data_ptr(),
        "residual_stride": residual.stride(0),
        "residual_output": residual_output.data_ptr(),
        "residual_output_stride": residual_output.stride(0),
    }
    cuda.rms_norm_forward(
        output=output.data_ptr(),
        input=x.data_ptr(),
        weight=weight.data_ptr(),
        rows=rows,
        columns=columns,
        output_stride=output.stride(0),
        input_stride=x.stride(0),
        eps=1e-5,
        dtype=getattr(cuda.DType, name),
        stream=torch.cuda.current_stream().cuda_stream,
        **extra if with_residual else {},
    )
    added = x + residual if with_residual else x
    if with_residual:
        assert torch.equal(residual_output, added)
    exact = added.double()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    wide = added.float()
    usual = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    error, usual_error = (output.double() - exact).abs().max(), (usual.double() - exact).abs().max()
    assert error <= 2 * usual_error + torch.finfo(torch.float32).eps


SANITIZED = """
import sys, torch
sys.path.insert(0, {folder!r})
import _cuda
from llava_fast import backend
from llava_fast.ops import norm, patch_embed, resize

backend._extension = _cuda
with torch.no_grad(), backend.use_backend("cuda", "rms_norm", "patch_embed", "resize"):
    x = torch.randn(5, 123, device="cuda")
    norm.rms_norm(x, x[0].contiguous(), eps=1e-5, residual=x)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in ((40, 57, 3), (90, 20, 3), (1, 9, 3))]
    for size, patch, width in ((32, 16, 64), (28, 14, 264), (17, 5, 72)):
        pixels = resize.preprocess(images, size=size, device="cuda")
        shapes = ((width, 3, patch, patch), (width,), (1 + (size // patch) ** 2, width), (width,), (width,))
        weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        patch_embed.patch_embed(pixels, *weights, eps=1e-5, mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("check", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(library: Path, check: str, monkeypatch: pytest.MonkeyPatch):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("needs compute-sanitizer")
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # so that every tensor has bounds of its own
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = SANITIZED.format(folder=str(library.parent))
    run("compute-sanitizer", "--tool", check, "--error-exitcode", "1", sys.executable, "-c", script)
