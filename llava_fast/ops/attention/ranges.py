"""`KeyRanges`: one range of visible keys per query, and everything that attention works out from the ranges.

A forward pass makes one object and hands it to every layer, so what follows from the two vectors is worked out once, by
whoever needs it first, and is gone with the object:

    first_BT            for the kernels: the first query of each query's sample, where its tiles are anchored
    seen_by(S)          for the backward kernels: which queries see each of S keys
    groups(S)           for the reference on a CPU: samples to be sliced out and attended to together
    samples(S)          for other libraries: the lengths of samples, on the host
    derived(make, S)    whatever else one needs, such as a library's own mask

A *sample* is a run of queries whose ranges have no key in common with those of the queries before or after it.

Shapes: B batch, T queries, S keys; N samples of L tokens each in a group; R rows (b · T + t) of queries that see a key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch.nn import functional as F

T = TypeVar("T")
Kind = Literal["causal", "full"]


class KeyRanges:
    """Query t of batch row b sees the keys start[b, t] ≤ s < end[b, t].

    The vectors must not be changed while the object is in use.

    Attributes:
        start, end: int32 [B, T], contiguous. Along T neither decreases; an empty range has start = end.
        kind: "causal" or "full" where the host knows that every batch row is one such sample of T queries and its first
            T keys; None where it does not.

    Raises:
        ValueError: for vectors that are not two matrices of one shape.
    """

    def __init__(self, start_BT: torch.Tensor, end_BT: torch.Tensor, kind: Kind | None = None):
        if start_BT.dim() != 2 or start_BT.shape != end_BT.shape:
            raise ValueError(f"key ranges {tuple(start_BT.shape)} and {tuple(end_BT.shape)}; expected [B, T] twice")
        self.start, self.end, self.kind = start_BT.contiguous(), end_BT.contiguous(), kind
        self._derived: dict[Hashable, Any] = {}
        self._made_in_capture = self._capturing()

    @classmethod
    def full(cls, batch: int, tokens: int, device: torch.device | str, keys: int | None = None) -> KeyRanges:
        """All T queries of a batch row see all its keys, T by default, as in a vision tower."""
        start_BT = torch.zeros(batch, tokens, dtype=torch.int32, device=device)
        end_BT = torch.full_like(start_BT, tokens if keys is None else keys)
        return cls(start_BT, end_BT, "full" if keys in (None, tokens) else None)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter((self.start, self.end))

    @property
    def shape(self) -> torch.Size:
        """[B, T]."""
        return self.start.shape

    def to(self, device: torch.device | str, non_blocking: bool = False) -> KeyRanges:
        """The ranges on another device; the same object where they are there already."""
        if self.start.device == torch.device(device):
            return self
        there = self._derived.get(device)
        if there is None:
            start_BT, end_BT = (x.to(device, non_blocking=non_blocking) for x in (self.start, self.end))
            there = self._derived[device] = KeyRanges(start_BT, end_BT, self.kind)
        return there

    def shifted(self, keys: int) -> KeyRanges:
        """For a cache that has dropped its first `keys` keys."""
        return KeyRanges((self.start - keys).clamp(min=0), (self.end - keys).clamp(min=0)) if keys else self

    def derived(self, make: Callable[[KeyRanges, int], T], keys: int) -> T:
        """`make(self, keys)`, worked out once for every function and number of keys.

        What is first needed while a CUDA graph is captured is only kept if the ranges were made in that capture too: it
        has no values before the graph is replayed. A compiler finds repetitions by itself.
        """
        if torch.compiler.is_compiling():
            return make(self, keys)
        key = (make, keys)
        if key not in self._derived:
            # Outside of inference mode, or what is made could not be saved for a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                made = make(self, keys)
            if self._capturing() and not self._made_in_capture:
                return made
            self._derived[key] = made
        return self._derived[key]

    def _capturing(self) -> bool:
        return self.start.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()

    @property
    def first_BT(self) -> torch.Tensor:
        """int32: the first query of each query's sample; a run of empty rows counts as one.

        A tile begins at a row whose distance from there is a multiple of its height, so a sample's tiles are the same
        wherever it lies in a pack. Any partition gives right results.
        """
        return self.start if self.kind else self.derived(_first_of_sample, 0)

    def seen_by(self, keys: int) -> torch.Tensor:
        """int32 [3, B, S]: the first key of each key's sample; and of the queries that see a key, which are one run,
        the first and one past the last."""
        return self.derived(_seen_by, keys)

    def groups(self, keys: int) -> Groups | None:
        """The samples of a self-attention on a CPU, in groups; None where one masked call serves."""
        if self.kind and keys == self.shape[1]:
            return Groups(self.kind, ())
        if self.start.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return self.derived(_groups_of, keys)

    def samples(self, keys: int) -> Samples:
        """The lengths of samples. The first call waits for the device."""
        return self.derived(_samples_of, keys)


# What the kernels' tiles follow; computed on the device without waiting for it.


def _opens_sample(start_BT: torch.Tensor, end_BT: torch.Tensor) -> torch.Tensor:
    """[B, T] bool: whether a query is the first of its sample."""
    empty_BT = end_BT <= start_BT
    opens_BT = (start_BT[:, 1:] >= end_BT[:, :-1]) & ~(empty_BT[:, 1:] & empty_BT[:, :-1])
    return F.pad(opens_BT, (1, 0), value=True)


def _first_of_sample(ranges: KeyRanges, _: int) -> torch.Tensor:
    start_BT = ranges.start
    index_BT = torch.arange(start_BT.shape[1], device=start_BT.device, dtype=torch.int32).expand_as(start_BT)
    return torch.where(_opens_sample(start_BT, ranges.end), index_BT, 0).cummax(1).values


def _seen_by(ranges: KeyRanges, keys: int) -> torch.Tensor:
    start_BT, end_BT = ranges.start, ranges.end
    key_S = torch.arange(keys, device=start_BT.device, dtype=torch.int32)
    # Keys are cut where a sample's keys begin and where they end; column S takes what is not a cut.
    opens_BT = _opens_sample(start_BT, end_BT)
    cuts = (
        torch.where(opens_BT, start_BT, keys),
        torch.where(opens_BT[:, 1:], end_BT[:, :-1], keys),
        end_BT[:, -1:],
    )
    is_cut_BS = torch.zeros(start_BT.shape[0], keys + 1, device=start_BT.device, dtype=torch.bool)
    is_cut_BS = is_cut_BS.scatter(1, torch.cat(cuts, 1).long(), True)[:, :keys]
    key_BS = key_S.expand_as(is_cut_BS).contiguous()
    first_key_BS = torch.where(is_cut_BS, key_BS, 0).cummax(1).values
    from_BS = torch.searchsorted(end_BT, key_BS, right=True, out_int32=True)
    to_BS = torch.searchsorted(start_BT, key_BS, right=True, out_int32=True)
    return torch.stack((first_key_BS, from_BS, to_BS))


# Samples in groups, for the reference on a CPU


@dataclass(frozen=True)
class Group:
    """Samples of similar length, attended to in one call.

    kind: "causal", "full" (all see all; equal lengths) or "ranges" (`mask_N1LL`).
    rows_NL: flat row (b · T + t) of each token; short samples repeat their last row.
    real, real_rows: which of the N · L outputs are real, and where they go.
    """

    kind: str
    rows_NL: torch.Tensor
    mask_N1LL: torch.Tensor | None
    real: torch.Tensor
    real_rows: torch.Tensor


@dataclass(frozen=True)
class Groups:
    """A batch cut into samples. `whole` is their kind where each batch row is one sample that fills it; there are no
    groups then."""

    whole: Kind | None
    groups: tuple[Group, ...]


class _Sample(NamedTuple):
    kind: str
    batch_row: int
    first: int
    length: int
    ends_L: torch.Tensor  # counted from the sample's first key


def _groups_of(ranges: KeyRanges, keys: int) -> Groups | None:
    batch, tokens = ranges.shape
    if tokens == 1 or tokens != keys:
        # Decoding: nothing to mask when every query sees every key.
        full = bool((ranges.start == 0).all()) and bool((ranges.end == keys).all())
        return Groups("full", ()) if full else None
    samples = _own_samples(ranges.start, ranges.end)
    if not samples:
        return None
    if len(samples) == batch and all(sample.length == tokens for sample in samples):
        for kind in ("causal", "full"):
            if all(sample.kind == kind for sample in samples):
                return Groups(kind, ())
    return Groups(None, tuple(_similar(samples, tokens)))


def _own_samples(start_BT: torch.Tensor, end_BT: torch.Tensor) -> list[_Sample]:
    """The samples, where none sees keys outside of its own tokens; else none at all."""
    samples = []
    for b, (start_T, end_T) in enumerate(zip(start_BT, end_BT, strict=True)):
        real = (end_T > start_T).nonzero().flatten()
        if real.numel() == 0:
            continue
        cuts = (start_T[real].diff() != 0).nonzero().flatten() + 1
        for run in torch.tensor_split(real, cuts):
            first, length = int(run[0]), run.numel()
            ends_L = end_T[run] - first
            if int(start_T[run[0]]) != first or int(run[-1]) - first + 1 != length or int(ends_L.max()) > length:
                return []
            if bool((ends_L == length).all()):
                kind = "full"
            elif torch.equal(ends_L, torch.arange(1, length + 1, dtype=ends_L.dtype)):
                kind = "causal"
            else:
                kind = "ranges"
            samples.append(_Sample(kind, b, first, length, ends_L))
    return samples


def _similar(samples: list[_Sample], tokens: int) -> Iterator[Group]:
    """Groups of one kind, and of lengths within a factor of 1.5."""
    waiting: list[_Sample] = []
    for sample in sorted(samples, key=lambda sample: (sample.kind, -sample.length)):
        longest = waiting[0].length if waiting else sample.length
        fits = sample.length == longest if sample.kind == "full" else 3 * sample.length >= 2 * longest
        if waiting and (sample.kind != waiting[0].kind or not fits):
            yield _group(waiting, tokens)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield _group(waiting, tokens)


def _group(samples: list[_Sample], tokens: int) -> Group:
    kind, longest = samples[0].kind, samples[0].length
    length_N = torch.tensor([sample.length for sample in samples])
    first_N = torch.tensor([sample.batch_row * tokens + sample.first for sample in samples])
    step_L = torch.arange(longest)
    rows_NL = first_N[:, None] + torch.minimum(step_L, length_N[:, None] - 1)
    real = (step_L < length_N[:, None]).flatten()
    mask = None
    if kind == "ranges":
        ends = [F.pad(s.ends_L, (0, longest - s.length), value=s.length) for s in samples]
        mask = (step_L < torch.stack(ends)[..., None])[:, None]
    return Group(kind, rows_NL, mask, real, rows_NL.flatten()[real])


# Samples by their lengths, for other libraries


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


def _samples_of(ranges: KeyRanges, keys: int) -> Samples:
    device, (batch, tokens) = ranges.start.device, ranges.shape
    start, end = torch.stack((ranges.start, ranges.end)).to("cpu", torch.int64)  # the one wait for the device
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
