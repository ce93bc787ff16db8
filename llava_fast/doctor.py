"""`llava-fast doctor`: reports versions, devices, the backend of every operation and its reason, and problems."""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

import llava_fast


def diagnose() -> dict[str, Any]:
    """Collect the report as plain values, ready for JSON.

    Returns:
        llava_fast, python, platform: versions.
        packages: by name, the installed version (None: not installed), the required one, and the extra that needs it.
        devices: the CPU and each GPU.
        extension, backend: the CUDA extension; per operation its implementation and the reason, and those of attention
            for plain ranges on a GPU.
        caches: directories for compiled kernels and temporary files.
        problems: one line per problem.
    """
    problems: list[str] = []
    for name in llava_fast.__all__:
        try:
            getattr(llava_fast, name)
        except Exception as error:  # a broken installation may raise anything; report it
            problems.append(f"llava_fast.{name} cannot be imported: {type(error).__name__}: {error}")
    return {
        "llava_fast": llava_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(problems),
        "devices": _devices(problems),
        **_backends(problems),
        "caches": _caches(problems),
        "problems": problems,
    }


def _packages(problems: list[str]) -> dict[str, dict[str, Any]]:
    """Installed and required version of every dependency; a missing optional one is not a problem."""
    try:
        requirements = [Requirement(line) for line in metadata.requires("llava-fast") or ()]
    except metadata.PackageNotFoundError:
        problems.append("llava-fast is not installed (pip install -e .), so its requirements are unknown")
        return {}
    report: dict[str, dict[str, Any]] = {}
    for requirement in requirements:
        extra = _extra_of(requirement)
        if requirement.name == "llava-fast" or (
            requirement.marker and not requirement.marker.evaluate({"extra": extra or ""})
        ):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        wanted = str(requirement.specifier)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is installed, but llava-fast needs {wanted}")
        elif version is None and extra is None:
            problems.append(f"{requirement.name} is not installed, but llava-fast needs it ({wanted})")
        report.setdefault(requirement.name, {"version": version, "wanted": wanted, "extra": extra})
    return report


def _extra_of(requirement: Requirement) -> str | None:
    """The extra of llava-fast that needs this requirement; None for a required dependency."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return None
    extras = metadata.metadata("llava-fast").get_all("Provides-Extra") or ()
    return next((extra for extra in extras if requirement.marker.evaluate({"extra": extra})), None)


def _devices(problems: list[str]) -> list[dict[str, Any]]:
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(f"PyTorch cannot be imported: {error}")
        return []
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
        except RuntimeError as error:
            problems.append(f"cuda:{index} does not answer: {error}")
            continue
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_mib": properties.total_memory // 2**20,
            }
        )
    return devices


def _backends(problems: list[str]) -> dict[str, dict[str, Any]]:
    from llava_fast import backend

    try:
        ops = importlib.import_module("llava_fast.ops")
        for module in pkgutil.walk_packages(ops.__path__, "llava_fast.ops."):
            importlib.import_module(module.name)
    except ImportError as error:
        problems.append(f"the operations cannot be imported: {error}")
    try:
        asked, operations = backend.requested(), backend.status()
    except ValueError as error:
        problems.append(str(error))
        asked, operations = os.environ[backend.ENVIRONMENT_VARIABLE], {}
    problems.extend(entry["reason"] for entry in operations.values() if entry["backend"] is None)
    extension = backend.extension_status()
    if extension["built"] and "reason" in extension:
        problems.append(extension["reason"])
    names = [name for name in backend.BACKENDS if name != "auto"]
    plain = importlib.import_module("llava_fast.ops.attention.plain").explained() if operations else {}
    available = {name: backend.unavailable(name) or "available" for name in names}
    return {
        "extension": extension,
        "backend": {"requested": asked, "available": available, "operations": operations, "plain": plain},
    }


def _caches(problems: list[str]) -> dict[str, str]:
    """The directories that compiled kernels and temporary files go to; each must be writable."""
    caches = {
        "triton": Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"),
        "temporary": Path(tempfile.gettempdir()),
    }
    for name, directory in caches.items():
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            problems.append(f"the {name} directory {directory} cannot be written to")
    return {name: str(directory) for name, directory in caches.items()}


def show(report: dict[str, Any]) -> None:
    """Print what `diagnose` returned."""
    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    def table(title: str, *columns: str) -> Table:
        return Table(*columns, title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)

    say(f"llava-fast {report['llava_fast']} · Python {report['python']} · {report['platform']}")
    packages = table("\npackages", "package", "installed", "wanted", "for")
    for name, entry in report["packages"].items():
        packages.add_row(name, entry["version"] or "–", entry["wanted"] or "any", entry["extra"] or "everything")
    console.print(packages)

    console.print("\n[bold]devices[/bold]")
    for device in report["devices"]:
        details = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        say(f"{device['device']}: {device['name']} ({details})")

    extension = report["extension"]
    console.print("\n[bold]backends[/bold]")
    say(f"requested: {report['backend']['requested']}")
    for name, state in report["backend"]["available"].items():
        say(f"{name}: {state}")
    if extension["loaded"]:
        console.print(f"extension: built for sm_{', sm_'.join(map(str, extension['architectures']))}", markup=False)

    operations = table("\noperations", "operation", "runs on", "why")
    for name, entry in report["backend"]["operations"].items():
        operations.add_row(name, entry["backend"] or "nothing", entry["reason"])
    for ranges, (name, reason) in report["backend"]["plain"].items():
        operations.add_row(f"attention, {ranges}", name, reason)
    console.print(operations)
    peers = table("\npeers, where asked for by name", "operation", "backend", "state")
    for name, entry in report["backend"]["operations"].items():
        for peer, state in entry["peers"].items():
            peers.add_row(name, peer, state)
    console.print(peers)

    console.print("\n[bold]directories[/bold]")
    for name, directory in report["caches"].items():
        say(f"{name}: {directory}")
    if report["problems"]:
        console.print("\n[bold]problems[/bold]")
        for problem in report["problems"]:
            say(f"- {problem}")
    else:
        console.print("\nall is well")
