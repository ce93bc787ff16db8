"""transformers' common model tests on our classes and on its own, with the tiny LLaVA of transformers' tests.

Run by `common.py`, which provides `transformers_tests`. Our tower has no dropout in attention, so it is 0 for both.
"""

import unittest
from typing import Any, ClassVar

import torch
import transformers
from transformers import LlavaConfig
from transformers_tests.tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from llava_fast import LlavaForConditionalGeneration, LlavaModel

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 37}
TEXT = {**LAYERS, "model_type": "llama", "vocab_size": 99, "hidden_act": "gelu", "pad_token_id": 1}
VISION = {**LAYERS, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 2, "projection_dim": 32}
IMAGE_TOKENS = (VISION["image_size"] // VISION["patch_size"]) ** 2


class TinyLlava:
    """What the mixin asks about the model."""

    is_training = True
    batch_size, seq_length = 3, IMAGE_TOKENS + 7
    encoder_seq_length = seq_length
    text_config, vision_config = TEXT, VISION
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    pad_token_id = TEXT["pad_token_id"]

    def get_config(self) -> LlavaConfig:
        return LlavaConfig(
            text_config=dict(TEXT),
            vision_config=dict(VISION),
            image_token_index=0,
            vision_feature_layer=-1,
            image_seq_length=IMAGE_TOKENS,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[LlavaConfig, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], TEXT["vocab_size"] - 2) + 2
        input_ids[:, :IMAGE_TOKENS] = 0
        pixels = floats_tensor([self.batch_size, 3, VISION["image_size"], VISION["image_size"]])
        inputs = {"pixel_values": pixels, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        return self.get_config(), inputs


class Ours(ModelTesterMixin, unittest.TestCase):
    all_model_classes: ClassVar[Any] = (LlavaModel, LlavaForConditionalGeneration)
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = TinyLlava()


class Theirs(Ours):
    all_model_classes = (transformers.LlavaModel, transformers.LlavaForConditionalGeneration)
