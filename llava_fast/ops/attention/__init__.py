"""Attention over one range of keys per query: out_i = softmax(scale · q_i · K[start_i:end_i]ᵀ) · V[start_i:end_i].

One operation for the vision tower, packed training, padded batches, prefill and decoding; `sequence.py` makes the
ranges. A query with an empty range gets zeros, and gives zero gradients.

The kernels are flash attention (Dao 2023): softmax runs online over tiles of keys, scores never leave the chip, and the
backward pass recomputes them from the log-sum-exp (LSE) of each row. Memory is O(T), and no mask is built. A tile of
queries loops over the keys between the smallest start and the largest end of its rows: first the key tiles that all
its rows see, then the others, with a mask. In the backward pass a tile of keys loops over the contiguous run of queries
that see it, for all query heads of its group, so gradients are summed in registers, in a fixed order, without atomics.

Tiles begin at multiples of their height, counted from the first row of a sample, and their loop begins at the first key
or query they see; so a sample's output and gradients are bit-identical wherever it lies in a pack. The grid has
ceil(T / tile height) programs. Each covers a window of that many rows, and processes the tiles that begin in it: one,
or several if samples are short. No list of tiles is built, and no size is read back from the device.

A last tile with few rows wastes work. Of a vision tower's 577 tokens, the tiles of 128 queries × 32 keys that ship for
sm_80 and d 64 compute 640 × 608 scores, so 86 % of the work is of use; dQ's tiles of 128 × 16 compute 640 × 592 (88 %),
those of dK and dV, 16 queries × 128 keys, 592 × 640 (88 %). Smaller tiles for the last rows would save some of this,
but their code takes registers from the main loop, and their loads do not overlap with products.

On a GPU, "auto" hands plain ranges (one causal or full sample per row, packs of these) to PyTorch's own kernels, which
add gradients in no fixed order: see `plain.py`. Under `torch.use_deterministic_algorithms` ours run.

Shapes: B batch, T queries, S keys, H query heads, G key heads (H a multiple of G), d head dimension. Tiles are
[BLOCK_M queries, d] and [BLOCK_N keys, d]. Blocks are powers of two, so a d above 64 that is not one is held in two
blocks, with two products per tile: 72 and 80 as 64 + 16, 96 as 64 + 32, 160 as 128 + 32, 192 as 128 + 64 (a d of 72 in
128 columns would be 1.6 times the products). Other d are padded to the next of 16, 32, 64, 80, 96, 128, 160, 192, 256.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, differentiated, observed, register, requested
from llava_fast.ops._launch import Example, tile_table
from llava_fast.ops._triton import takes
from llava_fast.ops.attention import decode
from llava_fast.ops.attention.backward import launch_dkdv, launch_dq
from llava_fast.ops.attention.decode import decode_attention, takes_decode
from llava_fast.ops.attention.forward import launch_forward
from llava_fast.ops.attention.peers import register_peers
from llava_fast.ops.attention.plain import peer_for
from llava_fast.ops.attention.ranges import KeyRanges
from llava_fast.ops.attention.tiles import MAX_HEAD_DIM, columns

# PyTorch's CPU kernel processes keys in blocks of 512, so at these lengths a causal mask saves little or no work. One
# SDPA call per block of queries, with the keys up to the block's end, takes up to 22 % less time (one thread) or 15 %
# (two), forward and backward; at greater lengths it takes more.
CPU_BLOCKED, CPU_BLOCK = range(257, 769), 192

__all__ = [
    "KeyRanges",
    "attention",
    "attention_reference",
    "attention_weights_reference",
    "attention_with_weights",
    "range_attention",
]


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
    """Attention with one range of visible keys per query. For several layers with the same ranges call
    `range_attention` with one `KeyRanges`, which caches the tensors that are derived from the ranges.

    Args:
        q_BTHd, k_BSGd, v_BSGd: one floating dtype; the last dimension contiguous, other strides free.
        start_BT, end_BT: int32 [B, T]; query t sees keys start ≤ s < end of its batch row. Along T neither decreases.
        scale: of the scores; 1/sqrt(d) by default.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        [B, T, H, d]; with `return_lse` also float32 [B, H, T], −inf for an empty range.

    Raises:
        ValueError: for shapes that do not fit together, or a scale that is not positive.
    """
    out, lse = _checked(q_BTHd, k_BSGd, v_BSGd, KeyRanges(start_BT, end_BT), scale, return_lse)
    return (out, lse) if return_lse else out


def range_attention(
    q_BTHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    ranges: KeyRanges,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """`attention` with a `KeyRanges` object, which caches derived tensors for all calls that share it."""
    return _checked(q_BTHd, k_BSGd, v_BSGd, ranges, scale, False)[0]


def _checked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: KeyRanges, scale: float | None, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the arguments, then run the chosen implementation: the output, and the LSE if asked for."""
    batch, tokens, heads, dim = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if heads % k.shape[2]:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {k.shape[2]} key heads")
    if ranges.shape != (batch, tokens):
        raise ValueError(f"attention: key ranges {tuple(ranges.shape)}, expected {(batch, tokens)}")
    scale = dim**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"attention: scale is {scale}; it must be positive")
    if tokens == 0 or batch == 0:
        # Keys and values stay in the autograd graph, with zero gradients: distributed training waits for these.
        return q + (k.sum() + v.sum()), q.new_zeros(batch, heads, tokens, dtype=torch.float32)
    run = choose("attention", q, k, v)
    if run is _attention_triton and not return_lse and not torch.compiler.is_compiling():
        # A backend that was asked for by name is never replaced.
        run = (peer_for(q, k, v, ranges) if requested("attention") == "auto" else None) or run
    return run(q, k, v, ranges, scale, return_lse)


