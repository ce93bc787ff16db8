"""The language model: a Llama decoder, also for Vicuna, TinyLlama, SmolLM2 and Mistral.

RMSNorm, rotary positions, grouped-query attention over key ranges, SwiGLU. Parameter names are those of transformers'
LlamaModel.

Shapes: B batch, T tokens, S keys, D width, H query heads, G key heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeGuard, cast

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import LlamaConfig, LlavaConfig, MistralConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llava_fast.backend import is_plain
from llava_fast.model.cache import Int8, advance, attend_int8, rotate_and_cache
from llava_fast.model.joined import JoinedLinears, heads, recomputed
from llava_fast.model.pretrained import LlavaPart
from llava_fast.ops.activation import swiglu
from llava_fast.ops.attention import KeyRanges, attention_with_weights, range_attention
from llava_fast.ops.norm import rms_norm
from llava_fast.ops.rotary import rotary

SUPPORTED = ("llama", "mistral")
TextConfig = LlamaConfig | MistralConfig
# Which rows of the last layer's output to compute: the last n tokens of each batch row, or flat indices b · T + t.
Rows = int | torch.Tensor


def text_config(config: LlavaConfig) -> TextConfig:
    return cast(TextConfig, config.text_config)


@dataclass(frozen=True)
class Positions:
    """Rotary angles and key ranges of the sequence, made once per forward pass and read by every layer.

    cos, sin: [B or 1, T, d], rotary angles of the tokens.
    ranges: [B, T], the keys each token sees, as indices into the keys that the cache returns.
    written: the cache's layers that were written to and whose lengths are not yet increased (see `advance`).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    ranges: KeyRanges
    written: list[StaticLayer] = field(default_factory=list)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Positions:
        """A copy on another device; accelerate's hooks call this when layers are spread over devices."""
        if self.cos.device == torch.device(device):
            return self
        cos, sin = (x.to(device, non_blocking=non_blocking) for x in (self.cos, self.sin))
        return Positions(cos, sin, self.ranges.to(device, non_blocking), self.written)


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


def sum_norm(norm: nn.Module, x: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x + added), and the sum. A norm that is hooked or replaced gets the sum, as in transformers."""
    if added is None:
        return norm(x)
    return norm.forward(added, x) if is_plain(norm, RMSNorm) else norm(x + added)


def _rotate(
    q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, v_BTGd: torch.Tensor, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *rotary(q_BTHd, k_BTGd, cos_BTd, sin_BTd), v_BTGd


class Attention(JoinedLinears):
    joins = ("q_proj", "k_proj", "v_proj")

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
        rotate = _rotate if cache is None else partial(rotate_and_cache, cache, self.layer, positions.written)
        with recomputed(x_BTD, again):
            if rows is None:
                q, new_k, new_v = self.project(x_BTD, self.head_dim)
            else:
                projected = self.q_proj(take_rows(x_BTD, rows)), self.k_proj(x_BTD), self.v_proj(x_BTD)
                q, new_k, new_v = (heads(x, self.head_dim) for x in projected)
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


class MLP(JoinedLinears):
    joins = ("gate_proj", "up_proj")

    def __init__(self, config: TextConfig):
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.act = None if config.hidden_act == "silu" else ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, again: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        with recomputed(x, again):
            # On a CPU the product of SwiGLU takes longer over halves of one tensor, if there are more than a few rows.
            apart = x.device.type == "cpu" and x.numel() > 8 * x.shape[-1]
            gate, up = (self.gate_proj(x), self.up_proj(x)) if apart else self.project(x)
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
        """The layer's output, and the attention weights."""
        x_BTD, added_BTD, weights = self.unsummed(x_BTD, None, positions, past_key_values, want_weights, rows)
        return x_BTD + added_BTD, weights

    def unsummed(
        self,
        x_BTD: torch.Tensor,
        added_BTD: torch.Tensor | None,
        positions: Positions,
        cache: Cache | None,
        want_weights: bool,
        rows: Rows | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`forward` of x + added, with its output as two tensors whose sum the next norm computes."""
        y, x_BTD = sum_norm(self.input_layernorm, x_BTD, added_BTD)
        again = partial(self.input_layernorm.again, x_BTD)
        y, weights = self.self_attn(y, positions, cache, want_weights, rows, again)
        if rows is not None:
            x_BTD = take_rows(x_BTD, rows)
        y, x_BTD = self.post_attention_layernorm(y, x_BTD)
        return x_BTD, self.mlp(y, partial(self.post_attention_layernorm.again, x_BTD)), weights


def sums_late(layer: nn.Module) -> TypeGuard[DecoderLayer]:
    """Whether `unsummed` may be called instead of the layer: nothing else reads its input or output."""
    if not is_plain(layer, DecoderLayer) or layer._compiled_call_impl is not None:
        return False
    return not (layer.gradient_checkpointing and layer.training)  # which saves the input: one tensor, not two


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
        x_BTD, added_BTD = embeds_BTD, None
        everything = output_hidden_states or output_attentions
        late = not output_hidden_states and not _has_any_global_hook()
        if isinstance(rows, int) and rows >= embeds_BTD.shape[1]:
            rows = None
        for i, layer in enumerate(self.layers):
            few = rows if i == len(self.layers) - 1 and not everything else None
            if late and sums_late(layer):
                x_BTD, added_BTD, weights = layer.unsummed(x_BTD, added_BTD, positions, cache, output_attentions, few)
            else:
                x_BTD, added_BTD = x_BTD if added_BTD is None else x_BTD + added_BTD, None
                if output_hidden_states:
                    states.append(x_BTD)
                x_BTD, weights = layer(
                    x_BTD, positions, past_key_values=cache, want_weights=output_attentions, rows=few
                )
            if weights is not None:
                attentions.append(weights)
        x_BTD, _ = sum_norm(self.norm, x_BTD, added_BTD)
        if positions.written:
            advance(positions.written, embeds_BTD.shape[1])
        if output_hidden_states:
            states.append(x_BTD)
        if rows is not None and everything:
            x_BTD = take_rows(x_BTD, rows)
        return x_BTD, tuple(states) if output_hidden_states else None, tuple(attentions) if output_attentions else None


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
