"""The language model: Llama, and models of its shape (Vicuna, TinyLlama, SmolLM2, Mistral).

RMSNorm, rotary positions, grouped-query attention over key ranges, SwiGLU. Parameter names are those of transformers'
LlamaModel.

Shapes: B batch, T tokens, S keys, D width, H query heads, G key heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig, MistralConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llava_fast.model.cache import attend, dense, rotate_and_cache
from llava_fast.model.recompute import recomputed
from llava_fast.model.rows import Rows, angles_of_rows, keys_of_rows, take_rows
from llava_fast.ops.activation import swiglu
from llava_fast.ops.attention import KeyRanges, attention_weights_reference
from llava_fast.ops.norm import rms_norm
from llava_fast.ops.rotary import rotary

SUPPORTED = ("llama", "mistral")
TextConfig = LlamaConfig | MistralConfig


def text_config(config: LlavaConfig) -> TextConfig:
    return cast(TextConfig, config.text_config)


@dataclass(frozen=True)
class Positions:
    """What every layer needs to know of the sequence, made once per forward pass.

    cos, sin: [B or 1, T, d], rotary angles of the tokens.
    ranges: [B, T], the keys each token sees, counted in the keys the cache returns.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    ranges: KeyRanges

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Positions:
        """For the layers on another device: accelerate's hooks call this."""
        if self.cos.device == torch.device(device):
            return self
        cos, sin = (x.to(device, non_blocking=non_blocking) for x in (self.cos, self.sin))
        return Positions(cos, sin, self.ranges.to(device, non_blocking))


class RMSNorm(nn.Module):
    """Owns the weight of an RMSNorm; `forward` takes the residual to add first and returns the new one as well."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(x, self.weight, eps=self.eps, residual=residual)

    def again(self, total: torch.Tensor) -> torch.Tensor:
        """The normalised tensor once more, from the sum that `forward` returned."""
        return rms_norm(total, self.weight, eps=self.eps)[0]


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
        """With `rows`: queries for those alone, keys and values for all. `again()` computes `x_BTD` once more."""
        angles, ranges = (positions.cos, positions.sin), positions.ranges
        with recomputed(x_BTD, again):
            q = self._heads(self.q_proj, x_BTD if rows is None else take_rows(x_BTD, rows))
            new_k, new_v = (self._heads(proj, x_BTD) for proj in (self.k_proj, self.v_proj))
        if rows is None:
            q, k, v = rotate_and_cache(cache, self.layer, q, new_k, new_v, *angles)
        else:
            q, _ = rotary(q, q[:, :, :0], *angles_of_rows(*angles, x_BTD.shape[0], rows))
            _, k, v = rotate_and_cache(cache, self.layer, new_k[:, :, :0], new_k, new_v, *angles)
            k, v, ranges = keys_of_rows(k, v, ranges, rows, q.dtype)
        out = attend(q, k, v, ranges)
        weights = None
        if want_weights:
            weights = attention_weights_reference(q, dense(k, q.dtype), ranges, self.head_dim**-0.5)[0].to(q.dtype)
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


class LanguageModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, config: TextConfig):
        super().__init__()
        if config.model_type not in SUPPORTED:
            raise ValueError(f"text_config.model_type is {config.model_type!r}; supported: {', '.join(SUPPORTED)}")
        if config.attention_dropout:
            raise ValueError(f"text_config.attention_dropout is {config.attention_dropout}; only 0 is supported")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(cast(LlamaConfig, config))  # it reads what both have

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
            rows: the only rows of the last hidden state that will be read. The last layer then computes queries,
                output projection and MLP for those alone; keys and values, and so the cache, are complete. It is
                ignored when hidden states or attention weights are asked for.

        Returns:
            The normalised last hidden state [B, T, D] (`take_rows` gives its shape with `rows`); all hidden states
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