def attention_reference(
    q_BTHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    ranges: KeyRanges,
    scale: float,
) -> torch.Tensor:
    """Plain PyTorch. Self-attention on a CPU: one SDPA call per sample, or per group of samples of similar length, so
    scores between samples are not computed. Otherwise one SDPA call with a dense mask."""
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


def attention_with_weights(
    q_BTHd: torch.Tensor, k_BSGd: torch.Tensor, v_BSGd: torch.Tensor, ranges: KeyRanges
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, T, H, d], computed from the weights [B, H, T, S] that are returned beside it, so that a loss has
    gradients with respect to them."""
    heads, width = q_BTHd.shape[2:]
    weights = attention_weights_reference(q_BTHd, k_BSGd, ranges, width**-0.5)[0].to(q_BTHd.dtype)
    v_BSHd = v_BSGd.repeat_interleave(heads // v_BSGd.shape[2], dim=2)
    return torch.einsum("bhts,bshd->bthd", weights, v_BSHd), weights


def _masked_attention(
    q_BTHd: torch.Tensor,
    k_BSGd: torch.Tensor,
    v_BSGd: torch.Tensor,
    ranges: KeyRanges,
    scale: float,
) -> torch.Tensor:
    mask_B1TS, empty_BT11 = ranges.derived(_mask_of_sdpa, k_BSGd.shape[1])
    out = _sdpa(q_BTHd, k_BSGd, v_BSGd, mask_B1TS, False, scale)
    return out if empty_BT11 is None else out.masked_fill(empty_BT11, 0)


def _mask_of_sdpa(ranges: KeyRanges, keys: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The mask [B, 1, T, S], and which queries see no keys, [B, T, 1, 1] (None if the host knows that there is none).

    Without keys the softmax would be 0/0, so these queries see all keys, and are to be zeroed afterwards."""
    empty_BT = ranges.end <= ranges.start
    mask_BTS = _mask(ranges, keys)
    if empty_BT.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(empty_BT.any()):
        return mask_BTS[:, None], None
    return (mask_BTS | empty_BT[..., None])[:, None], empty_BT[..., None, None]


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
        outs = []
        for start in range(0, tokens, CPU_BLOCK):
            stop = min(start + CPU_BLOCK, tokens)
            seen = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)
            outs.append(_sdpa(q_BTHd[:, start:stop], k_BSGd[:, :stop], v_BSGd[:, :stop], seen, False, scale))
        return torch.cat(outs, dim=1)
    return F.scaled_dot_product_attention(
        q_BTHd.transpose(1, 2),
        k_BSGd.transpose(1, 2),
        v_BSGd.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q_BTHd.shape[2] != k_BSGd.shape[2],
    ).transpose(1, 2)


@torch.library.custom_op("llava_fast::attention", mutates_args=())
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    first: torch.Tensor,
    keys: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_forward(q, k, v, start, end, first, scale)


