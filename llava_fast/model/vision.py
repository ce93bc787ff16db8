"""The CLIP vision tower, run up to the last hidden state that is read, and the projector into the language model.

Parameter names are those of transformers' CLIPVisionModel (≥ 5.6), so its weights load as they are. LLaVA-1.5 reads
hidden state −2: the last layer and the final LayerNorm are never run; they keep their parameters, frozen.

Each residual add is fused into the LayerNorm after it; for the second add of a layer that is the first LayerNorm of the
next layer. Inference computes q, k and v in one GEMM (`joined.py`).

Shapes: B images, N = patches + 1 tokens, D width, H heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlavaConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_fast.backend import is_plain
from llava_fast.model.joined import JoinedLinears
from llava_fast.model.language import text_config
from llava_fast.model.pretrained import LlavaPart, init_clip
from llava_fast.ops.activation import gelu, quick_gelu
from llava_fast.ops.attention import KeyRanges, attention_with_weights, range_attention
from llava_fast.ops.norm import layer_norm
from llava_fast.ops.patch_embed import CLIP_MEAN, CLIP_STD, Normalisation, check_same, noted_normalisation, patch_embed
from llava_fast.ops.projector import projector

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def pixel_normalisation(config: LlavaConfig, pixels: torch.Tensor | None = None) -> Normalisation:
    """Mean and deviation by which a model with this config normalises uint8 pixels.

    Raises:
        ValueError: if `pixels` carry a note (`note_normalisation`) with other numbers.
    """
    mean, std = getattr(config, "image_mean", None), getattr(config, "image_std", None)
    found = Normalisation(tuple(mean or CLIP_MEAN), tuple(std or CLIP_STD))
    if (noted := noted_normalisation(pixels)) is not None:
        check_same(noted, "the processor", found)
    return found


def tower_config(config: LlavaConfig) -> CLIPVisionConfig:
    return cast(CLIPVisionConfig, config.vision_config)


def feature_layers(config: LlavaConfig, override: int | Sequence[int] | None = None) -> list[int]:
    """The hidden states of the tower that make up an image's features."""
    layers = config.vision_feature_layer if override is None else override
    return [layers] if isinstance(layers, int) else list(layers)


