"""The kernels of csrc/ in the emulated GPU (emulated.py): their results, by the rule of tests/ops/kit.py or to PIL's
bits, with no fault reported; and mutated kernels, each of which must be caught.
"""

import shutil
from pathlib import Path

import pytest
import torch

from llava_fast.ops import patch_embed, resize
from llava_fast.ops.norm import rms_norm_reference
from tests.csrc import emulated
from tests.csrc.emulated import Fault, Memory, Results
from tests.ops.kit import errors
from tests.ops.test_resize_against_pil import GREY, by_pil, picture

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, to compile the kernels for the emulator"),
    pytest.mark.slow,  # the kernels are compiled first, unless an earlier run has left them
]

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def extension() -> Path:
    return emulated.extension(emulated.sources())


def compare(name: str, found: torch.Tensor, torchs: torch.Tensor, truth: torch.Tensor) -> None:
    assert torch.isfinite(found).all(), f"{name} is not finite"
    ours, theirs, ulp = errors(found, torchs, truth)
    assert ours <= 2 * theirs + ulp, f"{name}: error {ours:.3e}, PyTorch's is {theirs:.3e}"


# ---- patch embedding

# Images, height, width, patch, tower's width, multiprocessors, bytes that the pixels begin after 16: between them every
# height of a tile, copies of 16, 4 and 1 bytes, pixels by two and by one, one tile of columns and several, full and
# not, and the norm at its three widths.
PATCHES = [
    (1, 4, 4, 4, 16, 108, 0),  # one patch
    (3, 12, 12, 4, 64, 1, 0),  # a block with strips of two images
    (2, 17, 17, 5, 72, 1, 0),  # a margin that no patch covers; odd widths
    (2, 9, 14, 3, 40, 4, 0),
    (2, 28, 42, 14, 48, 2, 0),  # 588 numbers a patch
    (1, 28, 32, 14, 264, 2, 4),
    (5, 6, 8, 2, 520, 2, 0),
    (1, 48, 48, 24, 264, 1, 2),  # 1728 numbers a patch: a low tile
    (2, 7, 126, 7, 24, 1, 0),
    (1, 4, 8, 4, 1032, 108, 0),
    (1, 3, 48, 1, 2056, 1, 0),
    (2, 32, 64, 16, 128, 3, 0),
    (4, 36, 48, 4, 16, 8, 0),
]


def patch_sizes(images: int, height: int, width: int, patch: int, columns: int, multiprocessors: int, dtype: str):
    return {
        **{"images": images, "height": height, "width": width, "patch": patch, "columns": columns},
        **{"mean": MEAN, "std": STD, "eps": 1e-5, "dtype": dtype, "multiprocessors": multiprocessors},
    }