@torch.library.custom_op("llava_fast::attention_backward", mutates_args=())
def _attention_backward_op(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    first: torch.Tensor,
    keys: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if dout.stride(3) != 1:  # for instance the gradient of a sum: one number, expanded with stride 0
        dout = dout.contiguous()
    dq, delta = launch_dq(dout, dlse, q, k, v, start, end, first, out, lse, scale)
    return dq, *launch_dkdv(dout, q, k, v, start, end, keys, lse, delta, scale)


@_attention_op.register_fake
def _attention_fake(q, k, v, start, end, first, keys, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@_attention_backward_op.register_fake
def _attention_backward_fake(dout, dlse, q, k, v, start, end, first, keys, out, lse, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):
    q, *rest, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 8
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = torch.ops.llava_fast.attention_backward(dout, dlse, q, *rest, out, lse, ctx.scale)
    return *(g if wanted else None for g, wanted in zip(gradients, ctx.needs_input_grad)), *(None,) * 5


_attention_op.register_autograd(_autograd, setup_context=_setup_context)


def _attention_triton(q, k, v, ranges, scale, return_lse):
    backward = differentiated(q, k, v)
    if not backward and takes_decode(q, k):
        return decode_attention(q, k, v, ranges, scale)
    if not observed(q, k, v):
        return launch_forward(q, k, v, ranges.start, ranges.end, ranges.first_BT, scale)
    seen_by = ranges.seen_by(k.shape[1]) if backward else None
    return torch.ops.llava_fast.attention(q, k, v, ranges.start, ranges.end, ranges.first_BT, seen_by, scale)


def _attention_plain(q, k, v, ranges, scale, return_lse):
    out = attention_reference(q, k, v, ranges, scale)
    return out, attention_weights_reference(q, k, ranges, scale)[1] if return_lse else None


def _supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool | str:
    if not q.dtype == k.dtype == v.dtype:
        return f"q is {q.dtype}, k {k.dtype}, v {v.dtype}"
    if q.numel() // q.shape[-1] >= 2**31:
        return f"{q.numel() // q.shape[-1]} rows of all heads are not counted in 31 bits"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {q.shape[-1]} is over {MAX_HEAD_DIM}"
    if q.shape[-1] > 1 and not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return "the last dimension is not contiguous"
    return takes(q, k, v)


register("attention", "reference", _attention_plain)
register("attention", "triton", _attention_triton, _supports)
register_peers()


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """Timed by the tuner: LLaVA's tower (16 heads of dimension 64, 577 tokens that all see each other) and a pack of
    its samples (32 heads of dimension 128, causal, 832 tokens). Compiled only: every head dimension that fills a tile,
    and 72, which vision towers have, with half as many key heads. float16 is left out: it compiles as bfloat16."""
    large, single = device.type != "cpu", dtype == torch.float32
    keys = [key for key in tile_table("attention_fwd")["sm_80"]["tiles"] if not key.endswith("fp32")]
    timed = {64: (16, 577, 16), 128: (5, 832, 32)} if large else {64: (1, 33, 2), 128: (2, 20, 2)}
    for dim in () if dtype == torch.float16 else (72, *map(int, keys)):
        samples, tokens, heads = timed.get(dim, (2, 832, 16) if large else (1, 20, 2))
        key = f"{columns(dim)}{' fp32' if single else ''}"
        index = torch.arange(samples * tokens, device=device, dtype=torch.int32)[None]
        start = index // tokens * tokens
        end = start + tokens if dim == 64 else index + 1
        q, k, v, out, dout = torch.randn(5, 1, samples * tokens, heads, dim, device=device).to(dtype)
        # For normally distributed scores the LSE is about log(number of keys) + ½; the time does not depend on it.
        lse = ((end - start).log() + 0.5).expand(1, heads, -1).contiguous()
        ranges, scale = KeyRanges(start, end), dim**-0.5
        heights, widths = ((16, 32), (16, 32, 64)) if single else ((64, 128), (32, 64, 128))
        tiles = [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
            for m in heights
            for n in widths
            for warps in (4, 8)
            for stages in (2, 3)
            # float32 accumulators and scores per thread decide whether a tile spills; a warp needs at least 16 rows.
            if m * (dim + n) // (32 * warps) <= 160 and (m >= 16 * warps or single)
        ]
        for key_heads in (heads, heads // 2) if dim in timed else (heads // 2,):
            tensors = q, k[:, :, :key_heads], v[:, :, :key_heads], start, end
            offered = tiles if key_heads == heads else []
            yield Example("attention_fwd", key, partial(launch_forward, *tensors, ranges.first_BT, scale), offered)
            dq = partial(launch_dq, dout, None, *tensors, ranges.first_BT, out, lse, scale)
            yield Example("attention_bwd_dq", key, dq, offered)
            dkdv = partial(launch_dkdv, dout, *tensors, ranges.seen_by(samples * tokens), lse, lse, scale)
            turned = [{**t, "BLOCK_M": t["BLOCK_N"], "BLOCK_N": t["BLOCK_M"]} for t in offered]
            yield Example("attention_bwd_dkdv", key, dkdv, turned)
    yield from decode.examples(device, dtype)
