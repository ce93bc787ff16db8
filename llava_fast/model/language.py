"""The language model: a Llama decoder, also for Vicuna, TinyLlama, SmolLM2 and Mistral.

RMSNorm, rotary positions, grouped-query attention over key ranges, SwiGLU. Parameter names are those of transformers'
LlamaModel.

Shapes: B batch, T tokens, S keys, D width, H query heads, G key heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig, MistralConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llava_fast.model.cache import Int8, attend_int8, rotate_and_cache
from llava_fast.model.pretrained import LlavaPart
from llava_fast.ops.activation import swiglu
from llava_fast.ops.attention import KeyRanges, attention_with_weights, range_attention
from llava_fast.ops.norm import rms_norm
from llava_fast.ops.rotary import rotary

SUPPORTED = ("llama", "mistral")
TextConfig = LlamaConfig | MistralConfig
NOTHING = nullcontext()
# Which rows of the last layer's output to compute: the last n tokens of each batch row, or flat indices b · T + t.
Rows = int | torch.Tensor


def text_config(config: LlavaConfig) -> TextConfig:
    return cast(TextConfig, config.text_config)


@dataclass(frozen=True)
class Positions:
    """Rotary angles and key ranges of the sequence, made once per forward pass and read by every layer.

    cos, sin: [B or 1, T, d], rotary angles of the tokens.
    ranges: [B, T], the keys each token sees, as indices into the keys that the cache returns.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    ranges: KeyRanges

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Positions:
        """A copy on another device; accelerate's hooks call this when layers are spread over devices."""
        if self.cos.device == torch.device(device):
            return self
        cos, sin = (x.to(device, non_blocking=non_blocking) for x in (self.cos, self.sin))
        return Positions(cos, sin, self.ranges.to(device, non_blocking))


class RMSNorm(nn.Module):
    """RMSNorm of x + residual; `forward` returns the normalised tensor and that sum, the new residual."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(x, self.weight, eps=self.eps, residual=residual)

    def again(self, total: torch.Tensor) -> torch.Tensor:
        """Recompute the normalised tensor from the sum that `forward` returned."""
        return rms_norm(total, self.weight, eps=self.eps)[0]


def _rotate(
    q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, v_BTGd: torch.Tensor, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *rotary(q_BTHd, k_BTGd, cos_BTd, sin_BTd), v_BTGd


class Attention(nn.Module):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bias = getattr(config, "attention_bias", False)
        key_heads = config.num_key_value_heads or config.num_attention_heads
        queries, keys = config.num_attention_heads * self.head_dim, key_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias)

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions: Positions,
        cache: Cache | None,
        want_weights: bool = False,
        rows: Rows | None = None,
        again: Callable[[], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With `rows`: queries only for those rows, keys and values for all. `again()` recomputes `x_BTD`."""
        angles, ranges = (positions.cos, positions.sin), positions.ranges
        rotate = _rotate if cache is None else partial(rotate_and_cache, cache, self.layer)
        with recomputed(x_BTD, again):
            q = self._heads(self.q_proj, x_BTD if rows is None else take_rows(x_BTD, rows))
            new_k, new_v = self._heads(self.k_proj, x_BTD), self._heads(self.v_proj, x_BTD)
        if rows is None:
            q, k, v = rotate(q, new_k, new_v, *angles)
        else:
            q, _ = rotary(q, q[:, :, :0], *angles_of_rows(*angles, x_BTD.shape[0], rows))
            _, k, v = rotate(new_k[:, :, :0], new_k, new_v, *angles)
            k, v, ranges = keys_of_rows(k, v, ranges, rows, q.dtype)
        weights = None
        if want_weights:
            k, v = (x.dequantised(q.dtype) if isinstance(x, Int8) else x for x in (k, v))
            out, weights = attention_with_weights(q, k, v, ranges)
        elif isinstance(k, Int8):
            out = attend_int8(q, k, cast(Int8, v), ranges)
        else:
            out = range_attention(q, k, cast(torch.Tensor, v), ranges)
        return self.o_proj(out.flatten(2)), weights

    def _heads(self, projection: nn.Module, x_BTD: torch.Tensor) -> torch.Tensor:
        return projection(x_BTD).unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.act = None if config.hidden_act == "silu" else ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, again: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        with recomputed(x, again):
            gate, up = self.gate_proj(x), self.up_proj(x)
        act = self.act
        product = partial(swiglu, gate, up) if act is None else lambda: act(gate) * up
        y = product()
        with recomputed(y, product):
            return self.down_proj(y)


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions: Positions,
        past_key_values: Cache | None = None,
        want_weights: bool = False,
        rows: Rows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        y, x_BTD = self.input_layernorm(x_BTD)
        again = partial(self.input_layernorm.again, x_BTD)
        y, weights = self.self_attn(y, positions, past_key_values, want_weights, rows, again)
        if rows is not None:
            x_BTD = take_rows(x_BTD, rows)
        y, x_BTD = self.post_attention_layernorm(y, x_BTD)
        return x_BTD + self.mlp(y, partial(self.post_attention_layernorm.again, x_BTD)), weights


