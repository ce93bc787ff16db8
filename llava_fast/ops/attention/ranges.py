"""What attention works out once per batch from the key ranges: every layer attends by the same two vectors.

`sample_plan` is for the reference on a CPU: samples are sliced out and attended to one by one, or in groups of similar
length, so that neither time nor memory is spent between samples. `walk` is for the kernels: where tiles begin, and
which queries see a key. `blocks` says how kernels hold a head dimension.

Shapes: B batch, T queries, S keys; N samples of L tokens each in a group.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary


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
class Plan:
    """How to cut a batch into samples. `whole` is set when each batch row is one sample that fills it.

    start, end: the values the plan was made for.
    """

    start: torch.Tensor
    end: torch.Tensor
    keys: int
    whole: str | None
    groups: tuple[Group, ...]


# Keyed by the identity of `start`.
_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()


def sample_plan(start_BT: torch.Tensor, end_BT: torch.Tensor, keys: int) -> Plan | None:
    """The plan of a self-attention on a CPU; None where one masked call serves."""
    batch, tokens = start_BT.shape
    if start_BT.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    known = _plans.get(start_BT)
    if (
        known is not None
        and known.keys == keys
        and torch.equal(known.start, start_BT)
        and torch.equal(known.end, end_BT)
    ):
        return known
    ranges = start_BT.clone(), end_BT.clone()
    if tokens == 1 or tokens != keys:
        # Decoding: nothing to mask when every query sees every key.
        full = bool((start_BT == 0).all()) and bool((end_BT == keys).all())
        plan = Plan(*ranges, keys, "full", ()) if full else None
    else:
        samples = list(_samples(start_BT, end_BT))
        if not samples or any(sample is None for sample in samples):
            plan = None
        elif len(samples) == batch and {(kind, length) for kind, _, _, length, _ in samples} in (
            {("causal", tokens)},
            {("full", tokens)},
        ):
            plan = Plan(*ranges, keys, samples[0][0], ())
        else:
            plan = Plan(*ranges, keys, None, tuple(_groups(samples, tokens)))
    if plan is not None:
        _plans[start_BT] = plan
    return plan


def _samples(start_BT: torch.Tensor, end_BT: torch.Tensor) -> Iterator[tuple[str, int, int, int, torch.Tensor] | None]:
    """(kind, batch row, first token, length, ends) of each sample; None where a query sees keys before its run."""
    for b, (start, end) in enumerate(zip(start_BT, end_BT, strict=True)):
        real = (end > start).nonzero().flatten()
        if real.numel() == 0:
            continue
        cuts = (start[real].diff() != 0).nonzero().flatten() + 1
        for run in torch.tensor_split(real, cuts):
            first, length = int(run[0]), run.numel()
            ends = end[run] - first
            if int(start[run[0]]) != first or int(run[-1]) - first + 1 != length or int(ends.max()) > length:
                yield None
                return
            if bool((ends == length).all()):
                kind = "full"
            elif torch.equal(ends, torch.arange(1, length + 1, dtype=ends.dtype)):
                kind = "causal"
            else:
                kind = "ranges"
            yield kind, b, first, length, ends


def _groups(samples: list, tokens: int) -> Iterator[Group]:
    """Put samples of one kind, and of lengths within a factor of 1.5, into one call."""
    waiting: list = []
    for sample in sorted(samples, key=lambda sample: (sample[0], -sample[3])):
        kind, _, _, length, _ = sample
        longest = waiting[0][3] if waiting else length
        if waiting and (kind != waiting[0][0] or (length != longest if kind == "full" else 3 * length < 2 * longest)):
            yield _group(waiting, tokens)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield _group(waiting, tokens)


def _group(samples: list, tokens: int) -> Group:
    kind, longest = samples[0][0], samples[0][3]
    length_N = torch.tensor([length for _, _, _, length, _ in samples])
    first_N = torch.tensor([b * tokens + first for _, b, first, _, _ in samples])
    step_L = torch.arange(longest)
    rows_NL = first_N[:, None] + torch.minimum(step_L, length_N[:, None] - 1)
    real = (step_L < length_N[:, None]).flatten()
    mask = None
    if kind == "ranges":
        end_NL = torch.stack([F.pad(ends, (0, longest - len(ends)), value=len(ends)) for *_, ends in samples])
        mask = (step_L < end_NL[..., None])[:, None]
    return Group(kind, rows_NL, mask, real, rows_NL.flatten()[real])


@dataclass(frozen=True)
class Walk:
    """What the kernels' tiles follow. A tile begins at a row whose distance from the first row of its sample is a
    multiple of the tile's height, so a sample's tiles are the same wherever it lies in a pack.

    first_BT: int32, the first query of each query's sample. Samples are the parts of the batch row whose ranges are
        disjoint; a run of empty rows is one too.
    keys_3BS: int32, for the backward pass only: the first key of each key's sample; then, of the queries that see key
        s, which are one contiguous run, the first and one past the last.
    """

    first_BT: torch.Tensor
    keys_3BS: torch.Tensor | None


_walks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def walk(start_BT: torch.Tensor, end_BT: torch.Tensor, keys: int, backward: bool) -> Walk:
    """The walk for these ranges, computed on their device without waiting for it, once for all layers.

    Any partition gives right results, and queries that see a key only matter where ranges are differentiated through,
    so what is kept from an earlier call is used only for the same unchanged tensors, outside of graph capture.
    """
    if torch.compiler.is_compiling() or (start_BT.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _walk(start_BT, end_BT, keys, backward)  # compiled code finds the repetition itself
    version = tuple(-1 if t.is_inference() else t._version for t in (start_BT, end_BT))
    known = _walks.get(start_BT)
    if known is not None:
        end_of, identity, found = known
        if end_of() is end_BT and identity == (version, keys) and (found.keys_3BS is not None or not backward):
            return found
    with torch.inference_mode(False), torch.no_grad():
        found = _walk(start_BT, end_BT, keys, backward)
    _walks[start_BT] = (weakref.ref(end_BT), (version, keys), found)
    return found


def _walk(start_BT: torch.Tensor, end_BT: torch.Tensor, keys: int, backward: bool) -> Walk:
    index_BT = torch.arange(start_BT.shape[1], device=start_BT.device, dtype=torch.int32).expand_as(start_BT)
    empty_BT = end_BT <= start_BT
    opens_BT = (start_BT[:, 1:] >= end_BT[:, :-1]) & ~(empty_BT[:, 1:] & empty_BT[:, :-1])
    opens_BT = F.pad(opens_BT, (1, 0), value=True)
    first_BT = torch.where(opens_BT, index_BT, 0).cummax(1).values
    if not backward:
        return Walk(first_BT, None)
    # Keys are cut where a sample's keys begin and where they end; slot S takes what is not a cut.
    cuts = (
        torch.where(opens_BT, start_BT, keys),
        torch.where(opens_BT[:, 1:], end_BT[:, :-1], keys),
        end_BT[:, -1:],
    )
    is_cut_BS = torch.zeros(start_BT.shape[0], keys + 1, device=start_BT.device, dtype=torch.bool)
    is_cut_BS = is_cut_BS.scatter(1, torch.cat(cuts, 1).long(), True)[:, :keys]
    key_BS = torch.arange(keys, device=start_BT.device, dtype=torch.int32).expand_as(is_cut_BS)
    key_first_BS = torch.where(is_cut_BS, key_BS, 0).cummax(1).values
    sees_from_BS = torch.searchsorted(end_BT, key_BS.contiguous(), right=True, out_int32=True)
    sees_to_BS = torch.searchsorted(start_BT, key_BS.contiguous(), right=True, out_int32=True)
    return Walk(first_BT, torch.stack((key_first_BS, sees_from_BS, sees_to_BS)))


def tile_key(dim: int) -> int:
    """Columns a head is held in: the least of 16, 32, 64, 80, 96, 128, 160, 192, 256 that is enough."""
    low, high = _blocks(dim)
    return low + high


def _blocks(dim: int) -> tuple[int, int]:
    """Blocks are powers of two; from 64 on a dimension in between is held in two, 72 in 64 + 16 rather than 128."""
    above = max(16, 1 << (dim - 1).bit_length())
    for rest in (above // 8, above // 4):
        if above >= 128 and dim <= above // 2 + rest:
            return above // 2, rest
    return above, 0


def blocks(*tensors: torch.Tensor) -> dict[str, int | bool]:
    """What kernels are told of the last dimension: it is held in blocks of BLOCK_D and, unless that is 0, BLOCK_E.

    ALIGNED: whether every head of every row begins at a multiple of 16 bytes.
    NARROW: the last few rows of a walk are taken in a tile of so many; 0 where wide heads leave no registers for it.
    """
    dim = tensors[0].shape[-1]
    low, high = _blocks(dim)
    aligned = all(
        x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )
    narrow = 16 if low + high <= 64 else 0
    return {"DIM": dim, "ALIGNED": aligned, "NARROW": narrow, "BLOCK_D": low, "BLOCK_E": high}
