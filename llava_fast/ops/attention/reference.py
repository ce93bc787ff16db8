"""Attention in plain PyTorch: what runs on a CPU, and what kernels and other libraries are compared with."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llava_fast.ops.attention.ranges import KeyRanges

# PyTorch's CPU kernel walks keys in steps of 512, so at these lengths a causal mask saves it little or nothing. Blocks
# of queries that are given the keys up to their end take up to 22 % less time (one thread) or 15 % (two), forward and
# backward; beyond these lengths they take more.
CPU_BLOCKED, CPU_BLOCK = range(257, 769), 192


def attention_reference(
    q_BTHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    ranges: KeyRanges,
    scale: float,
) -> torch.Tensor:
    """Plain PyTorch. On a CPU, samples of a self-attention are sliced out and attended to one by one (or in groups of
    similar length), so neither time nor memory is spent between samples; otherwise one masked SDPA."""
    cut = ranges.groups(k_BSGd.shape[1])
    if cut is None:
        return _masked_attention(q_BTHd, k_BSGd, v_BSGd, ranges, scale)
    if cut.whole is not None:
        return _sdpa(q_BTHd, k_BSGd, v_BSGd, None, cut.whole == "causal", scale)
    q_RHd, k_RGd, v_RGd = q_BTHd.flatten(0, 1), k_BSGd.flatten(0, 1), v_BSGd.flatten(0, 1)
    out_RHd = torch.zeros_like(q_RHd)
    for group in cut.groups:
        q, k, v = q_RHd[group.rows_NL], k_RGd[group.rows_NL], v_RGd[group.rows_NL]
        out = _sdpa(q, k, v, group.mask_N1LL, group.kind == "causal", scale)
        out_RHd = out_RHd.index_copy(0, group.real_rows, out.flatten(0, 1)[group.real])
    return out_RHd.view_as(q_BTHd)


def attention_weights_reference(
    q_BTHd: torch.Tensor, k_BSGd: torch.Tensor, ranges: KeyRanges, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, H, T, S] and log-sum-exp [B, H, T], at least float32, by the definition. O(T·S) memory."""
    groups = q_BTHd.shape[2] // k_BSGd.shape[2]
    k_BSHd = k_BSGd.repeat_interleave(groups, dim=2)
    wide = torch.promote_types(q_BTHd.dtype, torch.float32)
    scores = torch.einsum("bthd,bshd->bhts", q_BTHd.to(wide), k_BSHd.to(wide)) * scale
    mask = _mask(ranges, k_BSGd.shape[1])[:, None]
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # An empty range has LSE −inf; its probabilities are zeros, not NaN.
    return torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]), lse


def _masked_attention(
    q_BTHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    ranges: KeyRanges,
    scale: float,
) -> torch.Tensor:
    empty_BT = ranges.end <= ranges.start
    # A row without keys would be 0/0 in the softmax, so it sees all of them and is zeroed afterwards.
    mask = _mask(ranges, k_BSGd.shape[1]) | empty_BT[..., None]
    out = _sdpa(q_BTHd, k_BSGd, v_BSGd, mask[:, None], False, scale)
    return out.masked_fill(empty_BT[..., None, None], 0)


def _mask(ranges: KeyRanges, keys: int) -> torch.Tensor:
    """[B, T, S] bool: which keys each query sees."""
    key_S = torch.arange(keys, device=ranges.start.device, dtype=torch.int32)
    return (key_S >= ranges.start[..., None]) & (key_S < ranges.end[..., None])


def _sdpa(
    q_BTHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    tokens = q_BTHd.shape[1]
    if causal and q_BTHd.device.type == "cpu" and not torch.compiler.is_compiling() and tokens in CPU_BLOCKED:
        parts = []
        for start in range(0, tokens, CPU_BLOCK):
            stop = min(start + CPU_BLOCK, tokens)
            seen = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)
            parts.append(_sdpa(q_BTHd[:, start:stop], k_BSGd[:, :stop], v_BSGd[:, :stop], seen, False, scale))
        return torch.cat(parts, dim=1)
    return F.scaled_dot_product_attention(
        q_BTHd.transpose(1, 2),
        k_BSGd.transpose(1, 2),
        v_BSGd.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q_BTHd.shape[2] != k_BSGd.shape[2],
    ).transpose(1, 2)
