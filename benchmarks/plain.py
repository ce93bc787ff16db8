"""From stored measurements: which implementation of attention "auto" takes for plain ranges, per architecture.

`make report` writes llava_fast/ops/attention/plain.json from benchmarks/results. Ours is taken in a case if it is the
fastest in all records of the case (several shapes and GPUs may belong to one), else the peer that is fastest on average
(geometric mean). Peers are those that "auto" tries without a measurement (`UNMEASURED`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

from benchmarks import test_attention
from llava_fast.ops.attention.plain import OURS, UNMEASURED, case_of

Record = Mapping[str, Any]

ARCHITECTURES = {"nvidia-a100": "sm_80", "nvidia-h100": "sm_90", "nvidia-h200": "sm_90"}
WITHOUT = "PyTorch's kernels until a timing shows ours ahead"


def plain_case(op: str, shape: str) -> tuple[str, int, int] | None:
    """(samples, head dimension, tokens of the longest sample) of a benchmark's case; None if its ranges are not plain.

    A record does not hold the lengths of its pack; they are those of `benchmarks/test_attention.py`."""
    if op not in ("attention_tower", "attention_sample", "attention", "attention_gqa"):
        return None
    _, tokens, *_, dim = (int(n) for n in shape.split("x"))
    if op == "attention_tower":
        return "full", dim, tokens
    if op == "attention_sample":
        return "causal", dim, tokens
    longest = {sum(lengths): max(lengths) for lengths in test_attention.PACKS[True]}
    return ("causal pack", dim, longest[tokens]) if tokens in longest else None


def table(measured: Mapping[str, Iterable[Record]], sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The content of plain.json.

    Args:
        measured: by device (a key of `ARCHITECTURES`), the records of `benchmarks/test_attention.py`, one per provider
            of a case.
        sources: by device, what it is and when it was measured.
    """
    times: dict[str, dict[str, dict[tuple, dict[str, float]]]] = {here: {} for here in UNMEASURED}
    for device, record in _bf16(measured):
        case = plain_case(record["op"], record["shape"])
        if case is None:
            continue
        here, (samples, dim, longest) = ARCHITECTURES[device], case
        if record["provider"] in (OURS, *UNMEASURED[here][samples]):
            name = case_of(samples, record["direction"] != "forward", dim, longest)
            of_shape = times[here].setdefault(name, {}).setdefault((device, record["op"], record["shape"]), {})
            of_shape[record["provider"]] = record["ms_median"]
    report = {}
    for here, cases in times.items():
        found = {name: fastest(list(of_shapes.values())) for name, of_shapes in sorted(cases.items())}
        known = {name: provider for name, provider in found.items() if provider is not None}
        devices = [device for device in measured if ARCHITECTURES[device] == here]
        source = f"not measured: {WITHOUT}"
        if known:
            source = f"measured on {', '.join(sources[device] for device in devices)}; other cases: {WITHOUT}"
        report[here] = {"source": source, "fastest": known}
    return report


def _bf16(measured: Mapping[str, Iterable[Record]]) -> Iterator[tuple[str, Record]]:
    return ((device, record) for device, records in measured.items() for record in records if record["dtype"] == "bf16")


def fastest(ms: list[dict[str, float]]) -> str | None:
    """The name to store, from the times by provider of each shape of a case; None if there is nothing to compare."""
    peers = set.intersection(*map(set, ms)) - {OURS}
    if not peers:
        return None
    if all(OURS in of_shape and of_shape[OURS] <= min(of_shape[peer] for peer in peers) for of_shape in ms):
        return OURS
    return min(sorted(peers), key=lambda peer: prod(of_shape[peer] for of_shape in ms))


def dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
