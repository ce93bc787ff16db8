"""Stores a run's results: results/<device>/<date>-<commit>.json, one record per provider of a case."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Packages of other libraries' attention; their versions are recorded where they are installed.
PEERS = ("flash-attn", "tokenspeed-fa3", "xformers")

# Dense 16-bit tensor-core FLOP/s and bytes/s. A100: datasheet; the others measured (8192³ product, device copy).
CEILINGS = {"a100": (312e12, 2.04e12), "h100": (798e12, 3.0e12), "h200": (788e12, 4.3e12)}


def device_name() -> str:
    """The results folder of this machine: nvidia-h100, …, or cpu."""
    if DEVICE.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    known = next((gpu for gpu in CEILINGS if gpu in name), None)
    return f"nvidia-{known}" if known else re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def run_info() -> dict[str, Any]:
    """Device, versions, commit and date of the run."""
    gpu = dict.fromkeys(("gpu", "driver", "power_limit_w", "clocks"))
    if DEVICE.type == "cuda":
        fields = "driver_version,power.limit,clocks.sm,clocks.mem"
        answer = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0")
        driver, power, sm, memory = (answer.splitlines() or [",,,"])[0].split(",")
        gpu = {
            "gpu": torch.cuda.get_device_name(),
            "driver": driver.strip() or None,
            "power_limit_w": float(power) if re.fullmatch(r"\s*[\d.]+\s*", power) else None,
            "clocks": f"SM {sm.strip()} MHz, memory {memory.strip()} MHz" if sm.strip() else None,
        }
    return {
        "device": device_name(),
        **gpu,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "liger-kernel", *PEERS)},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The checked-out commit, with "-dirty" if files differ from it; without a repository the variable COMMIT."""
    known = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD").strip()
    if not known:
        return os.environ.get("COMMIT") or "unknown"
    return known + ("-dirty" if _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno").strip() else "")


def sources() -> str:
    """A hash of the code that is measured: the package with its tiles, csrc/ and the benchmarks."""
    digest = hashlib.sha256()
    for pattern in ("llava_fast/**/*.py", "llava_fast/ops/tuned/*.json", "csrc/*.c*", "benchmarks/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader, or a process that is killed meanwhile, never leaves half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def put_aside(path: Path) -> None:
    """Rename DIR/name.json to DIR/name.before.json; to name.before-2.json and so on where that is taken."""
    names = (f"{path.stem}.before{suffix}{path.suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    path.replace(next(free for name in names if not (free := path.with_name(name)).exists()))


def store(records: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Write records to <folder>/<device>/<date>-<commit>.json, without replacing an earlier run."""
    return save({"run": run_info(), "records": list(records)}, folder)


def save(results: dict[str, Any], folder: Path) -> Path:
    """Write a run's results, in the format of `store`, to their path below `folder`."""
    run = results["run"]
    stem = f"{run['date'][:10]}-{run['commit']}"
    directory = folder / run["device"]
    directory.mkdir(parents=True, exist_ok=True)
    names = (f"{stem}{suffix}.json" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    path = next(path for name in names if not (path := directory / name).exists())
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()
