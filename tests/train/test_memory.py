"""Memory that training will need, predicted: parameters and bytes of LLaVA-1.5-7B, counted by hand."""

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_fast.train.memory import count_parameters, predict
from llava_fast.train.recipe import Recipe

TOWER = 303_507_456  # CLIP ViT-L/14-336 with post_layernorm
PROJECTOR = (1024 + 1) * 4096 + (4096 + 1) * 4096
LAYER = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
LANGUAGE = 32 * LAYER + 2 * 32000 * 4096 + 4096
LORA = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))


@pytest.fixture(scope="module")
def llava_7b() -> LlavaConfig:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = CLIPVisionConfig(**sizes, image_size=336, patch_size=14)
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32000))


def test_parameters_of_llava_7b(llava_7b):
    n = count_parameters(llava_7b, recipe_7b("lora"))
    assert (n.tower, n.projector, n.language, n.lora) == (TOWER, PROJECTOR, LANGUAGE, LORA)
    assert (n.language, n.adapted_per_layer) == (6_738_415_616, 7)
    embedding = 2 * 577 * 1024 - 577 * 1024 + 1024 + 3 * 14 * 14 * 1024 + 4 * 1024
    layer = 4 * (1024 + 1) * 1024 + (1024 + 1) * 4096 + (4096 + 1) * 1024 + 4 * 1024
    assert embedding + 24 * layer == TOWER


def recipe_7b(stage: str, **keys) -> Recipe:
    return Recipe(stage=stage, data="a.json", model="b", output_dir="c", **keys)


@pytest.mark.parametrize(
    ("stage", "frozen", "trained", "per_layer"),
    [
        # elements a token and layer: x, h, q, k, v, o of 4096, gate and up of 11008; LoRA adds 7 products of rank 128
        ("projector", TOWER + LANGUAGE, PROJECTOR, 6 * 4096 + 2 * 11008),
        ("full", TOWER, PROJECTOR + LANGUAGE, 6 * 4096 + 2 * 11008),
        ("lora", TOWER + LANGUAGE, PROJECTOR + LORA, 6 * 4096 + 2 * 11008 + 7 * 128),
    ],
)
def test_predicted_memory_of_llava_7b(llava_7b, stage, frozen, trained, per_layer):
    plain = predict(recipe_7b(stage), llava_7b, 832)
    assert plain.frozen_weights == 2 * frozen
    assert plain.trained_state == 16 * trained  # fp32 weight, gradient and two moments
    assert plain.activations == 832 * 32 * per_layer * 2
    assert plain.total == 2 * frozen + 16 * trained + 832 * 32 * per_layer * 2
    checkpointed = predict(recipe_7b(stage, gradient_checkpointing=True), llava_7b, 832)
    assert checkpointed.activations == 832 * (32 * 4096 + per_layer) * 2
    fp32 = predict(recipe_7b(stage, dtype="fp32"), llava_7b, 832)
    assert (fp32.frozen_weights, fp32.trained_state) == (4 * frozen, 16 * trained)
    assert fp32.activations == 2 * plain.activations


def test_a_trained_tower_moves_from_frozen_to_trained(llava_7b):
    layer = 4 * (1024 + 1) * 1024 + (1024 + 1) * 4096 + (4096 + 1) * 1024 + 4 * 1024
    unused = layer + 2 * 1024  # the last layer and post_layernorm, which LLaVA does not read
    for keys, trained in (({}, TOWER - unused), ({"vision_layers": 4}, 4 * layer)):
        plain = predict(recipe_7b("full", vision_learning_rate=2e-6, **keys), llava_7b, 832)
        assert plain.trained_state == 16 * (PROJECTOR + LANGUAGE + trained)
        assert plain.frozen_weights == 2 * (TOWER - trained)


def test_predicted_memory_in_round_numbers(llava_7b):
    """13.48 + 0.61 GB of weights, 0.34 GB and 5.1 GB of state, 2.48 GB of activations a sample."""
    stage1, lora = predict(recipe_7b("projector"), llava_7b, 832), predict(recipe_7b("lora"), llava_7b, 832)
    assert round(stage1.frozen_weights / 1e9, 2) == 14.08
    assert round(stage1.trained_state / 1e9, 2) == 0.34
    assert round((lora.trained_state - stage1.trained_state) / 1e9, 1) == 5.1
    assert round(stage1.activations / 1e9, 2) == 2.48
    assert round(lora.activations / 1e9, 2) == 2.53


def test_grouped_queries_and_a_rank_change_the_prediction(llava_7b):
    text = LlamaConfig(vocab_size=32000, num_key_value_heads=8)
    grouped = LlavaConfig(vision_config=llava_7b.vision_config, text_config=text)
    saved = (
        predict(recipe_7b("projector"), llava_7b, 1).activations
        - predict(recipe_7b("projector"), grouped, 1).activations
    )
    assert saved == 2 * (4096 - 1024) * 32 * 2  # keys and values of 8 heads instead of 32
    rank = predict(recipe_7b("lora", lora={"r": 64}), llava_7b, 1)
    assert rank.trained_state == 16 * (PROJECTOR + LORA // 2)