def check_patch_embed(library: Path, *shape: int, offset: int = 0, dtype: str = "bfloat16", seed: int = 0) -> Results:
    images, height, width, patch, d, _ = shape
    tokens = 1 + (height // patch) * (width // patch)
    kind = getattr(torch, dtype)
    pixels = torch.randint(0, 256, (images, height, width, 3), dtype=torch.uint8)
    weight = (torch.randn(d, 3, patch, patch) / patch).to(kind)
    cls, position, norm_weight, norm_bias = (torch.randn(size).to(kind) for size in ((d,), (tokens, d), (d,), (d,)))
    memory = {
        "output": Memory(torch.empty(images, tokens, d, dtype=kind), is_input=False),
        "pixels": Memory(pixels, offset=offset),
        "weight": Memory(weight.permute(2, 3, 1, 0).reshape(-1, d)),
        **{"cls": Memory(cls), "position": Memory(position)},
        **{"norm_weight": Memory(norm_weight), "norm_bias": Memory(norm_bias)},
    }
    results = emulated.call(library, "patch_embed_forward", memory, seed=seed, **patch_sizes(*shape, dtype))
    tensors = (weight, cls, position, norm_weight, norm_bias)
    torchs = patch_embed.patch_embed_reference(pixels, *tensors, 1e-5, MEAN, STD)
    truth = patch_embed.patch_embed_reference(pixels, *(t.double() for t in tensors), 1e-5, MEAN, STD)
    compare("output", results.tensors["output"], torchs, truth)
    return results


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", PATCHES, ids=str)
def test_patch_embed(extension: Path, shape: tuple[int, ...], dtype: str):
    *shape, offset = shape
    check_patch_embed(extension, *shape, offset=offset, dtype=dtype)


@pytest.mark.parametrize("multiprocessors", [108, 1])
def test_patch_embed_of_llava(extension: Path, multiprocessors: int):
    """CLIP ViT-L/14 at 336, one image, as on an A100; and in the largest blocks, which large batches have. What goes
    through the tensor cores has no bank conflicts."""
    results = check_patch_embed(extension, 1, 336, 336, 14, 1024, multiprocessors)
    tensor_cores = {line: ways for line, ways in results.ways.items() if "mma.cuh" in line}
    assert len(tensor_cores) >= 4
    assert set(tensor_cores.values()) == {1}, tensor_cores


def test_the_shapes_reach_every_kernel(extension: Path):
    found = set()
    for *shape, offset in PATCHES:
        names = ("output", "pixels", "weight", "cls", "position", "norm_weight", "norm_bias")
        addresses = dict.fromkeys(names, 1 << 20) | {"pixels": (1 << 20) + offset}
        plan = emulated.call(extension, "patch_embed_plan", {}, **addresses, **patch_sizes(*shape, "bfloat16")).value
        found |= {(name, plan[name]) for name in ("row_tiles", "copy_bytes", "pixel_pairs")}
        found.add(("tiles of columns", min(plan["column_tiles"], 2)))
        found.add(("blocks of columns", min(plan["blocks"][1], 2)))
    assert found == {
        *(("row_tiles", n) for n in (1, 2, 3)),
        *(("copy_bytes", n) for n in (1, 4, 16)),
        *(("pixel_pairs", n) for n in (False, True)),
        *((of, n) for of in ("tiles of columns", "blocks of columns") for n in (1, 2)),
    }


@pytest.mark.parametrize("seed", range(1, 4))
def test_the_order_of_threads_changes_nothing(extension: Path, seed: int):
    outputs = []
    for order in (0, seed):
        torch.manual_seed(0)
        outputs.append(check_patch_embed(extension, 3, 12, 12, 4, 264, 1, seed=order).tensors["output"])
    assert torch.equal(*outputs)


# ---- RMSNorm


def check_rms_norm(
    library: Path, rows: int, columns: int, *, dtype: str = "bfloat16", offset: int = 0, residual: bool = True,
    in_place: bool = False,
) -> Results:  # fmt: skip
    kind = getattr(torch, dtype)
    x, added, weight = torch.randn(rows, columns) + 0.5, torch.randn(rows, columns), torch.randn(columns) + 1
    x, added, weight = (tensor.to(kind) for tensor in (x, added, weight))
    memory = {"input": Memory(x, writable=in_place, offset=offset), "weight": Memory(weight)}
    memory["output"] = memory["input"] if in_place else Memory(torch.empty_like(x), is_input=False)
    strides = dict.fromkeys(("output_stride", "input_stride"), columns)
    if residual:
        memory["residual"] = Memory(added, writable=in_place)
        memory["residual_output"] = memory["residual"] if in_place else Memory(torch.empty_like(x), is_input=False)
        strides |= dict.fromkeys(("residual_stride", "residual_output_stride"), columns)
    sizes = {"rows": rows, "columns": columns, **strides, "eps": 1e-5, "dtype": dtype}
    results = emulated.call(library, "rms_norm_forward", memory, **sizes)
    torchs, sums = rms_norm_reference(x, weight, 1e-5, added if residual else None)
    truth, _ = rms_norm_reference(x.double(), weight.double(), 1e-5, added.double() if residual else None)
    compare("output", results.tensors["output"], torchs, truth)
    if residual:
        assert torch.equal(results.tensors["residual_output"], sums)
    return results


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 577), (2, 4096), (3, 264), (40, 8)])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(extension: Path, rows: int, columns: int, dtype: str, residual: bool):
    check_rms_norm(extension, rows, columns, dtype=dtype, residual=residual)


@pytest.mark.parametrize("columns", [264, 4096])
def test_rms_norm_in_place(extension: Path, columns: int):
    check_rms_norm(extension, 3, columns, in_place=True)


def test_rms_norm_of_rows_that_are_not_aligned(extension: Path):
    check_rms_norm(extension, 3, 264, offset=2)


# ---- resize


def check_resize(library: Path, sizes: list[tuple[int, int]], size: int, fill: tuple[int, int, int] | None) -> None:
    images = [picture(height, width, seed=i, contrast=i % 2 == 1) for i, (height, width) in enumerate(sizes)]
    plan = resize.make_plan(sizes, size, fill)
    memory = {
        "output": Memory(torch.empty(len(images), size, size, 3, dtype=torch.uint8), is_input=False),
        "between": Memory(torch.empty(plan.lines, size, 3, dtype=torch.uint8), is_input=False),
        "pixels": Memory(torch.cat([image.reshape(-1) for image in images])),
        "images": Memory(plan.images),
        "tables": Memory(plan.tables),
    }
    numbers = {"num_images": len(images), "lines": plan.lines, "size": size, "fill": plan.fill}
    output = emulated.call(library, "resize_forward", memory, **numbers).tensors["output"]
    for i, image in enumerate(images):
        assert torch.equal(output[i], by_pil(image, size, fill)), f"image {i} is not PIL's"


