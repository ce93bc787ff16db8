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

Canonical form: along T both vectors never decrease, and an empty row has start = end = its own index. The queries that
see a given run of keys are then themselves one contiguous run.

Two builders make them. `pack` works on the host from lengths that a collator knows; `key_ranges` works on the device
from tensors that are already there, and never waits for the device.

Shapes: B batch rows, T query tokens, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from llava_fast.ops.attention.ranges import KeyRanges


@dataclass(frozen=True)
class Pack:
    """Samples laid end to end in one row of T tokens.

    Attributes:
        position_ids: [1, T] int64, restarting at 0 with each sample.
        key_start: [1, T] int32, first key each token sees.
        key_end: [1, T] int32, one past the last key each token sees.
    """

    position_ids: torch.Tensor
    key_start: torch.Tensor
    key_end: torch.Tensor


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
    return Pack((index - first)[None], first.to(torch.int32)[None], end.to(torch.int32)[None])


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
        image_mask: [B, T] bool; given, the tokens of one image see each other.
        image_tokens: tokens per image, used with `image_mask`.
        sliding_window: each token sees at most this many of the latest keys, itself included.

    Returns:
        canonical ranges [B, T]. Their kind is known where nothing but causality decides them.

    Raises:
        ValueError: when an `attention_mask` has real tokens that are not contiguous (on a CPU; on other devices the
            same condition is asserted asynchronously), or has the wrong shape.
    """
    step = torch.arange(tokens, device=device)
    index_BT = (step + past).expand(batch, tokens)
    end_BT = index_BT + 1
    if image_mask is not None:
        end_BT = _end_of_image(image_mask, image_tokens, past)
    start_BT = torch.zeros_like(index_BT)

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
        real_BS = attention_mask != 0
        slot = torch.arange(real_BS.shape[1], device=device)
        count_B = real_BS.sum(1, keepdim=True)
        first_B = torch.where(real_BS, slot, real_BS.shape[1]).amin(1, keepdim=True)
        last_B = torch.where(real_BS, slot, -1).amax(1, keepdim=True)
        require(
            ((last_B - first_B + 1 == count_B) | (count_B == 0)).all(),
            "attention_mask has padding between real tokens; pad on one side only "
            "(batched generation: processor.tokenizer.padding_side = 'left')",
        )
        real_BT = (index_BT >= first_B) & (index_BT <= last_B)
        start_BT = torch.where(real_BT, first_B, index_BT)
        end_BT = torch.where(real_BT, torch.minimum(end_BT, last_B + 1), index_BT)
    elif position_ids is not None and tokens > 1 and isinstance(past, int) and past == 0:
        follows = position_ids[:, 1:] == position_ids[:, :-1] + 1
        opens = torch.nn.functional.pad(~follows, (1, 0), value=True)
        start_BT = torch.where(opens, index_BT, 0).cummax(1).values.expand(batch, tokens)

    if sliding_window is not None:
        start_BT = torch.maximum(start_BT, torch.minimum(index_BT + 1 - sliding_window, end_BT))
    plain = attention_mask is None and image_mask is None and position_ids is None and sliding_window is None
    kind: Literal["causal"] | None = "causal" if plain and isinstance(past, int) and past == 0 else None
    return KeyRanges(start_BT.to(torch.int32), end_BT.to(torch.int32), kind)


def _end_of_image(image_mask_BT: torch.Tensor, image_tokens: int, past: int | torch.Tensor) -> torch.Tensor:
    """End (exclusive) of the image each token lies in; its own index + 1 outside of one."""
    step = torch.arange(image_mask_BT.shape[1], device=image_mask_BT.device)
    opens = image_mask_BT & ~torch.nn.functional.pad(image_mask_BT[:, :-1], (1, 0))
    run_BT = torch.where(opens, step, 0).cummax(1).values
    # Images may stand side by side, so a run of image tokens is cut every `image_tokens`.
    stop_BT = run_BT + ((step - run_BT) // image_tokens + 1) * image_tokens
    return torch.where(image_mask_BT, stop_BT, step + 1).clamp(max=image_mask_BT.shape[1]) + past


def require(condition: torch.Tensor, message: str) -> None:
    """Raise at once on a CPU; elsewhere assert on the device without waiting for it."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)
