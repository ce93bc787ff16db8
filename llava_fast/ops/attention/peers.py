"""Attention by other libraries under the interface of `attention`: for comparison, and for use where one is faster.

    with use_backend("flash_attn", "attention"):
        out = attention(q, k, v, start, end)

A peer is imported at its first use, and runs only if it is requested by name, or by `plain.py`, which gives plain
ranges on a GPU to PyTorch's own kernels. It supports backward where its library does; else `BackendUnavailable` gives
the reason in a line. Key ranges that each peer supports, for q [B, T, H, d]:

    name            library                                 ranges
    sdpa_flash      PyTorch's SDPA, its flash kernel        samples of equal lengths: one per batch row, all with the
                                                            same keys, or a pack without padding between them
    sdpa_cudnn      PyTorch's SDPA, cuDNN's kernel          the same
    varlen          torch.nn.attention.varlen               packs and padding: all samples causal, or all full
    flash_attn      FlashAttention-2                        the same, and a cache (forward only)
    flash_attn_3    FlashAttention-3 (Hopper)               the same
    xformers        memory_efficient_attention              the same
    flex            FlexAttention                           any

Causal: the last query of a sample sees all its keys, and each query sees one key fewer than the next query. Full: all
queries see all keys. Only FlexAttention can express a causal sample with images that see themselves.

These libraries need sample lengths on the host. If the `KeyRanges` does not know them, the first call synchronises with
the device; the lengths are cached in that object, and later calls (other layers) do not. Under torch.compile a peer is
a graph break.

Shapes: B batch, T queries, S keys, H query heads, G key heads, d head dimension; N samples, R rows of all batch rows.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial, wraps
from typing import Any

import torch
from torch.backends import cuda
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from llava_fast.backend import BackendUnavailable, register_peer
from llava_fast.ops.attention.ranges import KeyRanges
from llava_fast.ops.attention.tiles import MAX_HEAD_DIM

Result = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Samples:
    """Key ranges as samples: runs of queries of a batch row whose ranges begin at the same key.

    causal, full: whether all samples are causal (full) and share no keys; a sample of one query is both.
    queries_N, keys_N: queries and keys of each sample.
    query_rows, key_rows: the flat rows b · T + t and b · S + s of all samples, in order; None if these are all rows.
    row_keys: if each batch row is one sample of all its T queries: per batch row its first key and one past its last.
    """

    causal: bool
    full: bool
    queries_N: tuple[int, ...]
    keys_N: tuple[int, ...]
    query_rows: torch.Tensor | None
    key_rows: torch.Tensor | None
    row_keys: tuple[tuple[int, int], ...] | None

    @cached_property
    def common_keys(self) -> slice | None:
        """The keys of every batch row, if each batch row is one sample and all have the same keys."""
        return slice(*self.row_keys[0]) if self.row_keys and len(set(self.row_keys)) == 1 else None

    @cached_property
    def equal(self) -> bool:
        """Whether samples have equal lengths and no gaps between them, so that a view turns the pack into a batch."""
        apart = self.query_rows is None and self.key_rows is None
        return apart and len(set(self.queries_N)) == 1 and len(set(self.keys_N)) == 1


def samples_of(ranges: KeyRanges, keys: int) -> Samples:
    if ranges.kind is not None and ranges.keys == keys:
        return _known_samples(ranges, keys)
    batch, tokens = ranges.shape
    start, end = torch.stack((ranges.start, ranges.end)).to("cpu", torch.int64)  # the only synchronisation
    real = end > start
    opens = real.clone()
    opens[:, 1:] &= ~real[:, :-1] | (start[:, 1:] != start[:, :-1])
    row_R = real.flatten().nonzero().flatten()
    start_R, end_R, opens_R = (x.flatten()[row_R] for x in (start, end, opens))
    begins_N = opens_R.nonzero().flatten()
    queries_N = torch.diff(begins_N, append=torch.tensor([len(row_R)]))
    last_N = begins_N + queries_N - 1
    keys_N = end_R[last_N] - start_R[begins_N]
    first_key_N = row_R[begins_N] // max(1, tokens) * keys + start_R[begins_N]
    apart = bool((first_key_N[1:] >= (first_key_N + keys_N)[:-1]).all())
    last_end_R, last_R = (x.repeat_interleave(queries_N) for x in (end_R[last_N], last_N))
    key_rows = (first_key_N - (keys_N.cumsum(0) - keys_N)).repeat_interleave(keys_N) if apart else first_key_N[:0]
    key_rows += torch.arange(len(key_rows))
    one_per_row = len(queries_N) == batch and bool((queries_N == tokens).all())

    def unless_all(rows: torch.Tensor, count: int) -> torch.Tensor | None:
        return None if torch.equal(rows, torch.arange(count)) else rows.to(ranges.start.device)

    return Samples(
        causal=apart and torch.equal(end_R, last_end_R - (last_R - torch.arange(len(row_R)))),
        full=apart and torch.equal(end_R, last_end_R),
        queries_N=tuple(queries_N.tolist()),
        keys_N=tuple(keys_N.tolist()),
        query_rows=unless_all(row_R, batch * tokens),
        key_rows=unless_all(key_rows, batch * keys),
        row_keys=tuple(zip(start[:, 0].tolist(), end[:, -1].tolist())) if one_per_row else None,
    )


def _known_samples(ranges: KeyRanges, keys: int) -> Samples:
    """The samples of ranges whose kind the host knows; nothing is read from the device."""
    batch, tokens = ranges.shape
    queries_N = ranges.lengths or (tokens,) * batch
    one_each = max(queries_N) == 1
    return Samples(
        causal=ranges.kind == "causal" or one_each,
        full=ranges.kind == "full" or one_each,
        queries_N=queries_N,
        keys_N=ranges.lengths or (keys,) * batch,
        query_rows=None,
        key_rows=None,
        row_keys=((0, keys),) * batch if ranges.lengths is None else None,
    )


def running_sums(ranges: KeyRanges, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [N + 1] on the device: the running sums of the samples' queries, and of their keys."""
    device, samples = ranges.start.device, ranges.derived(samples_of, keys)
    if ranges.kind is None or ranges.keys != keys:
        queries, keys_ = (F.pad(torch.tensor(n_N).cumsum(0), (1, 0)) for n_N in (samples.queries_N, samples.keys_N))
        return queries.to(device, torch.int32), keys_.to(device, torch.int32)
    if ranges.lengths is None:  # equal lengths
        queries, keys_ = (
            torch.arange(0, sum(n_N) + 1, n_N[0], dtype=torch.int32, device=device)
            for n_N in (samples.queries_N, samples.keys_N)
        )
        return queries, keys_
    # A copy from the host would synchronise; the starts of the samples are on the device already.
    start_T = ranges.start[0]
    sample_T = F.pad(start_T[1:] != start_T[:-1], (1, 0)).cumsum(0)
    sums = start_T.new_full((len(ranges.lengths) + 1,), len(start_T)).scatter(0, sample_T, start_T)
    return sums, sums


