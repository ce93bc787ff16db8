"""The language model: Llama, and models of its shape (Vicuna, TinyLlama, SmolLM2, Mistral).

RMSNorm, rotary positions, grouped-query attention over key ranges, SwiGLU. Parameter names are those of transformers'
LlamaModel.

Shapes: B batch, T tokens, S keys, D width, H query heads, G key heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llava_fast.model.cache import attend, dense, rotate_and_cache
from llava_fast.model.recompute import recomputed
from llava_fast.ops.activation import swiglu
from llava_fast.ops.attention import attention_weights_reference
from llava_fast.ops.norm import rms_norm
from llava_fast.ops.rotary import rotary

SUPPORTED = ("llama", "mistral")


@dataclass(frozen=True)
class Positions:
    """What every layer needs to know of the sequence, made once per forward pass.

    cos, sin: [B or 1, T, d], rotary angles of the tokens.
    key_start, key_end: int32 [B, T], the keys each token sees, counted in the keys the cache returns.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    key_start: torch.Tensor
    key_end: torch.Tensor


# The rows of a layer's output that somebody reads: so many last tokens of each batch row, or flat places b · T + t.
Rows = int | torch.Tensor


def take_rows(x_BT: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[B, T, …] -> [B, rows, …] for the last tokens, or [1, len(rows), …] for flat places."""
    return x_BT[:, -rows:] if isinstance(rows, int) else x_BT.flatten(0, 1)[rows][None]


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
    def __init__(self, config: LlamaConfig | MistralConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bias = getattr(config, "attention_bias", False)
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
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
        if rows is not None:
            return self._forward_rows(x_BTD, positions, cache, rows, again), None
        with recomputed(x_BTD, again):
            q, k, v = (self._heads(proj, x_BTD) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cache is None:
            q, k = rotary(q, k, positions.cos, positions.sin)
        else:
            q, k, v = rotate_and_cache(cache, self.layer, q, k, v, positions.cos, positions.sin)
        out = attend(q, k, v, positions.key_start, positions.key_end)
        weights = None
        if want_weights:
            k = dense(k, q.dtype)
            weights = attention_weights_reference(q, k, positions.key_start, positions.key_end, self.head_dim**-0.5)[
                0
            ].to(q.dtype)
        return self.o_proj(out.flatten(2)), weights

    def _forward_rows(
        self,
        x_BTD: torch.Tensor,
        positions: Positions,
        cache: Cache | None,
        rows: Rows,
        again: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        """The output for some rows alone: queries for those, keys and values for all."""
        batch = x_BTD.shape[0]
        q = self._heads(self.q_proj, take_rows(x_BTD, rows))
        with recomputed(x_BTD, again):
            k, v = (self._heads(proj, x_BTD) for proj in (self.k_proj, self.v_proj))
        cos, sin = (angle.expand(batch, -1, -1) for angle in (positions.cos, positions.sin))
        start, end = positions.key_start, positions.key_end
        q, _ = rotary(q, q[:, :, :0], take_rows(cos, rows), take_rows(sin, rows))
        if cache is None:
            _, k = rotary(k[:, :, :0], k, cos, sin)
        else:
            _, k, v = rotate_and_cache(cache, self.layer, k[:, :, :0], k, v, cos, sin)
        if not isinstance(rows, int):
            # Flat rows come from any batch row, so the keys of all lie end to end as one pack.
            k, v = (dense(x, q.dtype) for x in (k, v))
            offset = k.shape[1] * torch.arange(batch, device=start.device, dtype=start.dtype)[:, None]
            start, end = start + offset, end + offset
            k, v = k.flatten(0, 1)[None], v.flatten(0, 1)[None]
        out = attend(q, k, v, take_rows(start, rows), take_rows(end, rows))
        return self.o_proj(out.flatten(2))

    def _heads(self, projection: nn.Module, x_BTD: torch.Tensor) -> torch.Tensor:
        return projection(x_BTD).unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig | MistralConfig):
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.act = None if config.hidden_act == "silu" else ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, again: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        with recomputed(x, again):
            gate, up = self.gate_proj(x), self.up_proj(x)
        product = partial(swiglu, gate, up) if self.act is None else lambda: self.act(gate) * up
        y = product()
        with recomputed(y, product):
            return self.down_proj(y)


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LlamaConfig | MistralConfig, layer: int):
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

    def __init__(self, config: LlamaConfig | MistralConfig):
        super().__init__()
        if config.model_type not in SUPPORTED:
            raise ValueError(f"text_config.model_type is {config.model_type!r}; supported: {', '.join(SUPPORTED)}")
        if config.attention_dropout:
            raise ValueError(f"text_config.attention_dropout is {config.attention_dropout}; only 0 is supported")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(
        self,
        embeds_BTD: torch.Tensor,
        position_ids: torch.Tensor,
        key_start: torch.Tensor,
        key_end: torch.Tensor,
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
            key_start, key_end: int32 [B, T], see `Positions`.
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
        positions = Positions(cos, sin, key_start, key_end)
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
