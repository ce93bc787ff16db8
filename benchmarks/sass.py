"""What bounds the main loop of a compiled kernel: a prediction from its SASS, not a measurement.

The main loop is the innermost loop with the most tensor-core products; of equal ones, the shortest. Every warp runs
each of its instructions once per iteration, and each instruction takes its pipe for some cycles of a multiprocessor:

- mma: tensor cores; m · n · k products at the architecture's rate.
- shared: shared memory, 128 bytes per cycle. Operands of products (LDSM), other loads and stores, tiles copied in
  (LDGSTS), and shuffles, which take the same path. HGMMA reads its operands in shared memory by itself.
- exp: special functions such as the exponential, 16 lanes per cycle.
- issue: four instructions of any kind per cycle.

If warps overlap perfectly, an iteration takes as long as its busiest pipe, which is the bound. `mma_share` is the
share of the tensor cores' peak that this leaves. Not modelled: latency, which few warps per multiprocessor do not hide;
barriers; bank conflicts; device memory; what is outside of the loop. Products that several warps repeat, in a tile of
fewer than 16 rows a warp, count as if they were of use. So it is an upper limit.
"""

from __future__ import annotations

import re
from typing import Any

# Products of 16-bit factors per cycle and multiprocessor (312 TFLOP/s of an A100, 989 of an H100 SXM).
PRODUCTS = {"sm_80": 1024, "sm_90": 2048}
# HMMA is the instruction of earlier architectures; on Hopper it reaches about 0.63 of the peak (Luo et al. 2024).
HMMA_RATE = {"sm_80": 1.0, "sm_90": 0.63}
SHARED_BYTES, EXP_LANES, ISSUED = 128, 16, 4  # per cycle and multiprocessor

Instruction = tuple[int, str]  # address; text with predicate and operands


def instructions(sass: str) -> list[Instruction]:
    """The instructions of one kernel."""
    return [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Each backward branch, with all instructions from its target to it. A branch to itself, the padding after EXIT,
    is no loop."""
    found = []
    for address, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) < address:
            found.append([x for x in code if int(target.group(1), 16) <= x[0] <= address])
    return found


def opcode(text: str) -> str:
    """The name of an instruction with its suffixes, without predicate and operands: "HMMA.16816.F32.BF16"."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def main_loop(sass: str) -> list[str] | None:
    """The instructions of the main loop, or None if no loop multiplies on tensor cores."""

    def products(loop: list[Instruction]) -> float:
        return sum(cost(text, "sm_80").get("mma", 0) for _, text in loop)

    multiplying = [loop for loop in loops(instructions(sass)) if products(loop)]
    inner = [
        loop
        for loop in multiplying
        if not any(other is not loop and loop[0] <= other[0] and other[-1] <= loop[-1] for other in multiplying)
    ]
    return [text for _, text in max(inner, key=lambda loop: (products(loop), -len(loop)))] if inner else None


def cost(text: str, architecture: str) -> dict[str, float]:
    """Cycles for which one warp's instruction takes each pipe of a multiprocessor."""
    name, *suffixes = opcode(text).split(".")
    cycles = {"issue": 1 / ISSUED}
    if name == "HMMA":
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}[suffixes[0]]
        wide = 2 if "TF32" in suffixes else 1  # 32-bit factors take twice as long
        cycles["mma"] = m * n * k * wide / (PRODUCTS[architecture] * HMMA_RATE[architecture])
    elif name == "HGMMA":  # of four warps together; a descriptor stands for both factors, or for B after A's register
        m, n, k = map(int, suffixes[0].split("x"))
        cycles["mma"] = m * n * k / 4 * (2 if "TF32" in suffixes else 1) / PRODUCTS[architecture]
        rows = n if re.search(r"R\d+, R\d+, gdesc", text) else m + n  # of 32 bytes, in shared memory
        cycles["shared"] = rows * 32 / 4 / SHARED_BYTES
    elif name in ("LDSM", "STSM"):
        matrices = int(suffixes[-1]) if suffixes[-1].isdigit() else 1  # 8 × 8 of 16 bits
        cycles["shared"] = matrices * 128 / SHARED_BYTES
    elif name in ("LDS", "STS", "LDGSTS"):
        bits = next((int(s) for s in suffixes if s in ("64", "128")), 32)  # of each of 32 lanes
        cycles["shared"] = bits * 4 / SHARED_BYTES
    elif name == "SHFL":
        cycles["shared"] = 1.0
    elif name == "MUFU":
        cycles["exp"] = 32 / EXP_LANES
    return cycles


def prediction(sass: str, architecture: str, num_warps: int) -> dict[str, Any] | None:
    """What one iteration of the main loop takes; None if no loop multiplies on tensor cores.

    `cycles` of each pipe, for all `num_warps` warps of a block; `bound`, the busiest pipe; `mma_share`, see above;
    `ldsm_per_mma`, loads of operands per product instruction; and the numbers of `barriers`, `copies` (asynchronous,
    from device to shared memory) and `loads` (from device memory into registers, which an iteration may wait for).
    """
    loop = main_loop(sass)
    if loop is None:
        return None
    cycles = dict.fromkeys(("mma", "shared", "exp", "issue"), 0.0)
    for text in loop:
        for pipe, taken in cost(text, architecture).items():
            cycles[pipe] += taken * num_warps
    names = [opcode(text).split(".")[0] for text in loop]
    bound = max(cycles, key=cycles.get)
    return {
        "cycles": cycles,
        "bound": bound,
        "mma_share": cycles["mma"] / cycles[bound],
        "ldsm_per_mma": names.count("LDSM") / (names.count("HMMA") + names.count("HGMMA")),
        "barriers": names.count("BAR"),
        "copies": names.count("LDGSTS"),
        "loads": names.count("LDG"),
    }
