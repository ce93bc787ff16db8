"""`KeyRanges`: one range of visible keys per query, and the tensors that attention derives from the ranges.

A forward pass makes one object and passes it to every layer. Derived tensors are computed at first use, cached in the
object, and freed with it:

    first_BT            for the kernels: the first query of each query's sample, from which its tiles are counted
    seen_by(S)          for the backward kernels: which queries see each of S keys
    groups(S)           for the reference on a CPU: groups of samples, each one SDPA call
    derived(make, S)    anything else, such as the lengths of samples, or a library's own mask

A *sample* is a run of queries whose ranges have no key in common with those of the queries before or after it.

Shapes: B batch, T queries, S keys; N samples of L tokens each in a group.
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
        kind: what the host knows of every batch row: "causal", its T queries and first T keys are one sample; "full",
            all queries see the first `keys` keys; or None. With `lengths` it is the kind of every sample.
        keys: number of keys of that kind.
        lengths: tokens of each sample, if the host knows that the one batch row is several samples of `kind`, laid end
            to end; else None. Must be right: only their sum is checked.

    Raises:
        ValueError: for vectors that are not two matrices of one shape, or lengths that do not add up to one row of T
                or are not positive.
    """

    def __init__(
        self,
        start_BT: torch.Tensor,
        end_BT: torch.Tensor,
        kind: Kind | None = None,
        keys: int | None = None,
        lengths: tuple[int, ...] | None = None,
    ):
        if start_BT.dim() != 2 or start_BT.shape != end_BT.shape:
            raise ValueError(f"key ranges {tuple(start_BT.shape)} and {tuple(end_BT.shape)}; expected [B, T] twice")
        if lengths is not None and (1, sum(lengths)) != tuple(start_BT.shape):
            raise ValueError(f"samples of {sum(lengths)} tokens in all, but key ranges {tuple(start_BT.shape)}")
        if lengths and min(lengths) < 1:
            raise ValueError(f"a sample of {min(lengths)} tokens; every sample needs at least one")
        self.start, self.end = start_BT.contiguous(), end_BT.contiguous()
        self.kind, self.keys = kind, start_BT.shape[1] if keys is None else keys
        self.lengths = lengths if lengths and len(lengths) > 1 else None
        self._derived: dict[Hashable, Any] = {}
        self._made_in_capture = self._capturing()

    @classmethod
    def full(cls, batch: int, tokens: int, device: torch.device | str, keys: int | None = None) -> KeyRanges:
        """All T queries of a batch row see all its keys, T by default, as in a vision tower."""
        start_BT = torch.zeros(batch, tokens, dtype=torch.int32, device=device)
        end_BT = torch.full_like(start_BT, tokens if keys is None else keys)
        return cls(start_BT, end_BT, "full", keys)

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
            there = self._derived[device] = KeyRanges(start_BT, end_BT, self.kind, self.keys, self.lengths)
        return there

    def shifted(self, keys: int) -> KeyRanges:
        """The ranges for a cache that has dropped its first `keys` keys."""
        return KeyRanges((self.start - keys).clamp(min=0), (self.end - keys).clamp(min=0)) if keys else self

    def last(self, rows: int) -> KeyRanges:
        """The ranges of the last `rows` queries of each batch row."""
        one = self.lengths is None
        kind: Kind | None = "full" if one and (self.kind == "full" or (self.kind and rows == 1)) else None
        return KeyRanges(self.start[:, -rows:], self.end[:, -rows:], kind, self.keys)

    def derived(self, make: Callable[[KeyRanges, int], T], keys: int) -> T:
        """`make(self, keys)`, cached per function and number of keys.

        A result computed during CUDA graph capture has no values before the graph is replayed, so it is cached only if
        the ranges were made during capture too. Under torch.compile nothing is cached; the compiler removes
        repetitions.
        """
        if torch.compiler.is_compiling():
            return make(self, keys)
        key = (make, keys)
        if key not in self._derived:
            # Inference tensors could not be saved for a later backward pass.
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

        Tiles begin at multiples of their height after this query, so a sample's tiles are the same wherever it lies in
        a pack. Results would be right with any other partition.
        """
        return self.start if self.kind else self.derived(_first_of_sample, 0)

    def seen_by(self, keys: int) -> torch.Tensor:
        """int32 [3, B, S], per key: the first key of its sample; the first query that sees the key, and one past the
        last (these queries are contiguous)."""
        return self.derived(_seen_by, keys)

    def groups(self, keys: int) -> Groups | None:
        """The samples of a self-attention on a CPU, in groups; None: use one SDPA call with a mask."""
        if self.kind and self.lengths is None and keys == self.keys:
            return Groups(self.kind, ())
        if self.start.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return self.derived(_groups_of, keys)


# Boundaries of samples, for the kernels' tiles; computed on the device without synchronisation


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
    # Keys are cut where a sample's keys begin and where they end; queries without a cut write to the extra column S.
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
    real, real_rows: which of the N · L outputs are not repetitions, and their flat rows.
    """

    kind: str
    rows_NL: torch.Tensor
    mask_N1LL: torch.Tensor | None
    real: torch.Tensor
    real_rows: torch.Tensor