class LanguageModel(LlavaPart):
    """The decoder without its head."""

    config: TextConfig

    def __init__(self, config: TextConfig):
        super().__init__(config)
        if config.model_type not in SUPPORTED:
            raise ValueError(f"text_config.model_type is {config.model_type!r}; supported: {', '.join(SUPPORTED)}")
        if config.attention_dropout:
            raise ValueError(f"text_config.attention_dropout is {config.attention_dropout}; only 0 is supported")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(cast(LlamaConfig, config))  # reads only fields that both configs have
        self.post_init()

    def forward(
        self,
        embeds_BTD: torch.Tensor,
        position_ids: torch.Tensor,
        ranges: KeyRanges,
        cache: Cache | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rows: Rows | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
        """Run the decoder.

        Args:
            embeds_BTD: token and image embeddings, merged.
            position_ids: [B or 1, T] int64.
            ranges: [B, T], see `Positions`.
            cache: written to, and read from, when given.
            rows: the only rows of the last hidden state that the caller reads. The last layer then computes queries,
                output projection and MLP for those rows only; keys and values, and so the cache, are complete. If
                hidden states or attention weights are asked for, all rows are computed, and `rows` taken at the end.

        Returns:
            The normalised last hidden state [B, T, D] (with `rows`: shaped as by `take_rows`); all hidden states
            (the input, each layer's output, the last one normalised); attention weights [B, H, T, S] per layer. The
            last two are None unless asked for.
        """
        cos, sin = self.rotary_emb(embeds_BTD, position_ids)
        positions = Positions(cos, sin, ranges)
        states: list[torch.Tensor] = []
        attentions: list[torch.Tensor] = []
        x_BTD = embeds_BTD
        everything = output_hidden_states or output_attentions
        if isinstance(rows, int) and rows >= embeds_BTD.shape[1]:
            rows = None
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(x_BTD)
            x_BTD, weights = layer(
                x_BTD,
                positions,
                past_key_values=cache,
                want_weights=output_attentions,
                rows=rows if i == len(self.layers) - 1 and not everything else None,
            )
            if output_attentions:
                attentions.append(weights)
        x_BTD, _ = self.norm(x_BTD)
        if output_hidden_states:
            states.append(x_BTD)
        if rows is not None and everything:
            x_BTD = take_rows(x_BTD, rows)
        return (
            x_BTD,
            tuple(states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )


# Selecting rows for the last layer: the last tokens of a prompt, or the tokens that predict a label


def take_rows(x_BT: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[B, T, …] -> [B, rows, …] for the last tokens, or [1, len(rows), …] for flat indices."""
    return x_BT[:, -rows:] if isinstance(rows, int) else x_BT.flatten(0, 1)[rows][None]


def angles_of_rows(cos_BTd: torch.Tensor, sin_BTd: torch.Tensor, batch: int, rows: Rows) -> list[torch.Tensor]:
    """Rotary angles of the rows; the given angles may have a batch size of 1, which is broadcast."""
    return [take_rows(angle.expand(batch, -1, -1), rows) for angle in (cos_BTd, sin_BTd)]


def keys_of_rows(
    k_BSGd: torch.Tensor | Int8, v_BSGd: torch.Tensor | Int8, ranges: KeyRanges, rows: Rows, dtype: torch.dtype
) -> tuple[torch.Tensor | Int8, torch.Tensor | Int8, KeyRanges]:
    """Keys, values and ranges for the queries of the rows. Flat indices may be in any batch row, so for them the keys
    of all batch rows are laid end to end as one batch row, and int8 keys are dequantised to `dtype`."""
    if isinstance(rows, int):
        return k_BSGd, v_BSGd, ranges.last(rows)
    k_BSGd, v_BSGd = (x.dequantised(dtype) if isinstance(x, Int8) else x for x in (k_BSGd, v_BSGd))
    batch, keys = k_BSGd.shape[:2]
    offset_B1 = keys * torch.arange(batch, device=ranges.start.device, dtype=torch.int32)[:, None]
    start, end = (take_rows(x + offset_B1, rows) for x in ranges)
    return k_BSGd.flatten(0, 1)[None], v_BSGd.flatten(0, 1)[None], KeyRanges(start, end)


# Backward recomputes two tensors instead of saving them: the normalised input of a layer, and the product of SwiGLU.
# The linear layers that read them would save them (for dW, or for LoRA), but both are point-wise functions of tensors
# that autograd saves anyway. This frees 2 D + I of 6 D + 3 I numbers per token and layer (D width, I intermediate size
# of the MLP): 41 % at LLaVA-1.5-7B's sizes when all parameters are trained.


def recomputed(tensor: torch.Tensor, make: Callable[[], torch.Tensor] | None) -> AbstractContextManager[Any]:
    """A context for linear layers that read `tensor`: they do not save it; backward recomputes it by `make()`.

    Args:
        tensor: contiguous.
        make: recomputes `tensor`, bit for bit, from tensors that are saved anyway. With None the context does nothing.

    It also does nothing under torch.compile, which decides itself what to save, and inside other saved-tensor hooks:
    activation checkpointing and offloading use them to free tensors, which `make` would keep alive.
    """
    if make is None or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not tensor.is_contiguous():
        return NOTHING
    if type(tensor) is not torch.Tensor:  # a DTensor has no data pointer to compare
        return NOTHING
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if outer is not None and not isinstance(getattr(outer[0], "__self__", None), _Remake):
        return NOTHING
    remake = _Remake(tensor, make)
    return torch.autograd.graph.saved_tensors_hooks(remake.pack, remake.unpack)


class _Remake:
    """Saved-tensor hooks for one tensor: the recomputed tensor is freed after the last linear layer has unpacked it."""

    def __init__(self, tensor: torch.Tensor, make: Callable[[], torch.Tensor]):
        self.pointer, self.numel, self.dtype = tensor.data_ptr(), tensor.numel(), tensor.dtype
        self.make, self.readers, self.waiting = make, 0, 0
        self.made: torch.Tensor | None = None
        device = tensor.device.type
        # Backward runs outside of autocast; without restoring it, `make` would round differently.
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def pack(self, saved: torch.Tensor) -> torch.Tensor | tuple[torch.Size, tuple[int, ...]]:
        same = (saved.data_ptr(), saved.numel(), saved.dtype) == (self.pointer, self.numel, self.dtype)
        if not same or self.numel == 0:
            return saved
        self.readers += 1
        return saved.shape, saved.stride()

    def unpack(self, packed: torch.Tensor | tuple[torch.Size, tuple[int, ...]]) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        made = self.made
        if made is None:
            device, dtype, enabled = self.autocast
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                made, self.waiting = self.make(), self.readers
        self.waiting -= 1
        self.made = made if self.waiting else None
        return made.as_strided(*packed)
