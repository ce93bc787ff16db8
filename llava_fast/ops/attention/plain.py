"""Which calls "auto" hands to PyTorch's own attention: plain ranges on a GPU, until a measurement shows ours ahead.

Ranges are plain if the host knows that they are one sample per batch row, or a pack, of causal samples or of samples
whose tokens all see each other. Any library has a kernel for these. All other ranges, decoding, float32, a call under
torch.compile or under `torch.use_deterministic_algorithms`, one that wants the LSE, and what PyTorch's kernels refuse
(`peers.py` says which tensors) stay ours. So does everything if the backend "triton" is requested by name.

`plain.json` holds, per architecture, the fastest implementation of each measured case:

    {"sm_80": {"source": "…", "fastest": {"causal pack, forward+backward, d 128, up to 1024": "varlen", …}}, "sm_90": …}

`benchmarks/plain.py` writes it. In cases that are not in it, the first of `UNMEASURED` that takes the tensors runs. A
change of the file counts from the next process on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llava_fast import backend
from llava_fast.backend import differentiated
from llava_fast.ops._launch import architecture
from llava_fast.ops.attention.decode import takes_decode
from llava_fast.ops.attention.ranges import KeyRanges

FILE = Path(__file__).parent / "plain.json"
OURS = "triton"

# cuDNN makes a plan for every new shape, so it is tried only where shapes repeat: in vision towers.
_SM_80: dict[str, tuple[str, ...]] = {
    "full": ("sdpa_flash",),
    "causal": ("sdpa_flash",),
    "full pack": ("varlen",),
    "causal pack": ("varlen",),
}
UNMEASURED: dict[str, dict[str, tuple[str, ...]]] = {
    "sm_80": _SM_80,
    "sm_90": {**_SM_80, "full": ("sdpa_cudnn", "sdpa_flash")},
}

# By all that a choice depends on: the peer's function, or None for ours. Emptied when it has grown too large.
_chosen: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
MOST_CHOICES = 4096


def case_of(samples: str, backward: bool, dim: int, longest: int) -> str:
    """The name of a case in `plain.json`, from one of the names in `UNMEASURED`, the head dimension, and the number of
    tokens of the longest sample, which is rounded up to a power of two."""
    direction = "forward+backward" if backward else "forward"
    return f"{samples}, {direction}, d {dim}, up to {_power(longest)}"


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def table() -> dict[str, dict[str, Any]]:
    """`plain.json`."""
    return json.loads(FILE.read_text())


def candidates(here: str, samples: str, *case: Any) -> tuple[str, ...]:
    """Names of implementations for a case (see `case_of`) on an architecture, in order of preference."""
    measured = table()[here]["fastest"].get(case_of(samples, *case))
    return UNMEASURED[here][samples] if measured is None else (measured, *UNMEASURED[here][samples])


def peer_for(
    q_BTHd: torch.Tensor, k_BSGd: torch.Tensor, v_BSGd: torch.Tensor, ranges: KeyRanges
) -> Callable[..., Any] | None:
    """The peer that "auto" calls instead of our kernels for these tensors on a GPU, or None. Never synchronises."""
    kind, lengths, shape = ranges.kind, ranges.lengths, q_BTHd.shape
    if kind is None or not ranges.keys == k_BSGd.shape[1] == shape[1]:
        return None
    if torch.are_deterministic_algorithms_enabled() or (lengths is not None and _capturing(q_BTHd)):
        return None
    backward = differentiated(q_BTHd, k_BSGd, v_BSGd)
    size = shape if lengths is None else (*shape[2:], _power(max(lengths)))
    facts = (kind, size, k_BSGd.shape[2], q_BTHd.dtype, q_BTHd.device, backward)
    if facts not in _chosen:
        if len(_chosen) >= MOST_CHOICES:
            _chosen.clear()
        _chosen[facts] = _choose(q_BTHd, k_BSGd, v_BSGd, ranges, backward)
    return _chosen[facts]


def _capturing(q: torch.Tensor) -> bool:
    """Whether a CUDA graph is captured: then the sums of a pack's lengths would be computed again in each layer."""
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


def _choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: KeyRanges, backward: bool) -> Any:
    if not backward and takes_decode(q, k):
        return None
    samples, longest = str(ranges.kind), q.shape[1]
    if ranges.lengths is not None:
        samples, longest = f"{samples} pack", max(ranges.lengths)
    peers = backend.peers("attention")
    for name in candidates(architecture(q.device), samples, backward, q.shape[3], longest):
        if name == OURS:
            return None
        if not peers[name].refusal((q, k, v)):
            return peers[name].fn
    return None


def explained() -> dict[str, tuple[str, str]]:
    """For `llava-fast doctor`: which implementation "auto" takes for plain ranges on this machine's GPU, and why; in
    general, and then in the measured cases. Empty if there is no GPU, or a backend is requested by name."""
    if backend.requested("attention") != "auto" or backend.interpreting() or backend.unavailable(OURS):
        return {}
    here = architecture(torch.device("cuda"))
    entry = table()[here]
    missing = {name: peer.refusal(()) for name, peer in backend.peers("attention").items()}
    report = {}
    for samples, names in UNMEASURED[here].items():
        name = next((name for name in names if not missing[name]), OURS)
        reasons = [f"{other}: {missing[other]}" for other in names[: names.index(name) if name in names else None]]
        report[samples] = name, "; ".join([*reasons, entry["source"]])
    return {**report, **{case: (name, entry["source"]) for case, name in entry["fastest"].items()}}
