"""The PreTrainedModel base classes: supported features, modules that must not be split, weight initialisation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlavaConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

logger = logging.get_logger(__name__)


class _PreTrainedModel(PreTrainedModel):
    supports_gradient_checkpointing = True
    # The tower reads its embedding weights without calling the module, so FSDP and device maps must not split it.
    _no_split_modules = ["DecoderLayer", "VisionTower"]  # noqa: RUF012  (the base class wants lists)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Attention always uses key ranges; these flags, and the two methods on attention, only make transformers accept any
    # `attn_implementation`.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: if True, transformers does not call `_init_weights` for modules without parameters of their own."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """Flash attention is noted as "sdpa": no library is needed here, and `generate` has none of its limits."""
        if attn_implementation is not None and "flash" in attn_implementation:
            return "sdpa"
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


class LlavaPreTrainedModel(_PreTrainedModel):
    config: LlavaConfig
    config_class = LlavaConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012


class LlavaPart(_PreTrainedModel):
    """Vision tower or language model. As in transformers each is a PreTrainedModel, with its own config, plan for
    tensor parallelism and `_init_weights`; `LlavaModel` initialises the weights of both with its own."""

    base_model_prefix = "replaced_by_liger"  # Liger patches the modules of the attribute that this names

    @property
    def base_model(self) -> LlavaPart:
        return self

    @property
    def replaced_by_liger(self) -> SimpleNamespace:
        """The modules that Liger finds for its kernels: none, because ours are as fused as its own."""
        logger.warning_once("Liger's kernels are not applied: llava-fast's own operations are fused already")
        return SimpleNamespace(norm=SimpleNamespace(), layers=())

    def init_weights(self) -> None:
        pass


@torch.no_grad()
def init_clip(module: Any, config: CLIPVisionConfig) -> None:
    """Initialise the matrices of a module of the tower by CLIP's own scheme."""
    width, factor = config.hidden_size, config.initializer_factor
    narrow = width**-0.5 * (2 * config.num_hidden_layers) ** -0.5 * factor
    if hasattr(module, "class_embedding"):
        init.normal_(module.class_embedding, std=width**-0.5 * factor)
        init.normal_(module.patch_embedding.weight, std=config.initializer_range * factor)
        init.normal_(module.position_embedding.weight, std=config.initializer_range * factor)
    elif hasattr(module, "out_proj"):
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            init.normal_(projection.weight, std=narrow)
        init.normal_(module.out_proj.weight, std=width**-0.5 * factor)
    elif hasattr(module, "fc1"):
        init.normal_(module.fc1.weight, std=(2 * width) ** -0.5 * factor)
        init.normal_(module.fc2.weight, std=narrow)
