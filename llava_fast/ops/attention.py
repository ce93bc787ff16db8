"""Attention over one range of keys per query: out_i = softmax(scale · q_i · K[start_i:end_i]ᵀ) · V[start_i:end_i].

One operation for the vision tower, packed training, padded batches, prefill and decoding; `sequence.py` makes the
ranges. A query with an empty range gets zeros, and gives zero gradients.

Shapes: B batch, T queries, S keys, H query heads, G key heads (H a multiple of G), d head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from llava_fast.backend import choose, register


def attention_reference(
    q_BTHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    start_BT: torch.Tensor,
    end_BT: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Plain PyTorch. On a CPU, samples of a self-attention are sliced out and attended to one by one (or in groups of
    similar length), so neither time nor memory is spent between samples; otherwise one masked SDPA."""
    plan = _sample_plan(start_BT, end_BT, k_BSGd.shape[1])
    if plan is None:
        return _masked_attention(q_BTHd, k_BSGd, v_BSGd, start_BT, end_BT, scale)
    if plan.whole is not None:
        return _sdpa(q_BTHd, k_BSGd, v_BSGd, None, plan.whole == "causal", scale)
    q_RHd, k_RGd, v_RGd = q_BTHd.flatten(0, 1), k_BSGd.flatten(0, 1), v_BSGd.flatten(0, 1)
    out_RHd = torch.zeros_like(q_RHd)
    for group in plan.groups:
        q, k, v = q_RHd[group.rows_NL], k_RGd[group.rows_NL], v_RGd[group.rows_NL]
        out = _sdpa(q, k, v, group.mask_N1LL, group.kind == "causal", scale)
        out_RHd = out_RHd.index_copy(0, group.real_rows, out.flatten(0, 1)[group.real])
    return out_RHd.view_as(q_BTHd)


def attention_weights_reference(
    q_BTHd: torch.Tensor, k_BSGd: torch.Tensor, start_BT: torch.Tensor, end_BT: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, H, T, S] and log-sum-exp [B, H, T], both float32, by the definition. O(T·S) memory."""
    groups = q_BTHd.shape[2] // k_BSGd.shape[2]
    k_BSHd = k_BSGd.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q_BTHd.float(), k_BSHd.float()) * scale
    mask = _mask(start_BT, end_BT, k_BSGd.shape[1])[:, None]
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # An empty range has LSE −inf; its probabilities are zeros, not NaN.
    return torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]), lse


register("attention", "reference", attention_reference)


def attention(
    q_BTHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    start_BT: torch.Tensor,
    end_BT: torch.Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention with one range of visible keys per query.

    Args:
        q_BTHd, k_BSGd, v_BSGd: one floating dtype; the last dimension contiguous, other strides free.
        start_BT, end_BT: int32 [B, T]; query t sees keys start ≤ s < end of its batch row. Along T neither decreases.
        scale: of the scores; 1/sqrt(d) by default.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        [B, T, H, d]; with `return_lse` also float32 [B, H, T], −inf for an empty range.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    batch, tokens, heads, dim = q_BTHd.shape
    if k_BSGd.shape != v_BSGd.shape or k_BSGd.shape[0] != batch or k_BSGd.shape[3] != dim:
        raise ValueError(
            f"attention: q {tuple(q_BTHd.shape)}, k {tuple(k_BSGd.shape)} and v {tuple(v_BSGd.shape)} do not fit"
        )
    if heads % k_BSGd.shape[2]:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {k_BSGd.shape[2]} key heads")
    if start_BT.shape != (batch, tokens) or end_BT.shape != (batch, tokens):
        raise ValueError(
            f"attention: key ranges {tuple(start_BT.shape)} and {tuple(end_BT.shape)}, expected {(batch, tokens)}"
        )
    scale = dim**-0.5 if scale is None else scale
    if tokens == 0 or batch == 0:
        out = torch.zeros_like(q_BTHd)
    else:
        out = choose("attention", q_BTHd, k_BSGd, v_BSGd)(q_BTHd, k_BSGd, v_BSGd, start_BT, end_BT, scale)
    if return_lse:
        return out, attention_weights_reference(q_BTHd, k_BSGd, start_BT, end_BT, scale)[1]
    return out


@dataclass(frozen=True)
class _Group:
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
class _Plan:
    """How to cut a batch into samples. `whole` is set when each batch row is one sample that fills it.

    start, end: the values the plan was made for.
    """

    start: torch.Tensor
    end: torch.Tensor
    keys: int
    whole: str | None
    groups: tuple[_Group, ...]


# Every layer attends by the same two vectors, so the plan of a batch is made once. Keyed by the identity of `start`.
_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _sample_plan(start_BT: torch.Tensor, end_BT: torch.Tensor, keys: int) -> _Plan | None:
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
        plan = _Plan(*ranges, keys, "full", ()) if full else None
    else:
        samples = list(_samples(start_BT, end_BT))
        if not samples or any(sample is None for sample in samples):
            plan = None
        elif len(samples) == batch and {(kind, length) for kind, _, _, length, _ in samples} in (
            {("causal", tokens)},
            {("full", tokens)},
        ):
            plan = _Plan(*ranges, keys, samples[0][0], ())
        else:
            plan = _Plan(*ranges, keys, None, tuple(_groups(samples, tokens)))
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


def _groups(samples: list, tokens: int) -> Iterator[_Group]:
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


def _group(samples: list, tokens: int) -> _Group:
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
    return _Group(kind, rows_NL, mask, real, rows_NL.flatten()[real])


def _masked_attention(
    q_BTHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    start_BT: torch.Tensor,
    end_BT: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    empty_BT = end_BT <= start_BT
    # A row without keys would be 0/0 in the softmax, so it sees all of them and is zeroed afterwards.
    mask = _mask(start_BT, end_BT, k_BSGd.shape[1]) | empty_BT[..., None]
    out = _sdpa(q_BTHd, k_BSGd, v_BSGd, mask[:, None], False, scale)
    return out.masked_fill(empty_BT[..., None, None], 0)


def _mask(start_BT: torch.Tensor, end_BT: torch.Tensor, keys: int) -> torch.Tensor:
    """[B, T, S] bool: which keys each query sees."""
    key_S = torch.arange(keys, device=start_BT.device, dtype=start_BT.dtype)
    return (key_S >= start_BT[..., None]) & (key_S < end_BT[..., None])


def _sdpa(
    q_BTHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q_BTHd.transpose(1, 2),
        k_BSGd.transpose(1, 2),
        v_BSGd.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q_BTHd.shape[2] != k_BSGd.shape[2],
    ).transpose(1, 2)
