"""The KV cache: keys are rotated and written into a static cache in one pass; `Int8Cache` is a static cache in int8.

    model.generate(**inputs, past_key_values=Int8Cache(model.config, max_cache_len=1024))

Shapes: B batch, T new tokens, S slots, G key heads, d head dimension. transformers' caches are [B, G, S, d].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, StaticLayer

from llava_fast.backend import differentiated
from llava_fast.ops.attention import KeyRanges
from llava_fast.ops.attention.int8 import int8_attention
from llava_fast.ops.cache_write import dequantise, quantise_reference, write_cache
from llava_fast.ops.rotary import rotary


class Int8(NamedTuple):
    """Quantised keys or values: int8 [B, S, G, d] and the scale of each token and head, float32 [B, G, S]."""

    data_BSGd: torch.Tensor
    scale_BGS: torch.Tensor

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantise(self.data_BSGd, self.scale_BGS.transpose(1, 2), dtype)


class Int8Layer(StaticLayer):
    """A layer of `Int8Cache`. `keys` and `values` are int8. `update`, which any transformers model calls, returns a
    dequantised copy; this library's attention kernel reads the int8 tensors."""

    # Set by `lazy_initialization`.
    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor

    def __init__(self, max_cache_len: int):
        super().__init__(max_cache_len)
        self.empty = True  # a host-side flag: the first tokens need not read the cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(*(x[:, :, :0].to(torch.int8) for x in (key_states, value_states)))
        self.dtype = key_states.dtype
        self.key_scales, self.value_scales = (
            torch.zeros(self.keys.shape[:3], dtype=torch.float32, device=self.device) for _ in range(2)
        )
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.key_scales)
            torch._dynamo.mark_static_address(self.value_scales)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise new keys and values [B, G, T, d] into their slots; returns all, [B, G, S, d], dequantised."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slot_T = torch.arange(key_states.shape[2], device=self.device) + self.cumulative_length
        for x, slots, scales in (
            (key_states, self.keys, self.key_scales),
            (value_states, self.values, self.value_scales),
        ):
            x, scale = quantise_reference(x)
            slots.index_copy_(2, slot_T, x)
            scales.index_copy_(2, slot_T, scale)
        self.cumulative_length.add_(key_states.shape[2])
        self.empty = False
        return dequantise(self.keys, self.key_scales, self.dtype), dequantise(
            self.values, self.value_scales, self.dtype
        )

    def reset(self) -> None:
        super().reset()
        self.empty = True

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.is_initialized:
            rows = beam_idx.to(self.device)
            self.key_scales, self.value_scales = (
                scales.index_select(0, rows) for scales in (self.key_scales, self.value_scales)
            )


class Int8Cache(Cache):
    """A static cache in int8, for `generate(past_key_values=…)` of any model without sliding windows.

    2 · (d + 4) bytes a token, layer and key head, where bf16 takes 4 · d: for LLaVA-1.5-7B (32 layers of 32 heads,
    d = 128) 264 KiB a token instead of 512.

    Args:
        config: of the model, or of its language model.
        max_cache_len: slots, for prompt and answer together.

    Raises:
        ValueError: for a sliding window.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int):
        text = config.get_text_config(decoder=True)
        if getattr(text, "sliding_window", None) is not None:
            raise ValueError(
                f"an int8 cache has no sliding window, but text_config.sliding_window is {text.sliding_window}"
            )
        super().__init__(layers=[Int8Layer(max_cache_len) for _ in range(text.num_hidden_layers)])


def rotate_and_cache(
    cache: Cache,
    layer: int,
    written: list[StaticLayer],
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    v_BTGd: torch.Tensor,
    cos_BTd: torch.Tensor,
    sin_BTd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | Int8, torch.Tensor | Int8]:
    """Rotated queries, and all keys and values of the updated cache, [B, S, G, d].

    For a static cache keys and values are views of it; for the first tokens of an int8 cache they are the new keys and
    values before quantisation. A layer that is appended to `written` has its old length until `advance`."""
    own = cache.layers[layer] if layer < len(cache.layers) else None
    is_static = type(own) in (StaticLayer, Int8Layer)  # exact types: no sliding window, no subclass
    if not is_static or not isinstance(own, StaticLayer) or cache.offloading or differentiated(q_BTHd, k_BTGd, v_BTGd):
        q, k = rotary(q_BTHd, k_BTGd, cos_BTd, sin_BTd)
        keys, values = cache.update(k.transpose(1, 2), v_BTGd.transpose(1, 2), layer)
        return q, keys.transpose(1, 2), values.transpose(1, 2)
    if not own.is_initialized:
        own.lazy_initialization(k_BTGd.transpose(1, 2), v_BTGd.transpose(1, 2))
    assert own.keys is not None and own.values is not None
    tensors = q_BTHd, k_BTGd, v_BTGd, cos_BTd, sin_BTd, own.cumulative_length, own.keys, own.values
    if not isinstance(own, Int8Layer):
        q = write_cache(*tensors)
        written.append(own)
        return q, own.keys.transpose(1, 2), own.values.transpose(1, 2)
    q = write_cache(*tensors, key_scales_BGS=own.key_scales, value_scales_BGS=own.value_scales)
    written.append(own)
    first, own.empty = own.empty, False
    if first:
        return q, rotary(k_BTGd[:, :, :0], k_BTGd, cos_BTd, sin_BTd)[1], v_BTGd
    return q, Int8(own.keys.transpose(1, 2), own.key_scales), Int8(own.values.transpose(1, 2), own.value_scales)


def advance(written: Sequence[StaticLayer], tokens: int) -> None:
    """Increase the lengths of the layers that `rotate_and_cache` has written to, in one launch for all of them."""
    torch._foreach_add_([layer.cumulative_length for layer in written], tokens)


def attend_int8(q_BTHd: torch.Tensor, k: Int8, v: Int8, ranges: KeyRanges) -> torch.Tensor:
    return int8_attention(q_BTHd, k.data_BSGd, v.data_BSGd, k.scale_BGS, v.scale_BGS, ranges)
