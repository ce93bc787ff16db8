"""Providers of key-range attention: our backends, PyTorch's SDPA with an equivalent dense mask, and the peers.

All are called with q [B, T, H, d] and k, v [B, S, G, d] as in a model; copies that a library needs are part of its
time. A peer that does not support a case's ranges is skipped, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.harness import Tensors
from llava_fast import backend
from llava_fast.ops.attention import KeyRanges, range_attention

Provider = Callable[[Tensors], Callable]


def names() -> list[str]:
    """Our backends and the peers; FlexAttention only on a GPU, as it would run uncompiled on a CPU."""
    gpu = torch.cuda.is_available()
    ours = "triton" if gpu and not backend.unavailable("triton") else "reference"
    peers = backend.status()["attention"]["peers"]
    return [ours, *(name for name, state in peers.items() if state == "available" and (gpu or name != "flex"))]


def providers(dense: bool = True) -> dict[str, Provider]:
    """`dense`: whether SDPA needs a mask for these ranges; mask and ranges are made before the measurement."""
    return {"torch": partial(_sdpa, dense), **{name: partial(_made_beforehand, name) for name in names()}}


def by_range(name: str, q, k, v, ranges: KeyRanges) -> tuple[torch.Tensor]:
    """Attention by the backend or peer of this name."""
    with backend.use_backend(name, "attention"):
        return (range_attention(q, k, v, ranges),)


def _made_beforehand(name: str, inputs: Tensors) -> Callable:
    q, k, v, start, end = (inputs[key] for key in ("q", "k", "v", "start", "end"))
    return partial(by_range, name, q, k, v, KeyRanges(start, end))


def masked(q, k, v, mask_BTS) -> tuple[torch.Tensor]:
    """SDPA with the kernel that PyTorch selects; with a mask, keys are repeated for GQA as in transformers."""
    if mask_BTS is None:
        out = F.scaled_dot_product_attention(*_heads_first(q, k, v), enable_gqa=q.shape[2] != k.shape[2])
    else:
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) if q.shape[2] != k.shape[2] else t for t in (k, v))
        out = F.scaled_dot_product_attention(*_heads_first(q, k, v), attn_mask=mask_BTS[:, None])
    return (out.transpose(1, 2),)


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def mask_of(start_BT: torch.Tensor, end_BT: torch.Tensor, keys: int) -> torch.Tensor:
    """[B, T, S] bool: which keys each query sees."""
    key = torch.arange(keys, device=start_BT.device, dtype=start_BT.dtype)
    return (key >= start_BT[..., None]) & (key < end_BT[..., None])


def _sdpa(dense: bool, inputs: Tensors) -> Callable:
    q, k, v, start, end = (inputs[name] for name in ("q", "k", "v", "start", "end"))
    return partial(masked, q, k, v, mask_of(start, end, k.shape[1]) if dense else None)
