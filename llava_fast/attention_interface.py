"""Key-range attention for any transformers model: `register_attention()`, then `attn_implementation="llava_fast"`.

transformers looks up two functions by that name. The mask function returns key ranges in place of a mask, [B, 1, T, 3]
int32 of (start, end, causal); four dimensions, because generation passes on a precomputed mask only if it has four. The
attention function runs `ops.attention` on them. Without the mask function padded input would silently be wrong.

For a causal mask, with or without a sliding window, the ranges are computed directly. Other masks (packs, images that
see themselves, chunks, windows over a cache that has dropped keys) are evaluated for a slice of queries at a time; a
mask in which a query's keys are not contiguous is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from llava_fast.ops.attention import KeyRanges, range_attention
from llava_fast.sequence import key_ranges, require

NAME = "llava_fast"
SLICE = 256  # queries whose mask is evaluated at a time
UNSUPPORTED = ("softcap", "position_bias", "s_aux")


def register_attention() -> None:
    """Register `attn_implementation="llava_fast"` with transformers, for every model that is loaded afterwards.

    Packed samples are recognised by position ids that restart, with `use_cache` on or off, but only if no attention
    mask is given; they never see each other.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, range_mask)


def range_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_,
) -> torch.Tensor:
    """Key ranges in place of transformers' mask: [B, 1, T, 3] int32; the third is 1 in a causal mask without padding.

    Raises:
        ValueError: if a query's keys are not contiguous, or ranges decrease (on a GPU: a device-side assert).
    """
    window = _window(mask_function)
    if (mask_function is causal_mask_function or window is not None) and kv_offset == 0:
        ranges = key_ranges(
            batch_size,
            q_length,
            torch.device(device),
            past=q_offset,
            attention_mask=attention_mask,
            sliding_window=window,
        )
        return _packed(ranges, torch.full_like(ranges.end, attention_mask is None))
    slices = []
    for first in range(0, q_length, SLICE):
        mask_B1TS = sdpa_mask(
            batch_size,
            min(SLICE, q_length - first),
            kv_length,
            cast(int, q_offset + first),  # may also be a tensor
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert mask_B1TS is not None  # guaranteed by allow_is_causal_skip=False
        slices.append(_ranges_of_mask(mask_B1TS))
    start_BT, end_BT = (torch.cat(of_slices, 1) for of_slices in zip(*slices, strict=True))
    index_T = torch.arange(q_length, device=device) + q_offset - kv_offset
    causal = (end_BT == index_T + 1).all() & (attention_mask is None)
    return _packed(_canonical(start_BT, end_BT), causal.to(torch.int32).expand_as(end_BT))


def _packed(ranges: KeyRanges, causal_BT: torch.Tensor) -> torch.Tensor:
    return torch.stack((*ranges, causal_BT), -1)[:, None]


def _window(mask_function: Callable) -> int | None:
    """The window size, if this is exactly transformers' causal mask with a sliding window; else None.

    Functions from one factory share their code object, and the window size is in their closure.
    """
    plain = sliding_window_causal_mask_function(1)
    if getattr(mask_function, "__code__", None) is not plain.__code__:
        return None
    ((overlay, *others),) = (cell.cell_contents for cell in mask_function.__closure__ or ())
    if others != [causal_mask_function] or overlay.__code__ is not sliding_window_overlay(1).__code__:
        return None
    (size,) = (cell.cell_contents for cell in overlay.__closure__)
    return size


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [B, H, T, d], key and value [B, G, S, d] to [B, T, H, d], None.

    Raises:
        ValueError: for dropout, soft caps, biases or sinks, and for a float mask.
    """
    if dropout:
        raise ValueError(f"{NAME} attention has no dropout, but {dropout} was asked for")
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{NAME} attention does not support {name}; load with attn_implementation='eager'")
    tokens, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = tokens > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if causal:
            ranges = key_ranges(query.shape[0], tokens, query.device)
        else:
            ranges = KeyRanges.full(query.shape[0], tokens, query.device, keys)
    else:
        # Positions separate packed samples only if the cache is empty; transformers ignores them otherwise, too.
        packed = position_ids if tokens == keys > 1 and position_ids is not None and position_ids.dim() == 2 else None
        ranges = _ranges(attention_mask, packed)
    q_BTHd, k_BSGd, v_BSGd = (x.transpose(1, 2) for x in (query, key, value))
    return range_attention(q_BTHd, k_BSGd, v_BSGd, ranges, scale=scaling), None


def _ranges(mask: torch.Tensor, position_ids: torch.Tensor | None) -> KeyRanges:
    """The ranges of a mask. All layers of a forward pass get the same mask, so the first layer caches them on it."""
    made_here = mask.dtype == torch.int32  # by `range_mask`
    if torch.compiler.is_compiling() or (mask.is_inference() and not made_here):
        return _unpacked(mask, position_ids)
    version = None if mask.is_inference() else mask._version
    found = getattr(mask, "key_ranges", None)
    if found is None or found[0] is not position_ids or found[1] != version:
        found = position_ids, version, _unpacked(mask, position_ids)
        mask.key_ranges = found  # type: ignore[attr-defined]  # tensors allow new attributes
    return found[2]


def _unpacked(mask: torch.Tensor, position_ids: torch.Tensor | None) -> KeyRanges:
    if mask.dtype == torch.bool:
        return _canonical(*_ranges_of_mask(mask))
    if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[-1] != 3:
        raise ValueError(
            f"{NAME} attention takes [batch, tokens] attention masks or boolean [batch, 1, tokens, keys] ones, "
            f"not {mask.dtype} {tuple(mask.shape)}"
        )
    start_BT, end_BT, causal_BT = mask[:, 0].unbind(-1)
    if position_ids is not None:
        batch, tokens = start_BT.shape
        samples = key_ranges(batch, tokens, mask.device, position_ids=position_ids.expand(batch, -1))
        start_BT = torch.where(causal_BT == 1, torch.maximum(start_BT, samples.start), start_BT)
    return KeyRanges(start_BT, end_BT)


def _ranges_of_mask(mask_B1TS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First key that each query sees, and one past the last; both −1 if it sees none."""
    if mask_B1TS.shape[1] != 1:
        raise ValueError(f"{NAME} attention takes one mask for all heads, not {tuple(mask_B1TS.shape)}")
    seen_BTS = mask_B1TS[:, 0]
    slot_S = torch.arange(seen_BTS.shape[-1], device=seen_BTS.device, dtype=torch.int32)
    end_BT = torch.where(seen_BTS, slot_S + 1, -1).amax(-1)
    start_BT = torch.where(seen_BTS, slot_S, seen_BTS.shape[-1]).amin(-1)
    require(
        ((end_BT < 0) | (seen_BTS.sum(-1) == end_BT - start_BT)).all(),
        f"{NAME} attention needs masks in which each query sees one run of keys",
    )
    return torch.where(end_BT < 0, -1, start_BT), end_BT


def _canonical(start_BT: torch.Tensor, end_BT: torch.Tensor) -> KeyRanges:
    """Make the ranges non-decreasing: an empty range is moved to the end of the ranges before it."""
    until_BT = end_BT.clamp(min=0).cummax(1).values
    start_BT = torch.where(end_BT < 0, until_BT, start_BT)
    end_BT = torch.where(end_BT < 0, until_BT, end_BT)
    for x_BT in (start_BT, end_BT):
        require((x_BT.diff(dim=1) >= 0).all(), f"{NAME} attention needs masks whose runs of keys never go backwards")
    return KeyRanges(start_BT.to(torch.int32), end_BT.to(torch.int32))
