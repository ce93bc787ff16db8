"""Compiles every kernel with every shipped tile for A100 and H100, without a GPU, and reports registers and spills.

    python -m benchmarks.compile_report [--op norm] [--out build/compile-report.json]

Each operation has `examples(device, dtype)`: calls that together launch its kernels in all variants. They are run dry
on the device "meta", so the recorded launches have the exact signatures and constexprs of a GPU, at full size, without
memory. Triton's own toolchain compiles them. The binary's resource report gives registers and spills (STACK: LOCAL is
always 0); the SASS is searched for local loads and stores (spills, and whether any are inside a loop) and tensor-core
instructions. For a loop on tensor cores `loop` holds what `sass.prediction` says of an iteration; the table shows its
busiest pipe with the share of the tensor cores' peak that this leaves, operand loads per product, and barriers +
loads that an iteration waits for. With nvcc, the CUDA C++ kernels of `csrc/` are also read (`--op csrc`); their shared
memory is only the static size in the binary.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.sass import instructions, loops, prediction
from llava_fast import ops
from llava_fast.ops._launch import ARCHITECTURES, Example, Launch, recorded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CUDA_TYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32"}  # prefixes of mangled template arguments
CSRC = Path(__file__).resolve().parents[1] / "csrc"
TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}
# Per multiprocessor (CUDA C++ Programming Guide, compute capabilities 8.0 and 9.0).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}
REGISTERS_PER_SM, WARPS_PER_SM, BLOCKS_PER_SM = 65536, 64, 32


def operation_modules() -> list[str]:
    """Names of the operations: all modules and packages of `ops` without a leading underscore."""
    return [module.name for module in pkgutil.iter_modules(ops.__path__) if not module.name.startswith("_")]


def examples_of(op: str, device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """The operation's examples; empty for an operation without kernels."""
    module = importlib.import_module(f"llava_fast.ops.{op}")
    return module.examples(device, dtype) if hasattr(module, "examples") else iter(())


def launches(op: str, architecture: str, dtype: str) -> Iterator[Launch]:
    """One launch for each distinct kernel variant of an operation."""
    seen = set()
    for example in examples_of(op, torch.device("meta"), DTYPES[dtype]):
        with recorded(dry=True, architecture=architecture) as record:
            example.call()
        for launch in record:
            identity = repr(signature(launch)) + repr((launch.name, launch.num_warps, launch.num_stages))
            if identity not in seen:
                seen.add(identity)
                yield launch


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list]]:
    """Triton's specialisation key: argument types, constants, and which arguments are multiples of 16."""
    types, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.args, strict=False)):
        if isinstance(value, torch.Tensor):
            types[name] = "*" + TYPE_NAMES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    for name, value in launch.constexprs.items():
        types[name], constants[name] = "constexpr", value
    return types, constants, attributes


def compile_launch(launch: Launch, architecture: str) -> dict[str, Any]:
    """Compile one launch for `architecture` and report registers, spills, shared memory, instructions, occupancy.

    Compilations are cached by Triton (TRITON_CACHE_DIR).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = signature(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, types, constants, attributes),
        target=GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    usage, sass = disassemble(compiled.asm["cubin"])
    resources, shared = read_resources(usage, sass), compiled.metadata.shared
    return {
        **resources,
        "shared_bytes": shared,
        "warps_per_sm": occupancy(resources["registers"], shared, launch.num_warps, architecture),
        "loop": prediction(sass, architecture, launch.num_warps),
    }


def read_resources(usage: str, sass: str) -> dict[str, Any]:
    """Registers, spills and instructions from the resource report and the SASS of one kernel."""
    registers, stack, shared = (
        int(re.search(rf"{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK", "SHARED")
    )
    return {
        "registers": registers,
        "spill_bytes": stack,
        "spills_in_loop": spills_in_loop(sass),
        "spill_instructions": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared_bytes": shared,
        "mma": next((name for name in ("HGMMA", "HMMA") if re.search(rf"\b{name}\b", sass)), None),
    }


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The resource report and the SASS of a binary, cached beside Triton's own compilations."""
    from triton import knobs

    folder = Path(knobs.cache.dir) / "llava_fast_sass"
    entry = folder / (hashlib.sha256(cubin).hexdigest() + ".json")
    if entry.exists():
        return tuple(json.loads(entry.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    tool = Path(sys.modules["triton"].__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        ]
    temporary = entry.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(texts))
    temporary.replace(entry)
    return tuple(texts)


def spills_in_loop(sass: str) -> int:
    """Number of local loads and stores between the target of a backward branch and the branch."""
    looped = {instruction for loop in loops(instructions(sass)) for instruction in loop}
    return sum(bool(re.search(r"\b(?:LDL|STL)\b", text)) for _, text in looped)


def occupancy(registers: int, shared: int, num_warps: int, architecture: str) -> int:
    """Warps resident on a multiprocessor: the minimum of the limits by registers, shared memory and block slots.

    Registers are given to a warp in units of 256; each block also takes 1 KiB of shared memory.
    """
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        REGISTERS_PER_SM // (per_warp * num_warps),
        SHARED_PER_SM[architecture] // (shared + 1024),
        WARPS_PER_SM // num_warps,
        BLOCKS_PER_SM,
    )
    return blocks * num_warps