def _refuse(name: str, reason: str) -> BackendUnavailable:
    return BackendUnavailable(f"backend {name!r} was asked for, but cannot run 'attention': {reason}")


def _uniform(name: str, ranges: KeyRanges, keys: int) -> Samples:
    """The samples, if all are causal or all are full; raises `BackendUnavailable` otherwise."""
    samples = ranges.derived(samples_of, keys)
    if not (samples.causal or samples.full):
        raise _refuse(name, "a sample is neither causal nor full (images that see themselves, a window), or kinds mix")
    return samples


def _first_keys(samples: Samples, q: torch.Tensor, k: torch.Tensor) -> list[int] | None:
    """The first key of each batch row, if each is one sample with more keys than queries (a KV cache); else None."""
    cached = samples.row_keys is not None and q.shape[1] < k.shape[1]
    return [first for first, _ in samples.row_keys or ()] if cached else None


def _wants_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _rows(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Select rows: [B, tokens, heads, d] to [rows, heads, d]; a view if all rows are selected and strides allow it."""
    return x.flatten(0, 1) if rows is None else x.flatten(0, 1).index_select(0, rows)


def _put_back(out: torch.Tensor, lse_HR: torch.Tensor | None, rows: torch.Tensor | None, q: torch.Tensor) -> Result:
    """Scatter [rows, H, d] and [H, rows] to [B, T, H, d] and [B, H, T]; other queries get zeros and LSE −inf."""
    batch, tokens, heads, _ = q.shape
    if rows is not None:
        out = out.new_zeros(batch * tokens, *out.shape[1:]).index_copy(0, rows, out)
    if lse_HR is not None:
        if rows is not None:
            everywhere = lse_HR.new_full((heads, batch * tokens), float("-inf"))
            lse_HR = everywhere.index_copy(1, rows, lse_HR)
        lse_HR = lse_HR.view(heads, batch, tokens).transpose(0, 1).contiguous()
    return out.view(q.shape), lse_HR


def _nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, return_lse: bool) -> Result:
    """The result if no query sees a key: zeros, with zero gradients."""
    out = q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0) + k[:, :0].sum() + v[:, :0].sum()
    batch, tokens, heads, _ = q.shape
    return out, q.new_full((batch, heads, tokens), float("-inf"), dtype=torch.float32) if return_lse else None


# ---- the peers: fn(q, k, v, ranges, scale, return_lse) -> out, LSE or None


# Per SDPA kernel: is it allowed; allow it or not.
_ALLOWED = {
    SDPBackend.FLASH_ATTENTION: (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    SDPBackend.CUDNN_ATTENTION: (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    SDPBackend.EFFICIENT_ATTENTION: (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    SDPBackend.MATH: (cuda.math_sdp_enabled, cuda.enable_math_sdp),
}


class only:
    """`torch.nn.attention.sdpa_kernel` for one kernel; that takes longer on the host than SDPA itself."""

    def __init__(self, kernel: SDPBackend):
        self.kernel = kernel

    def __enter__(self) -> None:
        self.before = [(allow, allowed()) for allowed, allow in _ALLOWED.values()]
        for kernel, (_, allow) in _ALLOWED.items():
            allow(kernel is self.kernel)

    def __exit__(self, *_: Any) -> None:
        for allow, before in self.before:
            allow(before)


def _sdpa_flash(*call: Any) -> Result:
    return _sdpa("sdpa_flash", SDPBackend.FLASH_ATTENTION, *call)


def _sdpa_cudnn(*call: Any) -> Result:
    return _sdpa("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION, *call)


def _sdpa(name: str, kernel: SDPBackend, q, k, v, ranges, scale, return_lse) -> Result:
    samples = _uniform(name, ranges, k.shape[1])
    if return_lse:
        raise _refuse(name, "PyTorch's SDPA does not return its LSE")
    shape = q.shape
    seen = samples.common_keys
    if seen is not None:
        k, v = (k, v) if seen == slice(0, k.shape[1]) else (k[:, seen], v[:, seen])
    elif samples.equal:
        q, k, v = (x.flatten(0, 1).unflatten(0, (len(samples.queries_N), -1)) for x in (q, k, v))
    else:
        raise _refuse(name, "samples of different lengths, padding and keys that differ by batch row need a dense mask")
    # SDPA's causal mask is aligned to the first key, ours to the last: they agree only for equal lengths.
    if not samples.full and q.shape[1] != k.shape[1]:
        raise _refuse(name, f"causal with {q.shape[1]} queries and {k.shape[1]} keys")
    with only(kernel):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=not samples.full,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return out.transpose(1, 2).reshape(shape), None


def _varlen(name: str, call: Callable[..., Any], q, k, v, ranges, scale, return_lse) -> Result:
    """Call FlashAttention's interface for packs (varlen): the rows of all samples, one after the other."""
    samples = _uniform(name, ranges, k.shape[1])
    if return_lse and _wants_gradient(q, k, v):
        raise _refuse(name, "its LSE has no gradient")
    if not samples.queries_N:
        return _nothing(q, k, v, return_lse)
    out, lse_HR = call(
        _rows(q, samples.query_rows),
        _rows(k, samples.key_rows),
        _rows(v, samples.key_rows),
        *ranges.derived(running_sums, k.shape[1]),
        max(samples.queries_N),
        max(samples.keys_N),
        scale,
        not samples.full,
    )
    return _put_back(out, lse_HR if return_lse else None, samples.query_rows, q)


def _torch_varlen(q, k, v, ranges, scale, return_lse) -> Result:
    library = importlib.import_module("torch.nn.attention.varlen")

    def call(q, k, v, cu_queries, cu_keys, max_queries, max_keys, scale, causal):
        return library.varlen_attn(
            *(q, k, v, cu_queries, cu_keys, max_queries, max_keys),
            return_aux=library.AuxRequest(lse=True),
            scale=scale,
            window_size=(-1, 0) if causal else (-1, -1),
            **({"enable_gqa": True} if q.shape[1] != k.shape[1] else {}),  # PyTorch 2.11 has no such argument
        )

    return _varlen("varlen", call, q, k, v, ranges, scale, return_lse)


def _flash_attn_2(*call: Any) -> Result:
    return _flash_attn("flash_attn", "flash_attn", *call)


def _flash_attn_3(*call: Any) -> Result:
    return _flash_attn("flash_attn_3", "flash_attn_interface", *call)


def _flash_attn(name: str, module: str, q, k, v, ranges, scale, return_lse) -> Result:
    """FlashAttention-2 and -3, whose interfaces are equal for the arguments used here."""
    library = importlib.import_module(module)
    samples = _uniform(name, ranges, k.shape[1])
    first_keys = _first_keys(samples, q, k)
    if first_keys is not None and not _wants_gradient(q, k, v):
        out, lse = library.flash_attn_with_kvcache(
            *(q, k, v),
            cache_seqlens=ranges.end[:, -1].contiguous(),
            cache_leftpad=ranges.start[:, 0].contiguous() if any(first_keys) else None,
            softmax_scale=scale,
            causal=not samples.full,
            return_softmax_lse=True,
        )
        return out, lse if return_lse else None

    def call(q, k, v, cu_queries, cu_keys, max_queries, max_keys, scale, causal):
        return library.flash_attn_varlen_func(
            *(q, k, v, cu_queries, cu_keys, max_queries, max_keys),
            softmax_scale=scale,
            causal=causal,
            return_attn_probs=True,  # FlashAttention-2 returns a third value, empty without dropout
        )[:2]

    return _varlen(name, call, q, k, v, ranges, scale, return_lse)


def _xformers(q, k, v, ranges, scale, return_lse) -> Result:
    library = importlib.import_module("xformers.ops")
    samples = _uniform("xformers", ranges, k.shape[1])
    if return_lse:
        raise _refuse("xformers", "memory_efficient_attention does not return its LSE")
    if not samples.queries_N:
        return _nothing(q, k, v, return_lse)
    backward, rows, group = _wants_gradient(q, k, v), None, q.shape[2] // k.shape[2]
    first_keys = _first_keys(samples, q, k)
    x = q
    if samples.common_keys is not None:
        k, v = k[:, samples.common_keys], v[:, samples.common_keys]
        mask = None if samples.full else library.fmha.attn_bias.LowerTriangularFromBottomRightMask()
    elif first_keys is not None and not backward and not any(first_keys):
        mask = ranges.derived(_padded_keys_mask, k.shape[1])
        x, k, v = (_rows(t, None)[None] for t in (q, k, v))
    else:
        rows, mask = samples.query_rows, ranges.derived(_block_diagonal_mask, k.shape[1])
        x, k, v = _rows(q, rows)[None], *(_rows(t, samples.key_rows)[None] for t in (k, v))
    if group > 1 and backward:  # its backward does not support grouped heads
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    elif group > 1:
        x = x.unflatten(2, (-1, group))
        k, v = (t.unsqueeze(3).expand(*t.shape[:3], group, t.shape[3]) for t in (k, v))
    out = library.memory_efficient_attention(x, k, v, attn_bias=mask, scale=scale)
    return _put_back(out.reshape(-1, *q.shape[2:]), None, rows, q)


def _block_diagonal_mask(ranges: KeyRanges, keys: int) -> Any:
    masks = importlib.import_module("xformers.ops").fmha.attn_bias
    samples = ranges.derived(samples_of, keys)
    mask = masks.BlockDiagonalMask.from_seqlens(samples.queries_N, samples.keys_N, device=ranges.start.device)
    return mask if samples.full else mask.make_causal_from_bottomright()


def _padded_keys_mask(ranges: KeyRanges, keys: int) -> Any:
    masks = importlib.import_module("xformers.ops").fmha.attn_bias
    samples = ranges.derived(samples_of, keys)
    kind = masks.BlockDiagonalPaddedKeysMask if samples.full else masks.BlockDiagonalCausalWithOffsetPaddedKeysMask
    return kind.from_seqlens(samples.queries_N, keys, samples.keys_N, device=ranges.start.device)


def _block_mask(ranges: KeyRanges, keys: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    start, end = ranges.start, ranges.end

    def sees(b, h, query, key):
        return (key >= start[b, query]) & (key < end[b, query])

    make = _compiled(create_block_mask) if _on_gpu(start) else create_block_mask
    return make(sees, start.shape[0], None, start.shape[1], keys, device=start.device)


@cache
def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fn)


def _flex(q, k, v, ranges, scale, return_lse) -> Result:
    library = importlib.import_module("torch.nn.attention.flex_attention")
    if not _on_gpu(q) and _wants_gradient(q, k, v):
        raise _refuse("flex", f"FlexAttention has no backward on {q.device.type}")
    wanted: dict[str, Any] = {}
    if return_lse:  # PyTorch before 2.9 has another argument
        wanted = (
            {"return_aux": library.AuxRequest(lse=True)} if hasattr(library, "AuxRequest") else {"return_lse": True}
        )
    found = (_compiled(library.flex_attention) if _on_gpu(q) else library.flex_attention)(
        *(x.transpose(1, 2) for x in (q, k, v)),
        block_mask=ranges.derived(_block_mask, k.shape[1]),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        **wanted,
    )
    out, lse = found if return_lse else (found, None)
    return out.transpose(1, 2), lse if lse is None or isinstance(lse, torch.Tensor) else lse.lse


# ---- which tensors each peer supports: True, or one line saying why not


def _same_dtype(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool | str:
    return True if q.dtype == k.dtype == v.dtype else f"q is {q.dtype}, k {k.dtype}, v {v.dtype}"


def _tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool | str:
    """The libraries' kernels need 16-bit floats on a GPU."""
    if not _on_gpu(q):
        return f"the tensors are on {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype} is not one of float16, bfloat16"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {q.shape[-1]} is over {MAX_HEAD_DIM}"
    return _same_dtype(q, k, v)


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def _tensors_of_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool | str:
    answer = _tensors(q, k, v)
    if answer is True and q.shape[-1] % 8:
        return f"head dimension {q.shape[-1]} is not a multiple of 8"
    if answer is True and q.shape[2] != k.shape[2] and "enable_gqa" not in _arguments_of_varlen():
        return f"varlen_attn of PyTorch {torch.__version__} takes no grouped heads"
    return answer


def _arguments_of_varlen() -> Any:
    return inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn).parameters


def _tensors_of_sdpa_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool | str:
    if not _on_gpu(q):  # PyTorch has a flash kernel for CPUs too
        return _same_dtype(q, k, v)
    return _tensors_of_sdpa(SDPBackend.FLASH_ATTENTION, torch.backends.cuda.can_use_flash_attention, q, k, v)


def _tensors_of_sdpa_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool | str:
    return _tensors_of_sdpa(SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.can_use_cudnn_attention, q, k, v)


def _tensors_of_sdpa(kernel: SDPBackend, can_use: Callable[[Any], bool], q, k, v) -> bool | str:
    answer = _tensors(q, k, v)
    if answer is not True:
        return answer
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # No mask, no dropout, not causal; the last says whether heads are grouped.
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, q.shape[1] != k.shape[1])
    with only(kernel):
        can = can_use(parameters)
    return can or "PyTorch has no such kernel for these tensors on this GPU"


