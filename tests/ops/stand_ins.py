"""Stand-ins for attention libraries that need a GPU: their signatures, computed by the definition on any machine.

Each computes from exactly the arguments it is given, checks what the library would insist on, and records the call.
"""

from types import SimpleNamespace
from typing import Any

import torch


def by_definition(
    q_qHd: torch.Tensor, k_kGd: torch.Tensor, v_kGd: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample: out [queries, H, d] and LSE [H, queries]; causal from the bottom right."""
    group = q_qHd.shape[1] // k_kGd.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k_kGd, v_kGd))
    scores = torch.einsum("qhd,khd->hqk", q_qHd, k) * scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + k.shape[0] - q_qHd.shape[0])
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).float()


class Recorder:
    """What FlashAttention computes of packs and of caches, and the arguments it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def packed(self, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
        for x in (q, k, v):
            assert x.dim() == 3 and x.stride(2) == 1
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
        queries, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
        assert (sum(queries), sum(keys), sum(keys)) == (len(q), len(k), len(v))
        assert (max_q, max_k) == (max(queries), max(keys)) and isinstance(max_q, int) and isinstance(max_k, int)
        self.calls.append({"queries": queries, "keys": keys, "causal": causal, "scale": scale, "q": q, "k": k})
        parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        outs, lses = zip(*(by_definition(*part, scale, causal) for part in parts))
        return torch.cat(outs), torch.cat(lses, 1)

    def cached(self, q, k, v, lengths_B, leftpad_B, scale, causal):
        assert not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v))
        first_B = torch.zeros_like(lengths_B) if leftpad_B is None else leftpad_B
        for x in (lengths_B, first_B):
            assert x.dtype == torch.int32 and x.is_contiguous()
        lengths, first = lengths_B.tolist(), first_B.tolist()
        leftpad = None if leftpad_B is None else first
        self.calls.append({"lengths": lengths, "leftpad": leftpad, "causal": causal, "scale": scale, "k": k})
        cuts = [slice(*cut) for cut in zip(first, lengths)]
        parts = [by_definition(q[b], k[b, cut], v[b, cut], scale, causal) for b, cut in enumerate(cuts)]
        return tuple(torch.stack(x) for x in zip(*parts))


def flash_attn_2(recorder: Recorder) -> dict[str, Any]:
    """Signatures of flash-attn 2.8."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert (dropout_p, window_size, softcap, alibi_slopes, block_table) == (0.0, (-1, -1), 0.0, None, None)
        sums = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = recorder.packed(q, k, v, *sums, softmax_scale, causal)
        return (out, lse, None) if return_attn_probs else out

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        assert (k, v, rotary_cos, rotary_sin, cache_batch_idx, block_table) == (None,) * 6
        out, lse = recorder.cached(q, k_cache, v_cache, cache_seqlens, cache_leftpad, softmax_scale, causal)
        return (out, lse) if return_softmax_lse else out

    return {"flash_attn_varlen_func": flash_attn_varlen_func, "flash_attn_with_kvcache": flash_attn_with_kvcache}


def flash_attn_3(recorder: Recorder) -> dict[str, Any]:
    """Signatures of FlashAttention-3's flash_attn_interface (tokenspeed-fa3 3.0.0)."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False, sinks=None,
    ):  # fmt: skip
        assert (seqused_q, seqused_k, qv, window_size, softcap, sinks) == (None, None, None, (-1, -1), 0.0, None)
        sums = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = recorder.packed(q, k, v, *sums, softmax_scale, causal)
        return (out, lse) if return_attn_probs else out

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False, sinks=None,
    ):  # fmt: skip
        assert (k, v, qv, rotary_cos, rotary_sin, page_table, cu_seqlens_q) == (None,) * 7
        out, lse = recorder.cached(q, k_cache, v_cache, cache_seqlens, cache_leftpad, softmax_scale, causal)
        return (out, lse) if return_softmax_lse else out

    return {"flash_attn_varlen_func": flash_attn_varlen_func, "flash_attn_with_kvcache": flash_attn_with_kvcache}


def torch_varlen(recorder: Recorder) -> dict[str, Any]:
    """Signature of PyTorch 2.13."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert enable_gqa == (query.shape[1] != key.shape[1])
        assert window_size in ((-1, -1), (-1, 0)) and (seqused_k, block_table, num_splits) == (None,) * 3
        sums = cu_seq_q, cu_seq_k, max_q, max_k
        out, lse = recorder.packed(query, key, value, *sums, scale, window_size == (-1, 0))
        return (out, lse) if return_aux is not None and return_aux.lse else out

    return {"varlen_attn": varlen_attn}


class BlockDiagonalMask:
    """Of xformers 0.0.35, as far as it goes here: lengths of samples, from which `memory_efficient_attention` cuts."""

    causal = False

    def __init__(self, queries, keys, padding=None):
        self.queries, self.keys, self.padding = list(queries), list(keys), padding

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert device is not None
        return cls(q_seqlen, kv_seqlen)

    def make_causal_from_bottomright(self):
        mask = BlockDiagonalMask(self.queries, self.keys)
        mask.causal = True
        return mask


class BlockDiagonalPaddedKeysMask(BlockDiagonalMask):
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_padding, kv_seqlen, causal_diagonal=None, *, device=None):
        assert device is not None and causal_diagonal is None
        return cls(q_seqlen, kv_seqlen, kv_padding)


class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    causal = True


class LowerTriangularFromBottomRightMask:
    causal = True


def xformers(recorder: Recorder) -> dict[str, Any]:
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        if query.dim() == 5:  # [B, M, G, H / G, d], keys expanded over the group; its backward does not take it
            assert not query.requires_grad and key.stride(3) == value.stride(3) == 0
            query, key, value = query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
        else:
            assert query.shape[2] == key.shape[2] == value.shape[2]
        causal = attn_bias is not None and attn_bias.causal
        kind = type(attn_bias).__name__
        if not isinstance(attn_bias, BlockDiagonalMask):
            assert len(query) == len(key)
            recorder.calls.append({"mask": kind, "scale": scale, "k": key})
            return torch.stack([by_definition(*part, scale, causal)[0] for part in zip(query, key, value)])
        queries, keys = attn_bias.queries, attn_bias.keys
        slots = keys if attn_bias.padding is None else [attn_bias.padding] * len(keys)
        assert (query.shape[:2], key.shape[:2]) == ((1, sum(queries)), (1, sum(slots)))
        recorder.calls.append({"mask": kind, "queries": queries, "keys": keys, "scale": scale, "causal": causal})
        parts = zip(query[0].split(queries), key[0].split(slots), value[0].split(slots), keys, strict=True)
        return torch.cat([by_definition(q, k[:n], v[:n], scale, causal)[0] for q, k, v, n in parts])[None]

    masks = (
        BlockDiagonalMask,
        BlockDiagonalPaddedKeysMask,
        BlockDiagonalCausalWithOffsetPaddedKeysMask,
        LowerTriangularFromBottomRightMask,
    )
    bias = SimpleNamespace(**{mask.__name__: mask for mask in masks})
    return {"memory_efficient_attention": memory_efficient_attention, "fmha": SimpleNamespace(attn_bias=bias)}


# name of the peer -> the module that is stood in for, and its functions
STAND_INS = {
    "flash_attn": ("flash_attn", flash_attn_2),
    "flash_attn_3": ("flash_attn_interface", flash_attn_3),
    "varlen": ("torch.nn.attention.varlen", torch_varlen),
    "xformers": ("xformers.ops", xformers),
}
