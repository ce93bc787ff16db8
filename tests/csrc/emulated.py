"""The CUDA C++ of csrc/, compiled by g++ and run by an emulated GPU: no GPU, no nvcc.

The sources are compiled as they are but for the syntax that is CUDA's own, which `translated` rewrites line by line:
launches, inline PTX, and shared memory. PTX is executed from its text (ptx.cpp). g++ calls the emulator before each
access to memory (memory.cpp), and threads are fibers (threads.cpp). The host code that checks arguments, plans and
launches is the real one, module.cpp included.

Objects are kept in build/emulator/, by the hash of what they are made of.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulator"

COMMON = ("-std=c++17", "-g1", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE")
# Before each access of the kernels g++ calls __tsan_…, which memory.cpp defines. Structs stay whole: wide loads.
KERNELS = ("-O1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-fno-tree-sra")
EMULATOR = ("-O2",)
MODULE = ("-O0", "-g0", "-fvisibility=hidden", "-DLLAVA_FAST_ARCHITECTURES=0")

Sources = dict[str, str]  # text by file name


class Fault(Exception):
    """What the emulator reports: one line with the thread, the access and the place in csrc/."""


def sources() -> Sources:
    return {path.name: path.read_text() for path in sorted((ROOT / "csrc").iterdir())}


def mutated(file: str, old: str, new: str) -> Sources:
    """The sources with `old`, which must be there exactly once, replaced by `new`."""
    texts = sources()
    assert texts[file].count(old) == 1, f"csrc/{file} has {texts[file].count(old)} places with {old!r}, not one"
    return texts | {file: texts[file].replace(old, new)}


# ---- CUDA C++ to C++


def translated(name: str, text: str) -> str:
    """C++ that calls the emulator, with the line numbers of the source."""
    instructions: list[str] = []
    named = re.sub(r"\W", "_", f"ptx_{name}_")

    def ptx(statement: re.Match[str]) -> str:
        sections = re.split(r':(?=(?:[^"]*"[^"]*")*[^"]*$)', statement[1])  # colons outside of strings
        instructions.append(sections[0].strip())
        operands = ", ".join(section.strip() for section in sections[1:3] if section.strip())
        kinds = {"=": "output", "+": "in_out", "": "input"}
        operands = re.sub(r'"([=+]?)(\w)"', lambda m: f"emulator::{kinds[m[1]]}<'{m[2]}'>", operands)
        lines = statement[0].count("\n") - operands.count("\n")
        return f"{named}{len(instructions) - 1}({operands});" + "\n" * lines

    text = re.sub(r"\basm volatile\((.*?)\);", ptx, text, flags=re.DOTALL)
    text = re.sub(r"([\w:]+(?:<[^<>;(){}]*>)?)<<<(.*?)>>>\(", r"emulator::configured(\2)(\1, ", text)
    text = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = static_cast<\1*>(emulator::dynamic_shared());", text
    )
    text = re.sub(
        r"__shared__ (\w+) (\w+)((?:\[[^]]*\])+);",
        r"auto& \2 = *static_cast<\1(*)\3>(emulator::static_shared(__LINE__, sizeof(\1\3)));",
        text,
    )
    for syntax in ("asm", "<<<", "__shared__"):
        if syntax in re.sub("//.*", "", text):
            raise ValueError(f"csrc/{name} has {syntax} in a form that tests/csrc/emulated.py does not translate")
    parsed = "".join(f"static const emulator::Instruction {named}{i}({ptx});\n" for i, ptx in enumerate(instructions))
    once = "#pragma once\n" if "#pragma once" in text else ""
    return f'{once}#include "emulator.h"\n{parsed}#line 1 "csrc/{name}"\n{text}'


# ---- building


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def g_plus_plus(*arguments: str | Path) -> None:
    done = subprocess.run(("g++", *map(str, arguments)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ refuses a source of the emulator:\n{done.stdout}")


def includes(text: str, texts: Sources) -> Sources:
    """The files that `text` includes, directly or not."""
    found: Sources = {}
    waiting = [text]
    while waiting:
        for name in re.findall(r'#include ["<]([\w.]+)[">]', waiting.pop()):
            if name in texts and name not in found:
                found[name] = texts[name]
                waiting.append(texts[name])
    return found


def compiled(name: str, texts: Sources, *flags: str) -> Path:
    """The object of source `name`, one of `texts`."""
    needed = {name: texts[name], **includes(texts[name], texts)}
    key = digest(name, *COMMON, *flags, *(part for item in sorted(needed.items()) for part in item))
    made = BUILD / f"{key}.o"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            for file, text in needed.items():
                (Path(folder) / file).write_text(text)
            g_plus_plus(*COMMON, *flags, f"-I{folder}", "-c", "-x", "c++", f"{folder}/{name}", "-o", f"{folder}/object")
            (Path(folder) / "object").replace(made)
    return made


def linked(*objects: Path) -> Path:
    library = BUILD / f"{digest(*(path.name for path in objects))}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            g_plus_plus("-shared", "-Wl,-Bsymbolic", *objects, "-o", f"{folder}/library")
            (Path(folder) / "library").replace(library)
    return library


def own_files() -> Sources:
    """The emulator, and its headers in place of CUDA's."""
    paths = [path for folder in (HERE, HERE / "cuda") for path in folder.iterdir() if path.suffix in (".h", ".cpp")]
    return {path.name: path.read_text() for path in sorted(paths)}


