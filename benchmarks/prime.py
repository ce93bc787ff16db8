"""Compiles what the benchmarks launch on a GPU: in parallel, without a GPU, and so that it can be carried to one.

    python -m benchmarks.prime --out build/gpu-cache --triton 3.6.0     # here: a folder of binaries to take along
    python -m benchmarks.prime --carried build/gpu-cache                # there: into Triton's own cache (`make gpu`)

Every GPU case of the benchmarks is run dry on the CPU, at full size: PyTorch's operators return memory that is never
touched, kernels are recorded. Triton then compiles each recorded launch as its `JITFunction.run` would on the card,
with the types and constants that it derives from the arguments (a pointer that is a multiple of 16 bytes, an integer
that is 1 or a multiple of 16). So the entry has the key under which the card will look for it.

A carried binary is used if the kernel's source, its types and constants and Triton's version are the same. Triton's own
key also covers the build of Triton and the path of the cache, which differ from machine to machine; so it is computed
where the binary is used. What was not carried, or differs, is compiled there, one process per core.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from contextlib import closing, contextmanager
from ctypes.util import find_library
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.records import ROOT, sources, write_json
from llava_fast.ops._launch import ARCHITECTURES, Launch, recorded

Kernel = dict[str, Any]  # as JSON: what a process needs to compile a launch


# ---- which kernels the benchmarks launch


class NoMemory(TorchDispatchMode):
    """Operators on floating tensors compute nothing: their results have the right shapes and untouched memory.

    Integers and booleans are computed, since shapes and ranges depend on them.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        from torch._library.custom_ops import OPDEFS

        kwargs = kwargs or {}
        name, returns = function._schema.name, function._schema.returns
        if name in OPDEFS:  # ours: it launches kernels
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        floating = not tensors or any(x.is_floating_point() for x in tensors)
        aliases = [r.alias_info for r in returns if r.alias_info is not None]
        if not floating or any(not alias.is_write for alias in aliases):  # a view
            return function(*args, **kwargs)
        if aliases:  # in place
            return kwargs.get("out", args[0])
        try:
            out = function(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        except (RuntimeError, NotImplementedError):  # the shape depends on values
            return function(*args, **kwargs)
        if any(isinstance(x, torch.Tensor) and not x.is_floating_point() for x in tree_leaves(out)):
            return function(*args, **kwargs)
        return tree_map(_untouched, out)


def _to_meta(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("meta")
    return x.to("meta") if isinstance(x, torch.Tensor) else x


def _untouched(x: Any) -> Any:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype) if isinstance(x, torch.Tensor) else x


def _gpu_is_there() -> Any:
    """An H100, as far as PyTorch is asked before tensors are on it."""
    return mock.patch.multiple(torch.cuda, is_available=lambda: True, get_device_capability=lambda *_: (9, 0))


@contextmanager
def as_on_a_gpu(architecture: str) -> Iterator[list[Launch]]:
    """Record launches as on a GPU of this architecture, with tensors on the CPU."""
    from llava_fast.backend import use_backend
    from llava_fast.ops import _triton

    with (
        _gpu_is_there(),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(_triton, "interpreting", lambda: True),  # kernels take tensors of a CPU
        NoMemory(),
        use_backend("triton"),
        recorded(dry=True, architecture=architecture) as launches,
    ):
        yield launches


def launched(architecture: str, subject: str | None = None) -> Iterator[tuple[str, list[Kernel] | Exception]]:
    """For each GPU case with kernels of ours: its name, and its launches or the error."""
    from benchmarks.harness import draw_cotangents, step
    from benchmarks.measure import gpu_cases, subjects

    for name in [subject] if subject else subjects():
        try:
            gpu_cases(name)  # the first import is without the patch
            with _gpu_is_there():
                cases = gpu_cases(name)
        except Exception as error:
            yield name, error
            continue
        for case in cases:
            for provider, make in case.providers.items():
                if not provider.startswith(("triton", "reference")):
                    continue
                try:
                    with as_on_a_gpu(architecture) as launches:
                        inputs = case.inputs()
                        # The reference gives the shapes; it launches none of our kernels.
                        cotangents = draw_cotangents(case, inputs) if case.backward else []
                        step(case, make, inputs, cotangents)()
                    yield f"{case} {provider}", [described(launch) for launch in launches]
                except Exception as error:
                    yield f"{case} {provider}", error


def described(launch: Launch) -> Kernel:
    """A launch without its tensors: types, alignment, and one value for all integers that compile to the same code."""
    return {
        "module": launch.kernel.fn.__module__,
        "name": launch.name,
        "args": [_argument(value) for value in launch.args],
        "constexprs": launch.constexprs,
        "options": {"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    }


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}
    if isinstance(value, float):
        return 0.5
    if value is None or isinstance(value, bool) or value == 1:
        return value
    large = 0 if -(2**31) <= value < 2**31 else 2**40
    return large + (16 if value % 16 == 0 else 17)


def distinct(kernels: Iterable[Kernel]) -> list[Kernel]:
    return list({json.dumps(kernel, sort_keys=True): kernel for kernel in kernels}.values())


# ---- compiling


class Card:
    """What Triton asks its driver before it compiles, answered for a GPU that need not be there."""

    def __init__(self, architecture: str):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compiled(kernel: Kernel, architecture: str, carried: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """Triton's compiled kernel, from its cache if it is there; and the entry for `kernels.json`.

    `carried`: an entry of `kernels.json`, its "folder" complete; its binary is put into the cache first if it fits.
    """
    import triton
    from triton.compiler import compile as compile_source
    from triton.runtime.driver import driver

    driver.set_active(Card(architecture))
    function = getattr(importlib.import_module(kernel["module"]), kernel["name"])
    entry: dict[str, Any] = {**kernel, "triton": triton.__version__, "architecture": architecture, "used": False}

    def compile_or_carry(src: Any, **options: Any) -> Any:
        entry["source"] = src.hash()
        if carried is not None and all(carried[k] == entry[k] for k in ("source", "triton", "architecture")):
            entry["used"] = True
            _put(src, Path(carried["folder"]), **options)
        return compile_source(src, **options)

    caches = function.device_caches[0]  # sets `compile`, so before it is replaced
    caches[0].clear()
    function.compile = compile_or_carry
    start = time.perf_counter()
    result = function.run(
        *map(_stand_in, kernel["args"]), grid=(1,), warmup=True, **kernel["constexprs"], **kernel["options"]
    )
    entry["seconds"] = round(time.perf_counter() - start, 3)
    return result, entry


def _stand_in(argument: Any) -> Any:
    if not isinstance(argument, dict):
        return argument
    tensor = torch.empty(32, dtype=getattr(torch, argument["dtype"]))
    return tensor if argument["aligned"] else tensor[1:]


def _put(src: Any, folder: Path, target: Any, options: dict[str, Any], **_: Any) -> None:
    """Put the binary of a folder into Triton's cache, under the key that Triton computes here."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key, get_cache_manager

    backend = make_backend(target)
    key = get_cache_key(src, backend, backend.parse_options(dict(options)), get_cache_invalidating_env_vars())
    manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    group = f"{src.name[:150]}.json"
    if manager.get_group(group) is None:
        manager.put_group(
            group, {file.name: manager.put(file.read_bytes(), file.name) for file in sorted(folder.iterdir())}
        )


def _work(kernel: Kernel, architecture: str, carried: dict[str, Any] | None, out: Path | None) -> dict[str, Any]:
    """In a worker: compile, or take what was carried; copy the binary to `out`; build Triton's launcher."""
    result, entry = compiled(kernel, architecture, carried)
    if out is not None:
        entry["folder"] = hashlib.sha256((entry["source"] + str(entry["options"])).encode()).hexdigest()[:16]
        (out / entry["folder"]).mkdir(parents=True, exist_ok=True)
        for name, path in result.metadata_group.items():
            if name.endswith((".cubin", ".json")):
                (out / entry["folder"] / name).write_bytes(Path(path).read_bytes())
    from triton.backends.nvidia import driver

    # Up to 3.6 a C file per signature, which needs the driver's library, though no GPU.
    if hasattr(driver, "make_launcher") and find_library("cuda"):
        driver.CudaLauncher(result.src, result.metadata)
    return entry


class Workers:
    """Processes that compile; `close` ends them at once, whatever they do, and so does the death of this process."""

    def __init__(self, workers: int | None = None):
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers or os.cpu_count(), context, _die_with_parent, (os.getpid(),))
        self.submit = self.pool.submit

    def close(self) -> None:
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before
        os._exit(1)


def in_parallel(work: Any, tasks: Sequence[tuple], seconds: float) -> Iterator[Any]:
    """Yields results, or exceptions, of `work(*task)` as processes finish them; stops after so many seconds."""
    with closing(Workers()) as pool:
        futures = [pool.submit(work, *task) for task in tasks]
        try:
            for future in as_completed(futures, seconds):
                yield future.exception() or future.result()
        except OutOfTime:
            return


def carried_kernels(folder: Path | None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What `kernels.json` of a folder says, and its entries by kernel; empty where there is none."""
    if folder is None or not (folder / "kernels.json").exists():
        return {}, {}
    index = json.loads((folder / "kernels.json").read_text())
    entries = {}
    for entry in index["kernels"]:
        kernel = {name: entry[name] for name in ("module", "name", "args", "constexprs", "options")}
        entries[json.dumps(kernel, sort_keys=True)] = {**entry, "folder": str(folder / entry["folder"])}
    return index, entries


def prime(
    architecture: str, carried: Path | None, out: Path | None, seconds: float, subject: str | None
) -> Iterator[str]:
    """Compile everything into Triton's cache; yields lines of text."""
    end = time.monotonic() + seconds
    index, entries = carried_kernels(carried)
    failed = []
    if index.get("code") == sources() and not subject:
        kernels = [json.loads(key) for key in entries]
    else:
        kernels = []
        for name, found in launched(architecture, subject):
            if isinstance(found, Exception):
                failed.append(f"{name}: {type(found).__name__}: {found}")
            else:
                kernels += found
        kernels = distinct(kernels)
    yield f"{len(kernels)} kernels for {architecture}"
    yield from failed
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    tasks = [(kernel, architecture, entries.get(json.dumps(kernel, sort_keys=True)), out) for kernel in kernels]
    done = []
    start = time.monotonic()
    for result in in_parallel(_work, tasks, max(1.0, end - time.monotonic())):
        if isinstance(result, Exception):
            yield f"{type(result).__name__}: {result}"
        else:
            done.append(result)
    used = sum(entry.pop("used") for entry in done)
    wall, spent = time.monotonic() - start, sum(entry["seconds"] for entry in done)
    yield f"{len(done)} ready, {used} of them carried: {spent:.1f} s of compiling in {wall:.1f} s"
    if out is not None:
        write_json(out / "kernels.json", {"code": sources(), "kernels": done})
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        yield f"{out}: {size / 2**20:.1f} MiB"


def with_triton(version: str, arguments: list[str]) -> int:
    """Run this module with another version of Triton, installed below build/."""
    folder = ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"triton=={version}"]
        subprocess.run(pip, check=True)
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run([sys.executable, "-m", "benchmarks.prime", *arguments], env=env, check=False).returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prime", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the binaries into this folder, to carry it to a GPU machine")
    parser.add_argument("--carried", type=Path, help="use the binaries of this folder")
    parser.add_argument("--triton", metavar="VERSION", help="compile with this version; pip installs it below build/")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sm_90")
    parser.add_argument("--subject", help="only the kernels of this benchmark")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so long")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 turns the compiler off; unset it")
    if arguments.triton:
        given = sys.argv[1:] if argv is None else argv
        at = next(i for i, text in enumerate(given) if text.startswith("--triton"))
        return with_triton(arguments.triton, given[:at] + given[at + (1 if "=" in given[at] else 2) :])
    for line in prime(arguments.architecture, arguments.carried, arguments.out, arguments.seconds, arguments.subject):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
