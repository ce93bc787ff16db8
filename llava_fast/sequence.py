"""The mixed image-text sequence: positions, and one range of visible keys per query.

Every mask a LLaVA-style model needs gives each query token one contiguous range of keys `[start, end)`, so a sequence
carries two int32 vectors instead of a [T, T] mask:

    wanted                              start                       end
    causal text                         start of its document       own index + 1
    image tokens that see each other    start of its document       end of its image
    left or right padding               first real token            as above; a pad token gets an empty range
    packed samples                      start of its sample         as above
    sliding window w                    max(document start, i-w+1)  i + 1
    decoding from a cache               first real slot             filled length

Canonical form: along T both vectors never decrease, and an empty row has start = end = its own index. Then the queries
that see any key of a contiguous run are also a contiguous run.

Two functions build the vectors: `pack`, on the host, from the sample lengths that a collator knows; and `key_ranges`,
on the device, from tensors that are already there, without synchronisation.

Shapes: B batch rows, T query tokens, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llava_fast.ops.attention.ranges import KeyRanges, key_ranges, require

__all__ = ["KeyRanges", "Pack", "key_ranges", "pack", "require"]


@dataclass(frozen=True)
class Pack:
    """Samples laid end to end in one row of T tokens.

    Attributes:
        position_ids: [1, T] int64, restarting at 0 with each sample.
        key_start: [1, T] int32, first key each token sees.
        key_end: [1, T] int32, one past the last key each token sees.
        lengths: tokens of each sample if all samples are causal, else None. The host then knows the ranges, and on a
            GPU attention may choose its kernel by them (`ops/attention/plain.py`).
    """

    position_ids: torch.Tensor
    key_start: torch.Tensor
    key_end: torch.Tensor
    lengths: tuple[int, ...] | None = None


def pack(
    lengths: Sequence[int],
    image_spans: Sequence[Sequence[tuple[int, int]]] | None = None,
    *,
    bidirectional_images: bool = False,
) -> Pack:
    """Lay samples of known `lengths` end to end; host integers only, no device synchronisation.

    Args:
        lengths: tokens per sample, each ≥ 1.
        image_spans: per sample, the `(start, length)` of each image's tokens, counted from the sample's first token.
        bidirectional_images: let the tokens of one image see each other; the default is causal.

    Raises:
        ValueError: for an empty sample, or an image span that is not inside its sample.
    """
    for i, count in enumerate(lengths):
        if count < 1:
            raise ValueError(f"sample {i} has length {count}; every packed sample needs at least one token")
    length_N = torch.tensor(list(lengths), dtype=torch.int64)
    total = int(length_N.sum())
    first = torch.repeat_interleave(length_N.cumsum(0) - length_N, length_N)
    index = torch.arange(total)
    end = index + 1
    if bidirectional_images:
        if image_spans is None or len(image_spans) != len(lengths):
            raise ValueError("bidirectional_images needs image_spans with one entry per sample")
        offset = 0
        for i, spans in enumerate(image_spans):
            for start, count in spans:
                if start < 0 or count < 1 or start + count > lengths[i]:
                    raise ValueError(f"image span ({start}, {count}) is not inside sample {i} of {lengths[i]} tokens")
                end[offset + start : offset + start + count] = offset + start + count
            offset += lengths[i]
    known = None if bidirectional_images else tuple(lengths)
    return Pack((index - first)[None], first.to(torch.int32)[None], end.to(torch.int32)[None], known)