def _missing(module: str, package: str, capability: int = 0) -> str:
    """Why the peer cannot run here: its module is not installed, or there is no GPU of that compute capability. The
    module is located, not imported."""
    if module not in sys.modules and importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if capability and torch.cuda.get_device_capability()[0] != capability:
        return f"it needs a GPU of compute capability {capability}.x"
    return ""


def _missing_varlen() -> str:
    module = "torch.nn.attention.varlen"
    missing = _missing(module, f"a PyTorch with {module}")
    if not missing and torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or above"
    if missing or "window_size" in _arguments_of_varlen():
        return missing
    return f"varlen_attn of PyTorch {torch.__version__} takes no window_size, by which causal is said"


def _untraced(fn: Callable[..., Result]) -> Callable[..., Result]:
    """`fn` as a graph break for torch.compile, since it reads lengths on the host and caches them."""

    @wraps(fn)
    def call(*arguments: Any) -> Result:
        # `torch.compiler.disable` as a decorator would import torch._dynamo together with this file.
        return torch.compiler.disable(fn)(*arguments) if torch.compiler.is_compiling() else fn(*arguments)

    return call


def register_peers() -> None:
    """Register the peers for `use_backend(name, "attention")`, without importing them."""
    for name, fn, supports, missing in (
        ("sdpa_flash", _sdpa_flash, _tensors_of_sdpa_flash, str),
        ("sdpa_cudnn", _sdpa_cudnn, _tensors_of_sdpa_cudnn, partial(_missing, "torch", "PyTorch")),
        ("varlen", _torch_varlen, _tensors_of_varlen, _missing_varlen),
        ("flash_attn", _flash_attn_2, _tensors, partial(_missing, "flash_attn", "flash-attn")),
        ("flash_attn_3", _flash_attn_3, _tensors, partial(_missing, "flash_attn_interface", "FlashAttention-3", 9)),
        ("xformers", _xformers, _tensors, partial(_missing, "xformers", "xformers")),
        ("flex", _flex, _same_dtype, str),
    ):
        register_peer("attention", name, _untraced(fn), supports, missing)
