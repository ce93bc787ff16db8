"""Predicts the device memory of a recipe from the model's config, by a formula. Nothing here is measured.

    frozen weights     parameters · bytes of the recipe's dtype
    trained state      parameters · 16 bytes: fp32 weight, gradient and Adam's two moments
    activations        tokens · layers · (2 H + Q + 2 K + Q + 2 I) · bytes of the dtype: saved tensors of the language
                       model for one pack, if norms and SwiGLU products are recomputed: the two residuals, q, k, v, the
                       attention's output, gate and up; with LoRA of rank r also r for each adapted linear layer
    … checkpointed     tokens · layers · H · bytes, plus one layer as above while it is recomputed

H hidden, Q = heads · head_dim, K = key-value heads · head_dim, I intermediate size. For one device that holds the
whole model. Not included, hence "at least": the chunk of logits (128 MiB on a GPU), activations of the tower, pixels,
buckets of distributed training, the CUDA context and memory cached by the allocator. ZeRO and FSDP divide sharded
tensors by the number of devices. Without kernels (on a CPU) activations are several times larger.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, LlavaConfig

from llava_fast.checkpoint.adapter import base_of, is_adapter
from llava_fast.checkpoint.reader import open_checkpoint
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.errors import blaming
from llava_fast.hub import local_folder
from llava_fast.train.recipe import Recipe
from llava_fast.train.stages import trained_tower

STATE_BYTES = 16  # per trained parameter
_ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; `lora` is that of an adapter of the recipe's rank, 0 without one."""

    tower: int
    trained_tower: int  # those of its parameters that the recipe trains
    projector: int
    language: int  # embeddings and head included
    lora: int
    adapted_per_layer: int  # linear layers of a decoder layer


@dataclass(frozen=True)
class Prediction:
    """A lower bound of the bytes on one device."""

    frozen_weights: int
    trained_state: int
    activations: int

    @property
    def total(self) -> int:
        return self.frozen_weights + self.trained_state + self.activations


def read_config(recipe: Recipe) -> LlavaConfig:
    """The config of the model that the recipe starts from, in any layout; no weights are read.

    Raises:
        OSError, ValueError: for a checkpoint that cannot be opened; the message names the file.
    """
    if recipe.model is not None:
        folder = local_folder(recipe.model)
        return open_checkpoint(local_folder(base_of(folder, None, {})) if is_adapter(folder) else folder).config
    vision_tower, language_model = (local_folder(name, ()) for name in recipe.assembled_from)
    with blaming(vision_tower):
        vision = AutoConfig.from_pretrained(vision_tower, trust_remote_code=False)
    with blaming(language_model):
        text = AutoConfig.from_pretrained(language_model, trust_remote_code=False)
    return LlavaConfig(vision_config=getattr(vision, "vision_config", vision), text_config=text)


def count_parameters(config: LlavaConfig, recipe: Recipe) -> Parameters:
    """Count the parameters of a model on "meta"."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    tower, projector, total = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (model.model.vision_tower, model.model.multi_modal_projector, model)
    )
    trained = [parameter for module in trained_tower(recipe, model).values() for parameter in module.parameters()]
    linears = [module for module in model.model.language_model.modules() if isinstance(module, nn.Linear)]
    return Parameters(
        tower=tower,
        trained_tower=sum(parameter.numel() for parameter in trained),
        projector=projector,
        language=total - tower - projector,
        lora=(recipe.lora.r if recipe.lora else 0)
        * sum(linear.in_features + linear.out_features for linear in linears),
        adapted_per_layer=len(linears) // config.get_text_config().num_hidden_layers,
    )


def predict(recipe: Recipe, config: LlavaConfig, pack_tokens: int) -> Prediction:
    """Predict the memory of training with a recipe.

    Args:
        pack_tokens: tokens of the largest device batch.
    """
    rank = recipe.lora.r if recipe.lora else 0
    n = count_parameters(config, recipe)
    trained = n.trained_tower + n.projector + {"projector": 0, "full": n.language, "lora": n.lora}[recipe.stage]
    frozen = n.tower - n.trained_tower + (0 if recipe.stage == "full" else n.language)
    text, item = config.get_text_config(), _ITEM_BYTES[recipe.dtype]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    layer = 2 * text.hidden_size + 2 * queries + 2 * keys + 2 * text.intermediate_size + rank * n.adapted_per_layer
    if recipe.gradient_checkpointing:
        saved = text.num_hidden_layers * text.hidden_size + layer
    else:
        saved = text.num_hidden_layers * layer
    return Prediction(
        frozen_weights=frozen * item,
        trained_state=trained * STATE_BYTES,
        activations=pack_tokens * saved * item,
    )
