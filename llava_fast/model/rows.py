"""Rows of the last layer's output that somebody reads: the last tokens of a prompt, or those that predict a label."""

from __future__ import annotations

import torch

from llava_fast.model.cache import Int8, dense
from llava_fast.ops.attention import KeyRanges

# So many last tokens of each batch row, or flat places b · T + t.
Rows = int | torch.Tensor


def take_rows(x_BT: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[B, T, …] -> [B, rows, …] for the last tokens, or [1, len(rows), …] for flat places."""
    return x_BT[:, -rows:] if isinstance(rows, int) else x_BT.flatten(0, 1)[rows][None]


def angles_of_rows(cos_BTd: torch.Tensor, sin_BTd: torch.Tensor, batch: int, rows: Rows) -> list[torch.Tensor]:
    """Rotary angles of the rows; those given may be of one batch row for all."""
    return [take_rows(angle.expand(batch, -1, -1), rows) for angle in (cos_BTd, sin_BTd)]


def keys_of_rows(
    k_BSGd: torch.Tensor | Int8, v_BSGd: torch.Tensor | Int8, ranges: KeyRanges, rows: Rows, dtype: torch.dtype
) -> tuple[torch.Tensor | Int8, torch.Tensor | Int8, KeyRanges]:
    """Keys, values and ranges for the queries of the rows. Flat places come from any batch row, so for them the keys of
    all lie end to end as those of one, in `dtype`."""
    start, end = ranges
    if not isinstance(rows, int):
        k_BSGd, v_BSGd = dense(k_BSGd, dtype), dense(v_BSGd, dtype)
        batch, keys = k_BSGd.shape[:2]
        offset_B1 = keys * torch.arange(batch, device=start.device, dtype=start.dtype)[:, None]
        start, end = start + offset_B1, end + offset_B1
        k_BSGd, v_BSGd = k_BSGd.flatten(0, 1)[None], v_BSGd.flatten(0, 1)[None]
    return k_BSGd, v_BSGd, KeyRanges(take_rows(start, rows), take_rows(end, rows))