def objects_of(texts: Sources) -> list[Path]:
    """The emulator and the kernels, of the .cu files among `texts`."""
    BUILD.mkdir(parents=True, exist_ok=True)
    own = own_files()
    cuda = {name: translated(name, text) for name, text in texts.items() if name.endswith((".cu", ".cuh"))}
    return [
        *(compiled(name, own, *EMULATOR) for name in own if name.endswith(".cpp")),
        *(compiled(name, {**own, **texts, **cuda}, *KERNELS) for name in cuda if name.endswith(".cu")),
    ]


def extension(texts: Sources) -> Path:
    """llava_fast._cuda, emulated, of the sources of csrc/."""
    import pybind11

    python = (f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}")
    return linked(*objects_of(texts), compiled("module.cpp", {**own_files(), **texts}, *MODULE, *python))


# ---- running


@dataclass
class Memory:
    """A tensor in the emulated device's memory. Where it is no input, it is NaN until it is written."""

    tensor: torch.Tensor
    is_input: bool = True
    writable: bool = False
    offset: int = 0  # bytes that it begins after a multiple of 4096


@dataclass
class Results:
    """What the function returned; the tensors after the call; and for each place that accesses shared memory the most
    ways of a bank conflict, 1 where there is none."""

    value: Any
    tensors: dict[str, torch.Tensor]
    ways: dict[str, int]


def places(library: Path, addresses: list[int]) -> list[str]:
    """For each address in a library the lines it was made from: of the innermost function, then of those around it."""
    calls = [hex(address - 1) for address in addresses]  # what is given is where a call returns to
    if not calls:  # addr2line would read them from standard input
        return []
    command = ("addr2line", "-a", "-i", "-e", library, *calls)
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [re.findall(r"\w+\.cuh?:\d+", of_one) for of_one in re.split("^0x", answer, flags=re.MULTILINE)[1:]]
    return [" in ".join(dict.fromkeys(of_one)) or "an unknown place" for of_one in lines]


def located(library: Path, message: str) -> str:
    return re.sub(r"0x[0-9a-f]+$", lambda m: places(library, [int(m[0], 16)])[0], message)


def by_place(library: Path, conflicts: list[tuple[int, int]]) -> dict[str, int]:
    ways: dict[str, int] = {}
    for line, (_, most) in zip(places(library, [site for site, _ in conflicts]), conflicts):
        ways[line] = max(most, ways.get(line, 1))
    return ways


def call(library: Path, function: str, memory: Mapping[str, Memory], *, seed: int = 0, **arguments: Any) -> Results:
    """Call a function of the emulated extension, in a process of its own.

    Args:
        memory: for each argument that is a pointer, what it points to; the same object twice is the same memory.
        seed: of the order of threads, warps and blocks.
        arguments: the other arguments; dtype by its name.

    Raises:
        Fault: naming the place, if the emulator finds one.
    """
    objects = {id(of): of for of in memory.values()}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, (key, of) in enumerate(objects.items()):
            files[key] = file = Path(folder) / str(number)
            data = of.tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            file.write_bytes(bytes(of.offset) + (data if of.is_input else b"\xff" * len(data)) + b"\0")
        request = {
            "library": str(library),
            "function": function,
            "seed": seed,
            "arguments": arguments,
            "pointers": {name: str(files[id(of)]) for name, of in memory.items()},
            "allocations": [
                (
                    *(" and ".join(name for name, other in memory.items() if other is of), str(files[key]), of.offset),
                    *(of.tensor.nbytes, of.writable or not of.is_input, of.is_input),
                )
                for key, of in objects.items()
            ],
        }
        child = (sys.executable, "-S", str(HERE / "child.py"))
        done = subprocess.run(child, input=json.dumps(request), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the emulator ended with {done.returncode}: {done.stderr}")
        answer = json.loads(done.stdout)
        if "fault" in answer:
            raise Fault(located(library, answer["fault"]))
        tensors = {}
        for name, of in memory.items():
            data = bytearray(files[id(of)].read_bytes()[of.offset :][: of.tensor.nbytes])
            tensors[name] = torch.frombuffer(data, dtype=of.tensor.dtype).view(of.tensor.shape)
        return Results(answer["value"], tensors, by_place(library, answer["conflicts"]))
