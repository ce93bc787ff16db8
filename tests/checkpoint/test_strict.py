"""A key that is missing, unexpected or mis-shaped is an error of one line that names it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_fast.checkpoint.layouts import classic_name
from llava_fast.drop_in import LlavaForConditionalGeneration
from tests.checkpoint.files import LAYOUTS, assert_same, store, write


@pytest.mark.parametrize("layout", ["classic", "memory-4.57"])
@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.1.mlp.up_proj.weight",
        "model.multi_modal_projector.linear_2.bias",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "model.vision_tower.encoder.layers.2.mlp.fc1.weight",  # never read, and still a part of the checkpoint
    ],
)
def test_missing_misshaped_and_unexpected_keys(tiny: SimpleNamespace, tmp_path: Path, layout: str, name: str) -> None:
    rename = LAYOUTS[layout]
    model = tiny.ours(tiny.config())
    weights = write(model, tmp_path, rename)
    full = weights.pop(rename(name))

    def refused() -> str:
        store(weights, tmp_path)
        with pytest.raises(ValueError) as caught:
            LlavaForConditionalGeneration.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        return str(caught.value)

    assert f"missing {name}" in refused()
    weights[rename(name)] = full[1:].contiguous()
    assert f"{name} has shape {list(full[1:].shape)}, expected {list(full.shape)}" in refused()
    weights[rename(name)] = full
    extra = rename(name).replace("weight", "scale").replace("bias", "scale")
    weights[extra] = full.clone()
    assert "unexpected" in refused()
    assert extra.rsplit(".", 2)[-2] + ".scale" in refused()


def test_many_missing_keys_are_one_line(tiny: SimpleNamespace, tmp_path: Path) -> None:
    weights = write(tiny.ours(tiny.config()), tmp_path, classic_name)
    text = {name: weight for name, weight in weights.items() if name.startswith("language_model")}
    store(text, tmp_path)
    with pytest.raises(ValueError, match=r"missing model.multi_modal_projector.linear_1.bias.* and \d+ more"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_an_untied_checkpoint_without_a_head_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    weights = write(tiny.ours(tiny.config()), tmp_path, classic_name)
    del weights["language_model.lm_head.weight"]
    store(weights, tmp_path)
    with pytest.raises(ValueError, match=r"missing lm_head.weight"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_ignored_mismatches(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """transformers' own switch, for a head of another size: the rest still has to be complete."""
    weights = write(tiny.ours(tiny.config()), tmp_path, classic_name)
    weights["multi_modal_projector.linear_2.bias"] = torch.zeros(7)
    store(weights, tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert model.model.multi_modal_projector.linear_2.bias.shape == (32,)


def test_derived_buffers_of_old_files_are_passed_over(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.ours(tiny.config())
    weights = write(model, tmp_path, classic_name)
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    store(weights, tmp_path)
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path), model)
