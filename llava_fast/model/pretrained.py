"""The PreTrainedModel base class: supported features, modules that must not be split, weight initialisation."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlavaConfig, PreTrainedModel
from transformers import initialization as init

from llava_fast.model.vision import VisionAttention, VisionEmbeddings, VisionMLP, tower_config


class LlavaPreTrainedModel(PreTrainedModel):
    config: LlavaConfig
    config_class = LlavaConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012  (the base class wants lists)
    supports_gradient_checkpointing = True
    # The tower reads its embedding weights without calling the module, so FSDP and device maps must not split it.
    _no_split_modules = ["DecoderLayer", "VisionTower"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Attention always uses key ranges; these flags only make transformers accept any `attn_implementation`.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: if True, transformers does not call `_init_weights` for modules without parameters of their own."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """CLIP's own scheme for the tower, a normal distribution with the text config's range elsewhere."""
        super()._init_weights(module)
        vision = tower_config(self.config)
        width, factor = vision.hidden_size, vision.initializer_factor
        narrow = width**-0.5 * (2 * vision.num_hidden_layers) ** -0.5 * factor
        if isinstance(module, VisionEmbeddings):
            init.normal_(module.class_embedding, std=width**-0.5 * factor)
            init.normal_(module.patch_embedding.weight, std=vision.initializer_range * factor)
            init.normal_(module.position_embedding.weight, std=vision.initializer_range * factor)
        elif isinstance(module, VisionAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.normal_(projection.weight, std=narrow)
            init.normal_(module.out_proj.weight, std=width**-0.5 * factor)
        elif isinstance(module, VisionMLP):
            init.normal_(module.fc1.weight, std=(2 * width) ** -0.5 * factor)
            init.normal_(module.fc2.weight, std=narrow)
