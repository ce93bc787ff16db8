"""The projector: from the tower's features to the language model's embedding space."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlavaConfig
from transformers.activations import ACT2FN

from llava_fast.model.language import text_config
from llava_fast.model.plain import is_plain
from llava_fast.model.vision import feature_layers, tower_config
from llava_fast.ops.projector import projector


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
        # The fused operation reads the weights itself, so a child that somebody has wrapped or hooked is called.
        if self.act is None and all(is_plain(layer, nn.Linear) for layer in layers):
            return projector(features, [layer.weight for layer in layers], [layer.bias for layer in layers])
        act = self.act or nn.functional.gelu
        for i, layer in enumerate(layers):
            features = layer(act(features) if i else features)
        return features
