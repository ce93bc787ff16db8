"""Key ranges as the lengths of samples, on the host: what other libraries' attention wants to be told.

Shapes: B batch, T queries, S keys; N samples, R rows (b · T + t) of queries that see a key.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Samples:
    """Key ranges as samples: runs of queries of a batch row whose ranges begin at the same key.

    causal, full: whether all samples are, and share no keys; a sample of one query is both.
    queries_N, keys_N: how many each has; cu_queries, cu_keys: int32 [N + 1], their running sums, on the device.
    query_rows, key_rows: the rows b · T + t and b · S + s of all samples in order; None where those are simply all.
    row_keys: of each batch row that is one sample of all its T queries, its first key and one past the last; None where
        another batch row is not.
    """

    causal: bool
    full: bool
    queries_N: tuple[int, ...]
    keys_N: tuple[int, ...]
    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    query_rows: torch.Tensor | None
    key_rows: torch.Tensor | None
    row_keys: tuple[tuple[int, int], ...] | None

    @property
    def common_keys(self) -> slice | None:
        """The keys that every batch row sees, where each is one sample and all see the same."""
        return slice(*self.row_keys[0]) if self.row_keys and len(set(self.row_keys)) == 1 else None

    @property
    def equal(self) -> bool:
        """Whether samples of equal lengths lie end to end, so that a pack is a batch of them without a copy."""
        apart = self.query_rows is None and self.key_rows is None
        return apart and len(set(self.queries_N)) == 1 and len(set(self.keys_N)) == 1


def samples_of(start_BT: torch.Tensor, end_BT: torch.Tensor, keys: int) -> Samples:
    device, (batch, tokens) = start_BT.device, start_BT.shape
    start, end = torch.stack((start_BT, end_BT)).to("cpu", torch.int64)  # the one wait for the device
    real = end > start
    opens = real.clone()
    opens[:, 1:] &= ~real[:, :-1] | (start[:, 1:] != start[:, :-1])
    row_R = real.flatten().nonzero().flatten()
    start_R, end_R, opens_R = (x.flatten()[row_R] for x in (start, end, opens))
    begins_N = opens_R.nonzero().flatten()
    queries_N = torch.diff(begins_N, append=torch.tensor([len(row_R)]))
    last_N = begins_N + queries_N - 1
    keys_N = end_R[last_N] - start_R[begins_N]
    first_key_N = row_R[begins_N] // max(1, tokens) * keys + start_R[begins_N]
    apart = bool((first_key_N[1:] >= (first_key_N + keys_N)[:-1]).all())
    last_end_R, last_R = (x.repeat_interleave(queries_N) for x in (end_R[last_N], last_N))
    key_rows = (first_key_N - (keys_N.cumsum(0) - keys_N)).repeat_interleave(keys_N) if apart else first_key_N[:0]
    key_rows += torch.arange(len(key_rows))
    one_per_row = len(queries_N) == batch and bool((queries_N == tokens).all())

    def running_sum(lengths_N: torch.Tensor) -> torch.Tensor:
        return F.pad(lengths_N.cumsum(0), (1, 0)).to(device, torch.int32)

    def unless_all(rows: torch.Tensor, count: int) -> torch.Tensor | None:
        return None if torch.equal(rows, torch.arange(count)) else rows.to(device)

    return Samples(
        causal=apart and torch.equal(end_R, last_end_R - (last_R - torch.arange(len(row_R)))),
        full=apart and torch.equal(end_R, last_end_R),
        queries_N=tuple(queries_N.tolist()),
        keys_N=tuple(keys_N.tolist()),
        cu_queries=running_sum(queries_N),
        cu_keys=running_sum(keys_N),
        query_rows=unless_all(row_R, batch * tokens),
        key_rows=unless_all(key_rows, batch * keys),
        row_keys=tuple(zip(start[:, 0].tolist(), end[:, -1].tolist())) if one_per_row else None,
    )


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the identity of `start`


def once(make: Callable[..., Any], start_BT: torch.Tensor, end_BT: torch.Tensor, keys: int) -> Any:
    """`make(start, end, keys)`, or what it returned for the same unchanged tensors. It must not hold on to them."""
    if start_BT.is_inference() or end_BT.is_inference():
        return make(start_BT, end_BT, keys)  # whether they have changed cannot be told
    version = start_BT._version, end_BT._version
    of_start = _kept.setdefault(start_BT, {})
    end_of, identity, found = of_start.get(make, (lambda: None, None, None))
    if end_of() is not end_BT or identity != (version, keys):
        with torch.inference_mode(False):
            found = make(start_BT, end_BT, keys)
        of_start[make] = (weakref.ref(end_BT), (version, keys), found)
    return found
