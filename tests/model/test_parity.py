"""The same numbers as transformers' LlavaForConditionalGeneration, on random weights, over a grid of configs."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# Row layouts: text lengths and images, see `batch` in conftest.py.
MIXED = [[4, "image", 6], [9], [2, "image", 3, "image", 7]]  # one image, text alone, two images
SIDE_BY_SIDE = [["image", "image", 5], [3, "image", 2], [1, "image", 1, "image", "image", 4]]
TEXT_ALONE = [[11], [5], [17]]
ONE_ROW = [[5, "image", 12]]
SAME_LENGTH = [[3, "image", 4], [3, "image", 4]]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500000.0,
}
LONGROPE = {  # four frequencies for heads of 8; the long ones apply past 16 tokens
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
    "factor": 4.0,
    "rope_theta": 10000.0,
}
EVERYTHING = {
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "rope_parameters": YARN,
    "rms_norm_eps": 1e-5,
}

# name: (arguments of `config`, rows)
CASES: dict[str, tuple[dict[str, Any], list]] = {
    "llama": ({}, MIXED),
    "gqa": ({"text": {"num_key_value_heads": 2}}, MIXED),
    "mqa": ({"text": {"num_key_value_heads": 1}}, SIDE_BY_SIDE),
    "tied": ({"text": {"tie_word_embeddings": True}}, MIXED),
    "tied-by-llava-config": ({"tie_word_embeddings": True}, MIXED),
    "attention-bias": ({"text": {"attention_bias": True}}, MIXED),
    "mlp-bias": ({"text": {"mlp_bias": True}}, SIDE_BY_SIDE),
    "rope-theta": ({"text": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}}, MIXED),
    "rope-linear": (
        {"text": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}},
        MIXED,
    ),
    "rope-dynamic": (
        {
            "text": {
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
                "max_position_embeddings": 16,  # the sequences are longer, so that the scaling applies
            }
        },
        MIXED,
    ),
    "rope-yarn": ({"text": {"rope_parameters": YARN}}, MIXED),
    "rope-llama3": ({"text": {"rope_parameters": LLAMA3, "num_key_value_heads": 2}}, MIXED),
    "rope-longrope": ({"text": {"rope_parameters": LONGROPE, "max_position_embeddings": 64}}, MIXED),
    "feature-layers": ({"vision_feature_layer": [-3, -1]}, MIXED),
    "feature-layers-unsorted": ({"vision_feature_layer": [3, -3, 2]}, MIXED),
    "feature-layer-first": ({"vision_feature_layer": 1}, MIXED),
    "feature-layer-last": ({"vision_feature_layer": -1}, MIXED),
    "full": ({"vision_feature_select_strategy": "full"}, SIDE_BY_SIDE),
    "full-feature-layers": ({"vision_feature_select_strategy": "full", "vision_feature_layer": [1, 2]}, MIXED),
    "image-not-divisible": ({"vision": {"image_size": 17, "patch_size": 5}}, MIXED),
    "one-patch": ({"vision": {"image_size": 7, "patch_size": 7}}, SIDE_BY_SIDE),
    "head-dim-12": ({"text": {"hidden_size": 48}, "vision": {"hidden_size": 36, "num_attention_heads": 3}}, MIXED),
    "head-dim-80": ({"text": {"head_dim": 80, "num_attention_heads": 2, "num_key_value_heads": 1}}, MIXED),
    "vision-head-dim-80": ({"vision": {"hidden_size": 80, "num_attention_heads": 1}}, ONE_ROW),
    "mistral": ({"kind": "mistral", "text": {"sliding_window": None, "num_key_value_heads": 2}}, MIXED),
    "mistral-sliding-window": ({"kind": "mistral", "text": {"sliding_window": 7, "num_key_value_heads": 2}}, MIXED),
    "mistral-wide-window": ({"kind": "mistral", "text": {"sliding_window": 40}}, MIXED),
    "vision-gelu": ({"vision": {"hidden_act": "gelu"}}, MIXED),
    "vision-other-act": ({"vision": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}}, MIXED),
    "text-other-act": ({"text": {"hidden_act": "gelu_pytorch_tanh"}}, MIXED),
    "projector-no-bias": ({"multimodal_projector_bias": False}, MIXED),
    "projector-other-act": ({"projector_hidden_act": "relu"}, MIXED),
    "several-images": ({}, SIDE_BY_SIDE),
    "no-images": ({}, TEXT_ALONE),
    "one-row": ({}, ONE_ROW),
    "same-length": ({}, SAME_LENGTH),
    "everything": (
        {"text": EVERYTHING, "vision_feature_layer": [-1, -2], "vision_feature_select_strategy": "full"},
        MIXED,
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tiny: SimpleNamespace) -> SimpleNamespace:
    arguments, rows = CASES[request.param]
    config = tiny.config(**arguments)
    model, theirs = tiny.pair(config)
    return SimpleNamespace(config=config, rows=rows, ours=model, theirs=theirs)


def test_logits_loss_and_gradients(case: SimpleNamespace, tiny: SimpleNamespace) -> None:
    for side in ("right", "left"):
        inputs = tiny.batch(case.config, case.rows, side)
        case.ours.zero_grad()
        case.theirs.zero_grad()
        actual, expected = case.ours(**inputs), case.theirs(**inputs)
        real = inputs["attention_mask"].bool()
        tiny.assert_near(actual.logits[real], expected.logits[real], 1e-5, f"logits, {side} padding")
        tiny.assert_near(actual.loss, expected.loss, 1e-5, f"loss, {side} padding")
        if "pixel_values" in inputs:
            tiny.assert_near(actual.image_hidden_states, expected.image_hidden_states, 1e-5, "image features")
        actual.loss.backward()
        expected.loss.backward()
        tiny.assert_gradients_near(case.ours, case.theirs, 1e-4)


def test_greedy_tokens(case: SimpleNamespace, tiny: SimpleNamespace) -> None:
    """Equal tokens mean something where every choice was clear: the runner-up is at least a hundred times further
    away than the two models differ. So the prompts are the first ones that make transformers' choices clear."""
    for seed in range(12):
        inputs = tiny.prompt(tiny.batch(case.config, case.rows, "left", seed))
        expected = case.theirs.generate(**inputs, generation_config=tiny.greedy())
        theirs = torch.stack(expected.logits)
        best = theirs.index_fill(-1, torch.tensor(tiny.SUPPRESSED), float("-inf")).topk(2).values
        margin = float((best[..., 0] - best[..., 1]).min())
        if margin > 3e-4 * float(theirs.abs().max()):
            break
    actual = case.ours.generate(**inputs, generation_config=tiny.greedy())
    ours = torch.stack(actual.logits)
    assert expected.sequences.shape[1] == inputs["input_ids"].shape[1] + 32
    assert expected.sequences[:, -32:].unique().numel() > 5  # not one token over and over
    assert torch.equal(actual.sequences, expected.sequences)
    tiny.assert_near(ours, theirs, 1e-5, "logits of the steps")
    difference = float((ours - theirs).abs().max())
    assert margin >= 100 * difference, f"smallest margin {margin:.3g}, largest difference {difference:.3g}"


def test_batched_generation_is_one_by_one(case: SimpleNamespace, tiny: SimpleNamespace) -> None:
    inputs = tiny.batch(case.config, case.rows, "left")
    alone = copy.deepcopy(case.ours)
    batched = case.ours.generate(**tiny.prompt(inputs), generation_config=tiny.greedy())
    rows = list(range(len(case.rows)))
    if case.config.text_config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        # These scale with the longest row seen so far, by definition: only that row is the same by itself.
        rows = [int(inputs["attention_mask"].sum(1).argmax())]
    for row in rows:
        one = alone.generate(**tiny.prompt(tiny.single(inputs, row)), generation_config=tiny.greedy())
        assert torch.equal(one.sequences[0, -32:], batched.sequences[row, -32:]), f"row {row}"
        tiny.assert_near(torch.stack(batched.logits)[:, row], torch.stack(one.logits)[:, 0], 1e-5, f"row {row}")