SIZES = [(40, 57), (90, 31), (28, 28), (9, 12), (1, 60), (72, 34), (150, 3)]


@pytest.mark.parametrize("fill", [None, GREY])
@pytest.mark.parametrize("size", [7, 28])
def test_resize(extension: Path, size: int, fill: tuple[int, int, int] | None):
    check_resize(extension, SIZES, size, fill)


def test_resize_to_llava_s_square(extension: Path):
    check_resize(extension, [(240, 320)], 336, GREY)


# ---- mutations


def small_patches(library: Path) -> None:
    results = check_patch_embed(library, 3, 28, 42, 14, 264, 1)
    conflicts = {line: ways for line, ways in results.ways.items() if "mma.cuh" in line and ways > 1}
    assert not conflicts, f"bank conflicts: {conflicts}"


def small_rows(library: Path) -> None:
    check_rms_norm(library, 3, 264)
    check_rms_norm(library, 1, 265)


def small_images(library: Path) -> None:
    check_resize(library, SIZES, 28, GREY)


WRONG = "error .*, PyTorch's is|is not finite"
FAULTY = "nobody has written|has not been waited for|a race"  # as the order of the threads has it
FACTORS = "f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
MUTATIONS = [
    # The tensor cores.
    ("mma.cuh", FACTORS + "{%4, %5, %6, %7}", FACTORS + "{%4, %6, %5, %7}", WRONG),
    ("patch_embed.cu", "(sums[i][j], a[i], b[0], b[1])", "(sums[i][j], a[i], b[1], b[0])", WRONG),
    ("patch_embed.cu", "load_matrices_transposed(b,", "load_matrices(b,", WRONG),
    ("patch_embed.cu", "constexpr int kPad = 8;", "constexpr int kPad = 0;", "bank conflicts"),
    ("patch_embed.cu", "sums[i / 2][j][i % 2 * 2 + k]", "sums[i / 2][j][i % 2 + 2 * k]", WRONG),
    # Barriers and copies.
    ("patch_embed.cu", "wait_copies<1>();\n        __syncthreads();", "wait_copies<1>();", FAULTY),
    ("patch_embed.cu", "normalisation);\n        __syncthreads();", "normalisation);", FAULTY),
    ("patch_embed.cu", "__syncthreads();  // this stage", "// this stage", FAULTY),
    ("patch_embed.cu", "wait_copies<1>()", "wait_copies<2>()", "waited"),
    ("patch_embed.cu", "wait_copies<kStages - 2>()", "wait_copies<kStages - 1>()", "waited"),
    ("patch_embed.cu", "block_sum(square, partial[1])", "block_sum(square, partial[0])", "race"),
    ("common.cuh", "    __syncthreads();\n", "", FAULTY),
    # Bounds and alignment.
    ("patch_embed.cu", "first_depth + row < shape.depth && ", "", "out of bounds.*weight"),
    ("patch_embed.cu", "if (strip < present)", "if (strip <= present)", "out of bounds|race"),
    ("patch_embed.cu", "std::max(strips, stages)", "std::min(strips, stages)", "out of bounds"),
    ("patch_embed.cu", "aligned(16) ? 16 : aligned(4)", "aligned(2) ? 16 : aligned(4)", "misaligned"),
    ("rms_norm.cu", "wide = wide && a.columns * bytes % kVectorBytes == 0;", "", "is not finite"),
    ("common.cuh", "partial[threadIdx.x / kWarp] =", "partial[threadIdx.x / kWarp + 1] =", "written|out of bounds"),
    ("resize.cu", "at >= 0 && at < length;", "at >= 0 && at <= length;", "not PIL's|out of bounds"),
    # Numbers.
    ("common.cuh", "(0xffffffffu, value, offset)", "(0xffffffffu, value, 1)", WRONG),
    ("patch_embed.cu", "shape.depth + i % rest] = from_float<T>(0.0f)", "shape.depth + i % rest]", WRONG),
    ("rms_norm.cu", "static_cast<float>(columns) + eps", "static_cast<float>(packs) + eps", WRONG),
    ("resize.cu", "int sum = 1 << (kFractionBits - 1);", "int sum = 0;", "not PIL's"),
]
CHECKS = {"resize.cu": small_images, "rms_norm.cu": small_rows, "common.cuh": small_rows}


@pytest.mark.parametrize(("file", "old", "new", "caught"), MUTATIONS)
def test_mutations_are_caught(file: str, old: str, new: str, caught: str):
    library = emulated.extension(emulated.mutated(file, old, new))
    with pytest.raises((Fault, AssertionError), match=caught):
        CHECKS.get(file, small_patches)(library)


def test_a_mutation_of_text_that_is_gone_is_an_error():
    with pytest.raises(AssertionError, match=r"csrc/mma\.cuh has 0 places with 'no such text', not one"):
        emulated.mutated("mma.cuh", "no such text", "")