@dataclass(frozen=True)
class Groups:
    """A batch cut into samples. If each batch row is exactly one sample, `whole` is their kind and there are no
    groups."""

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
    """The samples; an empty list if any of them sees keys outside of its own tokens."""
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


# Ranges from tensors that are already on the device


def key_ranges(
    batch: int,
    tokens: int,
    device: torch.device,
    *,
    past: int | torch.Tensor = 0,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    image_mask: torch.Tensor | None = None,
    image_tokens: int = 1,
    sliding_window: int | None = None,
) -> KeyRanges:
    """Key ranges of a batch whose tensors are already on the device; no synchronisation.

    Args:
        batch, tokens: B and T of the queries.
        past: keys already in the cache (an int, or a 0-d tensor for a static cache); query t has index `past + t`.
        attention_mask: [B, S'] with non-zero for real tokens, left- or right-padded, counted from the first key.
            At least `past + T` long.
        position_ids: [B, T]; without an `attention_mask` and with nothing cached, a position that does not follow
            its predecessor starts a new document (packed samples).
        image_mask: [B, T] bool, True at image tokens; if given, the tokens of one image see each other.
        image_tokens: tokens per image, used with `image_mask`.
        sliding_window: each token sees at most this many of the latest keys, its own included.

    Returns:
        canonical ranges [B, T], of known kind if there is no window, image mask, padding or packed sample, and either
        nothing is cached or T = 1. (On a CPU the mask is read to find padding; elsewhere a mask counts as padding.)

    Raises:
        ValueError: when an `attention_mask` has real tokens that are not contiguous (on a CPU; on other devices the
            same condition is asserted asynchronously), or has the wrong shape.
    """
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected [{batch}, tokens] with 1 for real "
                "tokens (4-D masks are not accepted: key ranges replace them)"
            )
        if not isinstance(past, torch.Tensor) and attention_mask.shape[1] < past + tokens:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, but {past} cached + {tokens} new were given"
            )
        if attention_mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(attention_mask.all()):
            attention_mask = position_ids = None
    first = isinstance(past, int) and past == 0
    if not (first and tokens > 1):
        position_ids = None
    plain = attention_mask is None and image_mask is None and position_ids is None and sliding_window is None
    if plain and tokens == 1 and isinstance(past, int):
        return KeyRanges.full(batch, 1, device, past + 1)

    index_T = torch.arange(tokens, device=device, dtype=torch.int32)
    index_BT = (index_T if first else index_T + past).expand(batch, tokens)
    end_BT = index_BT + 1
    if image_mask is not None:
        end_BT = _end_of_image(image_mask, image_tokens, past)
    if attention_mask is not None:
        real_BS = attention_mask != 0
        first_B1 = real_BS.view(torch.uint8).argmax(1, keepdim=True).int()
        stop_B1 = first_B1 + real_BS.sum(1, keepdim=True, dtype=torch.int32)
        slot_S = torch.arange(real_BS.shape[1], device=device, dtype=torch.int32)
        require(
            ~(real_BS & (slot_S >= stop_B1)).any(),
            "attention_mask has padding between real tokens; pad on one side only "
            "(batched generation: processor.tokenizer.padding_side = 'left')",
        )
        real_BT = (index_BT >= first_B1) & (index_BT < stop_B1)
        start_BT = torch.where(real_BT, first_B1, index_BT)
        if image_mask is not None:
            end_BT = torch.minimum(end_BT, stop_B1)
        end_BT = torch.where(real_BT, end_BT, index_BT)
    elif position_ids is not None:
        follows = position_ids[:, 1:] == position_ids[:, :-1] + 1
        opens = torch.nn.functional.pad(~follows, (1, 0), value=True)
        start_BT = torch.where(opens, index_BT, 0).cummax(1).values.expand(batch, tokens)
    else:
        start_BT = torch.zeros_like(index_BT)

    if sliding_window is not None:
        start_BT = torch.maximum(start_BT, torch.minimum(index_BT + 1 - sliding_window, end_BT))
    return KeyRanges(start_BT.int(), end_BT.int(), "causal" if plain and first else None)


def _end_of_image(image_mask_BT: torch.Tensor, image_tokens: int, past: int | torch.Tensor) -> torch.Tensor:
    """End (exclusive) of the image that contains each token; own index + 1 for other tokens."""
    step = torch.arange(image_mask_BT.shape[1], device=image_mask_BT.device)
    opens = image_mask_BT & ~torch.nn.functional.pad(image_mask_BT[:, :-1], (1, 0))
    run_BT = torch.where(opens, step, 0).cummax(1).values
    # A run of image tokens may be several adjacent images, so it is cut every `image_tokens`.
    stop_BT = run_BT + ((step - run_BT) // image_tokens + 1) * image_tokens
    return torch.where(image_mask_BT, stop_BT, step + 1).clamp(max=image_mask_BT.shape[1]) + past


def require(condition: torch.Tensor, message: str) -> None:
    """Raise ValueError on a CPU; elsewhere an asynchronous device-side assert."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)
