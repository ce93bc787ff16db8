"""Kernels on a CPU by a second way: ttsem runs the IR that Triton's compiler makes, and reports faults.

Triton's interpreter runs a kernel's Python, one program after the other. ttsem (MIT) compiles the kernel, runs the
compiled operations on NumPy arrays, computes bfloat16 as a GPU does, and stops at

- a read or a write outside of the tensors a kernel was given,
- an element that two programs touch, one of them writing: a race,
- an operation whose result is undefined.

Memory that nobody wrote is NaN, as in the kit, whose rules the results must meet.

The compiler does not work in a process where TRITON_INTERPRET=1, so test_second_executor.py runs

    python -m tests.ops.second_executor CASE …

which writes a JSON line per case: its name, the kernels it launched with their flags, the fault ("" where there is
none), its processor seconds. Cases are in kernel_cases.py, faults that must be reported in planted_faults.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from unittest import mock

import torch

from llava_fast.ops._launch import Launch, recorded
from tests.ops.kernel_cases import CASES
from tests.ops.planted_faults import PLANTED, SOUND


def find_race(search: Callable, log: list[Any] | None) -> Any:
    """ttsem's search, which takes programs to have no order, where some have one.

    What a program did before it updated a counter ("acq_rel") comes before what another does after it updated the same
    counter later. So the search is made among what all did before their update, among what they did after it, and for
    each program between what it did after it and what others did before, without those that come earlier.
    """
    updated: dict[Any, int] = {}  # by program, in the order of the updates: the counter's address
    before: list[Any] = []
    after: dict[Any, list[Any]] = {}
    for entry in log or ():
        program, kind, operation, addresses = entry[:4]
        (after.setdefault(program, []) if program in updated else before).append(entry)
        if kind == "a" and "sem = 4" in operation:
            updated.setdefault(program, int(addresses[0]))
    race = search(before) or search([entry for entries in after.values() for entry in entries])
    for program, later in after.items():
        order = list(updated)
        earlier = {other for other in order[: order.index(program) + 1] if updated[other] == updated[program]}
        race = race or search(later + [entry for entry in before if entry[0] not in earlier])
    return race


def variants(launches: Iterable[Launch]) -> set[str]:
    """Names of the kernels, and each with every flag that it has: "norm_fwd_kernel CENTRED=True"."""
    found = {launch.name.strip("_") for launch in launches}
    for launch in launches:
        flags = ((name, value) for name, value in launch.constexprs.items() if isinstance(value, (bool, str)))
        found |= {f"{launch.name.strip('_')} {name}={value}" for name, value in flags}
    return found


def run(name: str) -> dict[str, Any]:
    """Run a case in an open session of ttsem."""
    torch.manual_seed(0)
    case = {**CASES, **SOUND, **{planted: case for planted, (_, case) in PLANTED.items()}}[name]
    fault, started = "", time.process_time()
    with recorded() as launched:
        try:
            case()
        except Exception as error:  # a fault of ttsem, or what an assertion says
            fault = str(error) or type(error).__name__
    seconds = round(time.process_time() - started, 2)
    return {"case": name, "kernels": sorted(variants(launched)), "fault": fault, "seconds": seconds}


def main(names: list[str]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 turns the compiler off; unset it")
    try:
        from ttsem import memory, pidraces, sanitize, values
    except ModuleNotFoundError:
        sys.exit("ttsem is not installed; `make setup` installs it")
    if sys.version_info < (3, 11):  # where exceptions have no notes, in which ttsem says what it was doing
        for error in (memory.MemoryFault, values.Poison):
            error.add_note = lambda self, note: vars(self).setdefault("__notes__", []).append(note)
    search = mock.patch.object(pidraces, "find_race", partial(find_race, pidraces.find_race))
    with search, sanitize.session(cc=90) as session:
        torch.cuda.is_current_stream_capturing = lambda: False
        for name in names:
            print(json.dumps(run(name)), flush=True)
        assert session.races_unchecked == 0, "a case is too large to be searched for races"


if __name__ == "__main__":
    main(sys.argv[1:] or [*CASES, *SOUND, *PLANTED])