class VisionEmbeddings(nn.Module):
    """Patches, CLS and positions, before the pre-LayerNorm.

    Called only if a part is wrapped or hooked; else `ops.patch_embed` computes with its parameters, and the norm's.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width, patch, side = config.hidden_size, cast(int, config.patch_size), cast(int, config.image_size)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((side // patch) ** 2 + 1, width)

    def forward(
        self, pixels: torch.Tensor, height: int, width: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> torch.Tensor:
        places = torch.arange(self.position_embedding.num_embeddings, device=pixels.device)
        pixels = Normalisation(mean, std).apply(pixels, self.class_embedding.dtype)
        patches_BND = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(patches_BND.shape[0], 1, -1)
        return torch.cat((cls, patches_BND), dim=1) + self.position(self.position_embedding(places), height, width)

    def position(self, table_ND: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[1 + rows · columns, D] position embeddings for an image of `height` × `width` pixels, bicubically
        interpolated if the size differs from `config.image_size` (as CLIPVisionModel does on request)."""
        patch = self.patch_embedding.kernel_size[0]
        rows, columns = height // patch, width // patch
        side = int((table_ND.shape[0] - 1) ** 0.5)
        if (rows, columns) == (side, side):
            return table_ND
        grid = table_ND[1:].view(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat((table_ND[:1], grid.flatten(2)[0].T))


class LayerNorm(nn.LayerNorm):
    """LayerNorm of x + residual; `forward` returns the normalised tensor and that sum."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)


class VisionAttention(JoinedLinears):
    joins = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x_BND: torch.Tensor, ranges: KeyRanges, want_weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = self.project(x_BND, self.head_dim)
        weights = None
        if want_weights:
            out, weights = attention_with_weights(q, k, v, ranges)
        else:
            out = range_attention(q, k, v, ranges)
        return self.out_proj(out.flatten(2)), weights


class VisionMLP(nn.Module):
    """fc2(act(fc1(x))).

    The GEMM adds the bias of fc1 in its epilogue, at no extra memory traffic. Fusing the bias into the activation would
    only save one read in the backward pass of a trained tower, for the bias gradient.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS.get(config.hidden_act) or ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        x_BND: torch.Tensor,
        added_BND: torch.Tensor | None,
        ranges: KeyRanges,
        want_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns the layer's input x + added (a hidden state of the tower), two tensors whose sum is the layer's
        output, and the attention weights."""
        y, state = self.layer_norm1(x_BND) if added_BND is None else self.layer_norm1(added_BND, x_BND)
        y, weights = self.self_attn(y, ranges, want_weights)
        y, x_BND = self.layer_norm2(y, state)
        return state, x_BND, self.mlp(y), weights


class VisionEncoder(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionTower(LlavaPart):
    """CLIP's vision model up to the last hidden state that is needed."""

    config: CLIPVisionConfig
    config_class = CLIPVisionConfig

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config)
        if config.model_type != "clip_vision_model":
            raise ValueError(
                f"vision_config.model_type is {config.model_type!r}; only 'clip_vision_model' is supported"
            )
        if config.attention_dropout:
            raise ValueError(f"vision_config.attention_dropout is {config.attention_dropout}; only 0 is supported")
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_clip(module, self.config)

    def resolve(self, layer: int) -> int:
        """Index of a hidden state, 0 (after the pre-LayerNorm) to the number of layers, from a possibly negative one.

        Raises:
            ValueError: when there is no such hidden state.
        """
        states = len(self.encoder.layers) + 1
        if not -states <= layer < states:
            raise ValueError(f"vision_feature_layer {layer} is out of range for a tower of {states - 1} layers")
        return layer % states

    def freeze_unused(self, feature_layers: Sequence[int]) -> None:
        """Stop gradients for the parameters that no feature layer depends on."""
        used = max(self.resolve(layer) for layer in feature_layers)
        self.post_layernorm.requires_grad_(False)
        for layer in self.encoder.layers[used:]:
            layer.requires_grad_(False)

    def _embed(
        self, pixels: torch.Tensor, height: int, width: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> torch.Tensor:
        """Hidden state 0 [B, N, D], by one fused operation if no module involved is wrapped or hooked."""
        parts, norm = self.embeddings, self.pre_layrnorm
        patch, position = parts.patch_embedding, parts.position_embedding
        kinds = {parts: VisionEmbeddings, patch: nn.Conv2d, position: nn.Embedding, norm: nn.LayerNorm}
        if not all(is_plain(module, kind) for module, kind in kinds.items()):
            return norm(parts(pixels, height, width, mean, std))
        table_ND = parts.position(position.weight, height, width)
        tensors = (patch.weight, parts.class_embedding, table_ND, norm.weight, norm.bias)
        return patch_embed(pixels, *tensors, eps=norm.eps, mean=mean, std=std)

    def forward(
        self,
        pixels: torch.Tensor,
        last_layer: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        keep: Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool = False,
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
        """Hidden states 0 … `last_layer` ([B, N, D] each) and, if asked for, the attention weights of each layer.

        Args:
            pixels: uint8 [B, H, W, 3], or floating [B, 3, H, W] normalised.
            last_layer: index of the last hidden state to compute (see `resolve`).
            mean, std: normalisation of uint8 pixels.
            keep: indices of the hidden states to return; every other entry is None. Default: all.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.
        """
        height, width = pixels.shape[1:3] if pixels.dtype == torch.uint8 else pixels.shape[-2:]
        size = self.config.image_size
        if not interpolate_pos_encoding and (height, width) != (size, size):
            raise ValueError(
                f"pixel_values are {height}×{width}, but the vision tower takes {size}×{size}; "
                "pass interpolate_pos_encoding=True for other sizes"
            )
        x_BND = self._embed(pixels, height, width, mean, std)
        ranges = KeyRanges.full(x_BND.shape[0], x_BND.shape[1], x_BND.device)
        states: list[torch.Tensor | None] = []
        attentions: list[torch.Tensor] = []
        added_BND: torch.Tensor | None = None
        for layer in self.encoder.layers[:last_layer]:
            if added_BND is not None and layer.gradient_checkpointing and self.training:
                x_BND, added_BND = x_BND + added_BND, None  # activation checkpointing then saves one tensor, not two
            state, x_BND, added_BND, weights = layer(x_BND, added_BND, ranges, output_attentions)
            states.append(state if keep is None or len(states) in keep else None)
            if weights is not None:
                attentions.append(weights)
        states.append(x_BND if added_BND is None else x_BND + added_BND)
        return states, attentions


def projector_layers(config: LlavaConfig) -> int:
    """Number of linear layers in the projector, from `config.mm_projector_type` (LLaVA-1.5: mlp2x_gelu).

    Raises:
        ValueError: for a type that is none of linear, mlpNx_gelu, identity.
    """
    kind = getattr(config, "mm_projector_type", "mlp2x_gelu")
    if kind in ("linear", "identity"):
        return int(kind == "linear")
    count = kind.removeprefix("mlp").removesuffix("x_gelu")
    if kind != f"mlp{count}x_gelu" or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"mm_projector_type is {kind!r}; expected 'linear', 'mlpNx_gelu' or 'identity'")
    return int(count)


class Projector(nn.Module):
    """linear_1 … linear_N with GELU between them."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        vision_width = tower_config(config).hidden_size * len(feature_layers(config))
        width = text_config(config).hidden_size
        count = projector_layers(config)
        if count == 0 and vision_width != width:
            raise ValueError(
                f"an identity projector needs equal widths, but the tower has {vision_width}, the text {width}"
            )
        self.layers = [f"linear_{i + 1}" for i in range(count)]
        for i, name in enumerate(self.layers):
            setattr(self, name, nn.Linear(width if i else vision_width, width, config.multimodal_projector_bias))
        self.input_width = vision_width
        self.act = None if config.projector_hidden_act == "gelu" else ACT2FN[config.projector_hidden_act]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        layers = [getattr(self, name) for name in self.layers]
        # The fused operation reads the weights directly, which would bypass a wrapped or hooked linear layer.
        if self.act is None and all(is_plain(layer, nn.Linear) for layer in layers):
            return projector(features, [layer.weight for layer in layers], [layer.bias for layer in layers])
        act = self.act or nn.functional.gelu
        for i, layer in enumerate(layers):
            features = layer(act(features) if i else features)
        return features