def report(names: list[str]) -> list[dict[str, Any]]:
    """One record per kernel × tile × architecture × dtype; one process per core compiles."""
    tasks = [
        (architecture, op, part)
        for architecture in ARCHITECTURES
        for op in names
        for part in (sorted(CSRC.glob("*.cu")) if op == "csrc" else DTYPES)
    ]
    # "fork", so that worker processes inherit a tile forced by the caller.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        return [record for records in pool.map(_records, *zip(*tasks)) for record in records]


def _records(architecture: str, op: str, part: Any) -> list[dict[str, Any]]:
    return cuda_records(architecture, part) if op == "csrc" else _triton_records(architecture, op, part)


def cuda_records(architecture: str, source: Path) -> list[dict[str, Any]]:
    """One record per kernel of a CUDA C++ file; `flags` are its template arguments besides the type."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ("nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-o", cubin, source)
        subprocess.run(command, capture_output=True, text=True, check=True)
        usage, sass = disassemble(cubin.read_bytes())
    codes = {part.split()[0]: part for part in sass.split("Function : ")[1:]}
    records = []
    for name, numbers in re.findall(r"Function (\S+):\s+(REG.*)", usage):
        kernel, _, arguments = re.search(r"\d([a-z_]+_kernel)(I(\S*?E)Ev)?", name).groups()
        dtype = next((short for mark, short in CUDA_TYPES.items() if (arguments or "").startswith(mark)), "u8")
        records.append(
            {
                **{"op": "csrc", "kernel": kernel, "arch": architecture, "dtype": dtype, "tile": {}},
                "flags": dict(enumerate(int(value) for value in re.findall(r"L[ib](\d+)E", arguments or ""))),
                **read_resources(numbers, codes[name]),
                **{"warps_per_sm": None, "loop": None},
            }
        )
    return records


def _triton_records(architecture: str, op: str, dtype: str) -> list[dict[str, Any]]:
    records = []
    for launch in launches(op, architecture, dtype):
        flags = {k: v for k, v in launch.constexprs.items() if not k.startswith("BLOCK")}
        blocks = {k: v for k, v in launch.constexprs.items() if k.startswith("BLOCK")}
        records.append(
            {
                "op": op,
                "kernel": launch.name.strip("_"),
                "arch": architecture,
                "dtype": dtype,
                "tile": {**blocks, "num_warps": launch.num_warps, "num_stages": launch.num_stages},
                "flags": flags,
                **compile_launch(launch, architecture),
            }
        )
    return records


def problems(records: list[dict[str, Any]]) -> list[str]:
    """One line per kernel that spills, in a loop or elsewhere, or needs more shared memory than the GPU has."""
    lines = []
    for r in records:
        name = f"{r['kernel']} {r['arch']} {r['dtype']} {r['tile']} {r['flags']}"
        if r["spill_bytes"] or r["spill_instructions"]:
            lines.append(f"{name}: spills {r['spill_bytes']} bytes ({r['spills_in_loop']} accesses in a loop)")
        if r["shared_bytes"] > SHARED_LIMIT[r["arch"]]:
            lines.append(f"{name}: {r['shared_bytes']} bytes of shared memory, over {SHARED_LIMIT[r['arch']]}")
    return lines


def table(records: list[dict[str, Any]]) -> str:
    """The records as text."""
    header = (
        *("kernel", "arch", "dtype", "tile", "flags", "registers", "spill", "shared", "mma", "warps/SM"),
        *("bound", "LDSM/MMA", "waits"),
    )
    rows = [header]
    for r in records:
        tile = " ".join(f"{k.removeprefix('BLOCK_')}={v}" for k, v in r["tile"].items())
        flags = " ".join(k.lower() if v is True else str(v) for k, v in r["flags"].items() if v is not False) or "-"
        numbers = (r["registers"], r["spill_bytes"], r["shared_bytes"], r["mma"] or "-", r["warps_per_sm"] or "-")
        rows.append((r["kernel"], r["arch"], r["dtype"], tile, flags, *map(str, numbers), *_loop_cells(r["loop"])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _loop_cells(loop: dict[str, Any] | None) -> tuple[str, str, str]:
    if loop is None:
        return "-", "-", "-"
    bound = f"{loop['bound']} {loop['mma_share']:.2f}"
    return bound, f"{loop['ldsm_per_mma']:.2f}", f"{loop['barriers']}+{loop['loads']}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=(*operation_modules(), "csrc"), help="only this one")
    parser.add_argument("--out", type=Path, default=Path("build/compile-report.json"))
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 turns the compiler off; unset it")
    names = arguments.op or [*operation_modules(), *(["csrc"] if CSRC.is_dir() and shutil.which("nvcc") else [])]
    records = report(names)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(records, indent=1) + "\n")
    found = problems(records)
    print(table(records))
    print(f"\n{len(records)} kernels compiled, {len(found)} problems; written to {arguments.out}")
    for line in found:
        print(f"problem: {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
