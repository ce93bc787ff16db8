"""Names and configs from layout to layout, and other versions of transformers reading what we write."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import CLIPVisionConfig

from llava_fast.checkpoint.layouts import (
    KEY_MAPPING,
    NAMES,
    classic_name,
    grown_vocabulary,
    hf_names,
    is_original,
    kept_vocabulary,
    legacy_rope,
    llava_config,
    original_config,
    original_name,
    our_name,
    projector_type,
)

# Of liuhaotian/llava-v1.5-7b, as far as it matters here.
RELEASED = {
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "vocab_size": 32000,
}
FILE = Path("somewhere/config.json")


def tower(**settings: Any) -> CLIPVisionConfig:
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPVisionConfig(**{**large, "patch_size": 14, "image_size": 336, "projection_dim": 768, **settings})


def spelled(name: str, layout: str) -> str:
    """A parameter's name in one column of the table; the original's projector counts otherwise."""
    row = next(row for row in NAMES if name.startswith(row.ours))
    if layout == "original" and "projector" in name:
        return original_name(name)
    return getattr(row, layout) + name.removeprefix(row.ours)


@pytest.mark.parametrize("clip", ["vision_model.", ""], ids=["", "without-vision_model"])
@pytest.mark.parametrize("layout", ["ours", "on_disk", "in_memory_4", "original"])
def test_every_parameter_there_and_back(tiny: SimpleNamespace, layout: str, clip: str) -> None:
    found = set()
    for name in tiny.ours(tiny.config()).state_dict():
        key = spelled(name, layout).replace("vision_model.", clip)
        found.add(key)
        assert our_name(key) == name
        assert our_name(our_name(key)) == name
        if layout != "original":  # as transformers does it: each pattern in turn
            renamed = key
            for pattern, ours in KEY_MAPPING.items():
                renamed = re.sub(pattern, ours, renamed)
            assert renamed == name
            assert key in hf_names(name)
    assert len(found) == 80


def test_what_is_written(tiny: SimpleNamespace) -> None:
    for name in tiny.ours(tiny.config()).state_dict():
        assert classic_name(name) == spelled(name, "on_disk")
        assert original_name(name) == spelled(name, "original")
        for write in (classic_name, original_name):
            assert "vision" not in name or "vision_tower.vision_model." in write(name)


def test_names_on_disk() -> None:
    assert classic_name("lm_head.weight") == "language_model.lm_head.weight"
    assert classic_name("model.language_model.norm.weight") == "language_model.model.norm.weight"
    assert classic_name("model.multi_modal_projector.linear_1.bias") == "multi_modal_projector.linear_1.bias"
    assert classic_name("model.vision_tower.pre_layrnorm.bias") == "vision_tower.vision_model.pre_layrnorm.bias"
    with pytest.raises(ValueError, match=r"'model.norm.weight' is not the name of a parameter"):
        classic_name("model.norm.weight")


@pytest.mark.parametrize(
    ("ours", "original"),
    [
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.language_model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.multi_modal_projector.linear_1.weight", "model.mm_projector.0.weight"),
        ("model.multi_modal_projector.linear_2.bias", "model.mm_projector.2.bias"),
        ("model.multi_modal_projector.linear_3.bias", "model.mm_projector.4.bias"),
        (
            "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
            "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        ),
    ],
)
def test_names_of_the_original(ours: str, original: str) -> None:
    assert original_name(ours) == original
    assert our_name(original) == ours
    assert our_name(ours) == ours
    assert our_name(classic_name(ours)) == ours
    assert our_name(f"base_model.model.{original}") == (ours if "projector" in ours else f"base_model.model.{original}")


def test_a_linear_projector_has_no_number() -> None:
    assert original_name("model.multi_modal_projector.linear_1.bias", "linear") == "model.mm_projector.bias"
    assert our_name("model.mm_projector.bias") == "model.multi_modal_projector.linear_1.bias"
    assert our_name("model.mm_projector.1.weight") == "model.mm_projector.1.weight"  # where the activation is
    assert our_name("model.image_newline") == "model.image_newline"
    with pytest.raises(ValueError, match=r"'model.norm.weight' is not the name of a parameter"):
        original_name("model.norm.weight")


def test_projector_type_from_its_parameters() -> None:
    names = [f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2, 3)]
    assert [projector_type(names[:n]) for n in range(4)] == ["identity", "linear", "mlp2x_gelu", "mlp3x_gelu"]


def test_which_configs_are_the_originals() -> None:
    assert is_original(RELEASED)
    assert is_original({"model_type": "llava_llama"})
    assert not is_original({"model_type": "llava", "text_config": {}, "mm_vision_tower": "kept by a conversion"})
    assert not is_original({"model_type": "llama"})


def test_the_released_config_becomes_hfs() -> None:
    """The numbers of llava-hf/llava-1.5-7b-hf."""
    config = llava_config(RELEASED, tower(), FILE)
    assert (config.image_token_index, config.pad_token_id, config.text_config.vocab_size) == (32000, 32001, 32064)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.image_seq_length == 576
    text = config.text_config
    assert (text.model_type, text.hidden_size, text.rms_norm_eps, text.max_position_embeddings) == (
        "llama",
        4096,
        1e-5,
        4096,
    )
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert str(config.dtype).endswith("float16")

    back = original_config(config, mm_vision_tower=None, tower_inside=False)
    assert kept_vocabulary(config) == 32000
    assert "image_token_index" not in back
    assert back["model_type"] == "llava_llama"
    changed = {"_name_or_path", "model_type", "transformers_version"}
    assert {key: back[key] for key in RELEASED.keys() - changed} == {
        key: value for key, value in RELEASED.items() if key not in changed
    }


def test_a_vocabulary_that_grew_since_is_kept() -> None:
    config = llava_config(RELEASED, tower(), FILE)
    config.text_config.vocab_size = 32128
    assert kept_vocabulary(config) == 32128
    assert original_config(config, mm_vision_tower=None, tower_inside=True)["image_token_index"] == 32000
    assert [grown_vocabulary(n) for n in (32000, 32003, 62, 63)] == [32064, 32064, 64, 128]


def test_old_names_of_rotary_settings() -> None:
    assert legacy_rope({"rope_type": "default", "rope_theta": 5e5}) == {"rope_theta": 5e5, "rope_scaling": None}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert legacy_rope(linear)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert legacy_rope(linear, "type")["rope_scaling"] == {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "mlp2x_relu"}, "mm_projector_type is 'mlp2x_relu'; expected 'linear'"),
        ({"mm_projector_type": "mlp0x_gelu"}, "mm_projector_type is 'mlp0x_gelu'; expected 'linear'"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is 'cls', expected 'patch' or 'cls_patch'"),
        ({"mm_vision_select_layer": [-2, -5]}, "mm_vision_select_layer is .-2, -5., expected a number"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'unpad' .* not supported"),
        ({"vocab_size": None}, "vocab_size is None, expected a number"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', expected a number"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{FILE}: .*{message}") as caught:
        llava_config({**RELEASED, **change}, tower(), FILE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("llava", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\]; the original layout takes one"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False; the original layout knows only"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; the original layout knows only 'gelu'"),
        ({"image_attention": "bidirectional"}, "image_attention is 'bidirectional'; the original layout knows only"),
        ({}, "names its CLIP directory, and this model does not say which: pass mm_vision_tower"),
    ],
)
def test_what_the_original_cannot_express_is_refused_before_anything_is_written(
    tiny: SimpleNamespace, tmp_path: Path, llava: dict[str, Any], message: str
) -> None:
    model = tiny.ours(tiny.config(**llava))
    with pytest.raises(ValueError, match=message) as caught:
        model.save_pretrained(tmp_path / "out", layout="original", mm_vision_tower="clip" if llava else None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def versions() -> ModuleType:
    """The script that loads checkpoints in several versions; here it runs in the one that is installed."""
    file = Path(__file__).parents[1] / "compat" / "load_in_transformers.py"
    spec = importlib.util.spec_from_file_location("load_in_transformers", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_written_loads_in_this_version_of_transformers(versions: ModuleType, tmp_path: Path) -> None:
    versions.make(tmp_path)
    assert versions.check(tmp_path) == dict.fromkeys(sorted(versions.CASES), "")


def test_the_script_would_notice(versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "CASES", {"theta": versions.CASES["theta"]})
    versions.make(tmp_path)
    file = tmp_path / "hf" / "theta" / "config.json"
    config = json.loads(file.read_text())
    assert config["text_config"]["rope_theta"] == 500000.0  # the name that transformers 4 knows
    assert config["text_config"]["rope_scaling"] is None
    assert config["text_config"]["dtype"] == config["vision_config"]["dtype"] == "float32"
    config["text_config"]["rope_parameters"]["rope_theta"] = config["text_config"]["rope_theta"] = 10000.0
    file.write_text(json.dumps(config))
    assert "logits are off by" in versions.check(tmp_path)["theta"]
