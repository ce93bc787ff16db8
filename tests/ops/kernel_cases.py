"""Small calls of the operations, in bfloat16, for the second executor; each meets the rules of the kit.

Together they launch every kernel with every value of its flags; test_second_executor.py counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from llava_fast.backend import use_backend
from llava_fast.ops._launch import forced_tile
from llava_fast.sequence import pack
from tests.ops import kit

BF16 = torch.bfloat16
# Small, so that small tensors have several tiles.
TILES = {
    "attention_fwd": {"BLOCK_M": 16, "BLOCK_N": 16},
    "attention_bwd_dq": {"BLOCK_M": 16, "BLOCK_N": 16},
    "attention_bwd_dkdv": {"BLOCK_M": 16, "BLOCK_N": 16},
    "decode_attention": {"BLOCK_N": 16},
    "norm_fwd": {"BLOCK_R": 2},
    "norm_bwd": {"BLOCK_R": 2},
    "activation_fwd": {"BLOCK": 32},
    "activation_bwd": {"BLOCK": 32},
    "merge_fwd": {"BLOCK": 16},
    "merge_bwd": {"BLOCK": 16},
    "rotary": {"BLOCK_H": 2},
    "cache_write": {"BLOCK_H": 2},
    "projector_fwd": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "LIBRARY": 0},
    "projector_bwd": {"BLOCK_R": 4, "BLOCK_D": 16},
    "gemm": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
    "loss": {"BLOCK_V": 32},
}


@contextmanager
def small_tiles(**changes: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for kernel, tile in {**TILES, **changes}.items():
            stack.enter_context(forced_tile(kernel, {"num_warps": 1, "num_stages": 1, **tile}))
        yield


def normal(*shape: int, shift: float = 0.0) -> torch.Tensor:
    return (torch.randn(shape) + shift).to(BF16)


def check(function: Callable, tensors: dict[str, torch.Tensor], op: str, *kernels: str, frozen: Any = ()) -> None:
    with small_tiles():
        kit.check_kernel(function, tensors, op=op, kernels=[f"{name}_kernel" for name in kernels], frozen=frozen)


def norm(kind: str) -> None:
    from llava_fast.ops import norm as module

    tensors = {"x": normal(5, 41, shift=0.5), "weight": normal(41, shift=1.0)}
    if kind == "layer_norm":
        tensors["bias"] = normal(41)
    else:
        tensors["residual"] = normal(5, 41)
    outputs = slice(0, 1 if kind == "layer_norm" else 2)
    check(lambda **t: getattr(module, kind)(**t, eps=1e-5)[outputs], tensors, kind, "norm_fwd", "norm_bwd")


def activation(kind: str) -> None:
    from llava_fast.ops import activation as module

    tensors = {name: normal(3, 41) for name in (("gate", "up") if kind == "swiglu" else ("x",))}
    check(getattr(module, kind), tensors, kind, "activation_fwd", "activation_bwd")


def rotary() -> None:
    from llava_fast.ops.rotary import rotary

    angle = torch.rand(1, 3, 10) * 6
    tensors = {"q_BTHd": normal(2, 3, 3, 10), "k_BTGd": normal(2, 3, 1, 10)}
    tensors |= {"cos_BTd": angle.cos().to(BF16), "sin_BTd": angle.sin().to(BF16)}
    check(rotary, tensors, "rotary", "rotary", "rotary", frozen=("cos_BTd", "sin_BTd"))


def attention(lengths: list[int], heads: int, key_heads: int, dim: int, **tiles: Any) -> None:
    from llava_fast.ops.attention import attention

    tokens = sum(lengths)
    ranges = pack(lengths, [[(1, 3)]] + [[] for _ in lengths[1:]], bidirectional_images=True)
    tensors = {
        "q_BTHd": normal(1, tokens, heads, dim),
        "k_BSGd": normal(1, tokens, key_heads, dim),
        "v_BSGd": normal(1, tokens, key_heads, dim),
        "start_BT": ranges.key_start,
        "end_BT": ranges.key_end,
    }
    kernels = ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv")
    with mock.patch.dict(TILES, {kernel: {**TILES[kernel], **tiles} for kernel in kernels}):
        check(partial(attention, return_lse=True), tensors, "attention", *kernels)


def decode(parts: int, dim: int) -> None:
    from llava_fast.ops.attention import attention
    from llava_fast.ops.attention import decode as module

    tensors = {"q_BTHd": normal(2, 2, 4, dim)}
    tensors |= {name: normal(2, 2, 40, dim).transpose(1, 2) for name in ("k_BSGd", "v_BSGd")}
    tensors |= {"start_BT": torch.tensor([[3, 4], [0, 0]]).int(), "end_BT": torch.tensor([[36, 37], [0, 1]]).int()}
    with mock.patch.object(module, "splits_of", lambda q, k: parts):
        check(attention, tensors, "attention", "decode_attention", frozen=tuple(tensors))


def int8(parts: int) -> None:
    from llava_fast.ops.attention import KeyRanges
    from llava_fast.ops.attention import int8 as module

    start, end = torch.tensor([[3, 4]]).int(), torch.tensor([[36, 37]]).int()
    tensors = {"q_BTHd": normal(1, 2, 2, 16)}
    for x in "kv":
        tensors[f"{x}_BSGd"] = torch.randint(-127, 128, (1, 1, 40, 16)).to(torch.int8).transpose(1, 2)
        tensors[f"{x}_scale_BGS"] = 0.03 * torch.rand(1, 1, 40)
    with mock.patch.object(module, "splits_of", lambda q, k: parts):
        function = lambda **t: module.int8_attention(**t, ranges=KeyRanges(start, end))  # noqa: E731
        check(function, tensors, "int8_attention", "decode_attention", frozen=tuple(tensors))


def merge(from_ids: bool) -> None:
    from llava_fast.ops.merge import embed_merge, merge

    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, False]])
    tensors = {"features": normal(4, 20), "text": normal(7, 20) if from_ids else normal(2, 5, 20)}
    ids = torch.arange(10).view(2, 5) % 7

    def function(text: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if from_ids:
            return embed_merge(ids, text, features, mask_BT=mask)
        return merge(text, features, slots_M=mask.flatten().nonzero().flatten())

    check(function, tensors, "merge", "merge_fwd", "merge_bwd")


def patch_embed(as_bytes: bool) -> None:
    from llava_fast.ops.patch_embed import patch_embed

    tensors = {
        "pixels": torch.randint(0, 256, (2, 9, 13, 3), dtype=torch.uint8) if as_bytes else normal(2, 3, 9, 13),
        "weight_DCPP": normal(24, 3, 4, 4) / 4,
        "cls_D": normal(24),
        "position_TD": normal(7, 24),
        "norm_weight_D": normal(24),
        "norm_bias_D": normal(24),
    }
    function = partial(patch_embed, eps=1e-5, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    check(function, tensors, "patch_embed", "patch_embed_fwd", "norm_fwd", "norm_bwd", "patch_embed_dweight")


def projector() -> None:
    from llava_fast.ops.projector import projector

    tensors = {"x": normal(2, 9, 16), "w0": normal(32, 16) / 4, "b0": normal(32), "w1": normal(9, 32) / 6}
    function = lambda x, w0, b0, w1: projector(x, [w0, w1], [b0, None])  # noqa: E731
    check(function, tensors, "projector", "projector_fwd", "projector_fwd", "projector_bwd")


def loss(known: bool, frozen: Sequence[str] = ()) -> None:
    from llava_fast.ops.loss import linear_cross_entropy

    labels = torch.tensor([[-100, 3, 36], [-100, -100, 0]])
    tensors = {"hidden": normal(2, 3, 17), "weight": normal(37, 17)}
    function = partial(linear_cross_entropy, labels=labels, num_labelled=3 if known else None)
    kernels = ("loss",) if known else ("gemm", "loss", "gemm", "gemm")[: 2 if frozen else 4]
    check(function, tensors, "linear_cross_entropy", *kernels, frozen=frozen)


def cache_write(stored: torch.dtype) -> None:
    """Three tokens, of which the last is past the last slot."""
    from llava_fast.ops.cache_write import dequantise, write_cache

    angle = torch.rand(2, 3, 10) * 6
    q, k, v = normal(2, 3, 3, 10), normal(2, 3, 1, 10), normal(2, 3, 1, 10)

    def written(tokens: int) -> list[torch.Tensor]:
        keys, values = torch.zeros(2, 2, 1, 6, 10, dtype=stored)
        scales = [torch.zeros(2, 1, 6) for _ in "kv"] if stored == torch.int8 else [None, None]
        new = (x[:, :tokens] for x in (q, k, v, angle.cos().to(BF16), angle.sin().to(BF16)))
        out = write_cache(*new, torch.tensor(4), keys, values, key_scales_BGS=scales[0], value_scales_BGS=scales[1])
        if stored == torch.int8:
            keys, values = (dequantise(*x, torch.float32) for x in zip((keys, values), scales, strict=True))
        return [out[:, :2], keys, values]

    with use_backend("reference"):
        expected = written(2)
    with use_backend("triton", "cache_write"), small_tiles():
        found = written(3)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=float(other.abs().max()) / 100)


CASES: dict[str, Callable[[], None]] = {
    "rms_norm": partial(norm, "rms_norm"),
    "layer_norm": partial(norm, "layer_norm"),
    **{kind: partial(activation, kind) for kind in ("swiglu", "quick_gelu", "gelu")},
    "rotary": rotary,
    "attention of a pack": partial(attention, [17, 1, 6], 2, 1, 16),
    "attention, two blocks of columns": partial(attention, [18], 1, 1, 72),
    "attention, a narrow tile": partial(attention, [33, 3], 1, 1, 24, BLOCK_M=32, BLOCK_N=32),
    "attention, an odd dimension": partial(attention, [4, 13], 1, 1, 5),
    "decode": partial(decode, 1, 20),
    "decode in parts": partial(decode, 3, 72),
    "int8": partial(int8, 1),
    "int8 in parts": partial(int8, 2),
    "merge from ids": partial(merge, True),
    "merge into embeddings": partial(merge, False),
    "patch_embed of bytes": partial(patch_embed, True),
    "patch_embed of floats": partial(patch_embed, False),
    "projector": projector,
    "loss": partial(loss, False),
    "loss of a known count": partial(loss, True),
    "loss without gradients": partial(loss, False, ("hidden", "weight")),
    "cache_write": partial(cache_write, BF16),
    "cache_write in int8": partial(cache_write, torch.int8),
}
