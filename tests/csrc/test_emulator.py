"""The emulated GPU reports each kind of fault where it is, and nothing else: planted faults, see faults.cu."""

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.csrc import emulated
from tests.csrc.child import allocate, bank_conflicts

FAULTS = Path(__file__).with_name("faults.cu")

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, to compile the emulator"),
    pytest.mark.slow,  # the emulator is compiled first, unless an earlier run has left it
]


@pytest.fixture(scope="module")
def library() -> Path:
    headers = {name: text for name, text in emulated.sources().items() if name.endswith(".cuh")}
    return emulated.linked(*emulated.objects_of({**headers, FAULTS.name: FAULTS.read_text()}))


NUMBERS = torch.arange(64.0)


def plant(
    library: Path, name: str, *, seed: int = 0, inputs: torch.Tensor = NUMBERS, outputs: int = 64
) -> tuple[str, torch.Tensor]:
    """Launch a kernel of faults.cu: what the emulator says, followed by the comment of the line, and the output."""
    faults = ctypes.CDLL(str(library))
    faults.plant.restype = ctypes.c_char_p
    output = torch.full((outputs,), float("nan"))
    faults.emulator_forget()
    faults.emulator_seed(seed)
    allocate(faults, "out", output.data_ptr(), output.nbytes, writable=True, is_written=False)
    allocate(faults, "in", inputs.data_ptr(), inputs.nbytes, writable=False, is_written=True)
    pointers = ctypes.c_void_p(output.data_ptr()), ctypes.c_void_p(inputs.data_ptr())
    message = emulated.located(library, faults.plant(name.encode(), *pointers).decode())
    if lines := re.findall(r"faults.cu:(\d+)", message):
        message += " //" + FAULTS.read_text().split("\n")[int(lines[0]) - 1].partition("//")[2]
    return message, output


@pytest.mark.parametrize("seed", range(3))
def test_correct_kernels_are_correct(library: Path, seed: int):
    for name in ("correct", "correct_copy"):
        message, output = plant(library, name, seed=seed)
        assert message == ""
        assert torch.equal(output, NUMBERS.flip(0))


RACE = "with no barrier between: a race"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "says", "place"),
    [
        ("read_too_early", RACE, "the race, "),
        ("race_of_blocks", RACE, "both blocks"),
        ("unwritten", "of the shared array of line [0-9]+, which nobody has written", "unwritten"),
        ("shared_out_of_bounds", "writes 4 bytes out of bounds, 4 bytes past the end of the shared array", "out of"),
        ("global_out_of_bounds", "reads 4 bytes out of bounds, 4 bytes past the end of in", "out of bounds"),
        ("before_the_beginning", "writes 4 bytes out of bounds, 4 bytes before out", "out of bounds"),
        ("writes_an_input", "writes 4 bytes at [0-9]+ of in, which is an input", "input"),
        ("misaligned", "reads 16 bytes at a misaligned address", "misaligned"),
        ("barrier_of_some", "a barrier that other threads of the block do not reach", "not reached by all"),
        ("different_barriers", "threads wait at different barriers, in lines [0-9]+ and [0-9]+", "another one"),
        ("shuffle_of_some", "an instruction of the warp that other lanes do not reach", "not reached by all"),
        ("different_shuffles", "the lanes of a warp are at different instructions", "another one"),
        ("lower_wait", "which cp.async has not been waited for to copy", "copied"),
        ("no_commit", "which cp.async has not been waited for to copy", "copied"),
        ("no_barrier", RACE, "copied"),
        ("copy_over_a_copy", "to which cp.async is copying", "while copying"),
        ("misaligned_copy", "cp.async of 16 bytes from a misaligned address", "misaligned"),
        ("unknown_ptx", "PTX that the emulator does not know: cp.async.wait_all", "unknown"),
        ("writes_an_operand_of_ptx_that_is_an_input", "shared.b16 writes an input, %0", "input"),
        ("copy_out_of_bounds", "reads 16 bytes out of bounds, [0-9]+ bytes past the end of in", "out of bounds"),
    ],
)
def test_faults_are_reported_in_their_place(library: Path, name: str, says: str, place: str, seed: int):
    message, _ = plant(library, name, seed=seed)
    assert re.search(says, message), message
    assert re.search(r"faults.cu:\d+.* // " + place, message), message


def test_a_launch_without_leave_for_so_much_shared_memory_is_refused(library: Path):
    assert plant(library, "too_much_shared")[0] == "invalid argument"


@pytest.mark.parametrize(("name", "ways"), [("conflicts", 32), ("no_conflicts", 1)])
def test_bank_conflicts_are_counted(library: Path, name: str, ways: int):
    assert plant(library, name)[0] == ""
    assert max(emulated.by_place(library, bank_conflicts(ctypes.CDLL(str(library)))).values()) == ways


def test_a_warp_s_product(library: Path):
    """Fragments as CUTLASS lays them out (MMA_Traits<SM80_16x8x16_F32F16F16F32_TN>): lane and register to m + 16 k."""
    a, b = torch.randn(16, 16).half(), torch.randn(16, 8).half()
    lanes, (last, middle, first) = torch.arange(32)[:, None], torch.cartesian_prod(*[torch.arange(2)] * 3).T
    of_a = lanes % 4 * 32 + lanes // 4 + first * 16 + middle * 8 + last * 128  # m + 16 k
    of_b = lanes % 4 * 16 + lanes // 4 + first[:4] * 8 + middle[:4] * 64  # n + 8 k
    of_c = lanes % 4 * 32 + lanes // 4 + first[:4] * 16 + middle[:4] * 8  # m + 16 n
    registers = torch.cat([a.T.flatten()[of_a], b.flatten()[of_b]], 1).view(torch.float32)
    message, output = plant(library, "product", inputs=registers.contiguous(), outputs=128)
    assert message == ""
    torch.testing.assert_close(output.view(32, 4), (a.float() @ b.float()).T.flatten()[of_c])


@pytest.mark.parametrize("name", ["loaded", "loaded_transposed"])
def test_fragments_of_ldmatrix(library: Path, name: str):
    """Lane l has elements 2 (l % 4) and the next of row l / 4 of each matrix, or of its column (PTX ISA, ldmatrix)."""
    matrices = torch.randn(4, 8, 8).half()
    message, output = plant(library, name, inputs=matrices, outputs=128)
    assert message == ""
    rows = matrices.mT if name == "loaded_transposed" else matrices
    assert torch.equal(output.view(torch.half).view(32, 4, 2), rows.reshape(4, 32, 2).transpose(0, 1))


def test_syntax_that_is_not_translated_is_refused():
    with pytest.raises(ValueError, match=r"csrc/x\.cu has asm in a form"):
        emulated.translated("x.cu", 'asm("exit;");')
    with pytest.raises(ValueError, match=r"csrc/x\.cu has __shared__ in a form"):
        emulated.translated("x.cu", "__shared__ int one;")


def test_translated_sources_keep_their_lines():
    for name, text in emulated.sources().items():
        body = emulated.translated(name, text).partition(f'#line 1 "csrc/{name}"\n')[2]
        assert body.count("\n") == text.count("\n")
