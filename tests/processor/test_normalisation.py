"""A processor's uint8 pixels and its float ones give a model the same logits, whatever its settings; a processor with
other settings than the model's is refused in one line."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from llava_fast import chat
from llava_fast.convert import convert
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.ops.patch_embed import Normalisation, noted_normalisation
from llava_fast.processor.processor import LlavaProcessor
from llava_fast.train.recipe import Recipe
from llava_fast.train.stages import prepare_model
from llava_fast.train.trainer import load_processor

NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 33, 3), np.uint8))
PROMPT = {"images": NOISE, "text": "<image> word1 word2", "return_tensors": "pt"}
OTHER = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
MISMATCH = r"^the processor normalises pixels with mean and deviation \(0.5, 0.4, 0.3\) and \(0.2, 0.3, 0.4\), but the"
SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {},
    "other": OTHER,
    "one-number": {"image_mean": 0.5, "image_std": 0.25},
    "to-minus-one-and-one": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "factor": {"rescale_factor": 0.01},
    "not-normalised": {"do_normalize": False},
    "not-normalised-factor": {"do_normalize": False, "rescale_factor": 1 / 127.5},
    "not-rescaled": {"do_rescale": False, "image_mean": [122.0, 116.0, 104.0], "image_std": [68.0, 66.0, 70.0]},
    "neither": {"do_rescale": False, "do_normalize": False},
}


def with_settings(checkpoint: Path, folder: Path, **settings: Any) -> Path:
    """A copy of the checkpoint whose image processor has these settings."""
    shutil.copytree(checkpoint, folder)
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"] |= settings
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", SETTINGS)
def test_uint8_and_float_pixels_give_the_same_logits(
    tiny_checkpoint: Path, tiny: SimpleNamespace, tmp_path: Path, kind: str
) -> None:
    folder = with_settings(tiny_checkpoint, tmp_path / "llava", **SETTINGS[kind])
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    processor.check(model.config)
    bytes_, floats = processor(**PROMPT), processor(**PROMPT, pixels="float")
    assert bytes_["pixel_values"].dtype == torch.uint8
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    theirs = transformers.LlavaProcessor.from_pretrained(folder)(**PROMPT)
    expected = stock(**theirs).logits
    tiny.assert_near(model(**floats).logits, expected)
    tiny.assert_near(model(**bytes_).logits, expected, 1e-5)

    # Saved, the config has it; and so has a conversion to the original layout and back.
    model.save_pretrained(tmp_path / "model-alone")
    alone = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model-alone")
    assert torch.equal(alone(**bytes_).logits, model(**bytes_).logits)
    convert(folder, tmp_path / "original", layout="original", mm_vision_tower="nobody/clip")
    (tmp_path / "original" / "processor_config.json").unlink()
    convert(tmp_path / "original", tmp_path / "back", layout="hf")
    back, processor = chat.load(tmp_path / "back", device="cpu")
    tiny.assert_near(back(**bytes_).logits, expected)
    processor.pad_to_square = False
    tiny.assert_near(back(**processor(**PROMPT)).logits, expected)


def test_pairs_of_two_places_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_settings(tiny_checkpoint, tmp_path / "other", **OTHER)
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = LlavaProcessor.from_pretrained(folder)
    inputs = processor(**PROMPT)
    for attempt in (
        lambda: processor.check(model.config),
        lambda: model(**inputs),
        lambda: model(**inputs.to(model.device)),
        lambda: model(**processor(**PROMPT, device="cpu").to("cpu")),
        lambda: model.generate(**inputs, max_new_tokens=2),
        lambda: model.generate(**inputs, max_new_tokens=2, num_beams=2),
        lambda: model.get_image_features(inputs["pixel_values"]),
    ):
        with pytest.raises(
            ValueError, match=r"^the processor normalises pixels with mean and deviation \(0.5, 0.4, 0.3\)"
        ) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    # What the processor itself makes into floats is right for any model.
    model(**processor(**PROMPT, pixels="float"))
    model.config.image_mean, model.config.image_std = OTHER["image_mean"], OTHER["image_std"]
    model(**inputs)


def test_training_refuses_a_processor_of_another_place(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_settings(tiny_checkpoint, tmp_path / "other", **OTHER)
    recipe = Recipe(stage="projector", model=tiny_checkpoint, processor=folder, data=tmp_path, output_dir=tmp_path)
    with pytest.raises(ValueError, match=MISMATCH):
        prepare_model(recipe, load_processor(recipe))


def test_an_adapter_that_was_trained_on_other_pixels(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint)
    get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj")).save_pretrained(tmp_path)
    LlavaForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OTHER))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/preprocessor_config.json normalises pixels with mean"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_what_is_put_together_takes_the_towers(tiny: SimpleNamespace, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint)
    tower, text = tiny.save_clip(model, tmp_path / "clip"), tmp_path / "text"
    (tower / "preprocessor_config.json").write_text(json.dumps({**OTHER, "rescale_factor": 1 / 127.5}))
    language = transformers.LlamaForCausalLM(model.config.text_config)
    language.save_pretrained(text)
    LlavaProcessor.from_pretrained(tiny_checkpoint).tokenizer.save_pretrained(text)
    processor = LlavaProcessor.assemble(tower, text)
    made = LlavaForConditionalGeneration.assemble(
        vision_tower=tower, language_model=text, tokenizer=processor.tokenizer
    )
    processor.check(made.config)
    assert made.config.image_mean == pytest.approx([0.25, 0.2, 0.15])
    floats, bytes_ = processor(**PROMPT, pixels="float"), processor(**PROMPT)
    tiny.assert_near(made(**bytes_).logits, made(**floats).logits)


def test_a_batch_says_what_it_wants_on_every_device(tiny_checkpoint: Path) -> None:
    processor = LlavaProcessor.from_pretrained(tiny_checkpoint)
    processor.image_processor.image_mean = [0.5, 0.4, 0.3]
    moved = processor(**PROMPT).to("meta")
    assert moved["pixel_values"].is_meta
    assert noted_normalisation(moved["pixel_values"]) == Normalisation(mean=(0.5, 0.4, 0.3))
    assert noted_normalisation(processor(**PROMPT, pixels="float")["pixel_values"]) is None
    assert "pixel_values" not in processor(text="word1", return_tensors="pt").to("meta")
    messages = [{"role": "user", "content": [{"type": "image", "image": NOISE}, {"type": "text", "text": "word1"}]}]
    made = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert noted_normalisation(made["pixel_values"]) == Normalisation(mean=(0.5, 0.4, 0.3))


def test_settings_that_no_pixel_can_be_normalised_with(tiny_checkpoint: Path) -> None:
    processor = LlavaProcessor.from_pretrained(tiny_checkpoint)
    processor.image_processor.image_std = [0.5, 0.0, 0.5]
    with pytest.raises(ValueError, match=r"^image_std is \[0.5, 0.0, 0.5\], which cannot be 0$"):
        processor(**PROMPT)


def test_a_noted_batch_compiles(tiny_checkpoint: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint)
    inputs = LlavaProcessor.from_pretrained(tiny_checkpoint)(**PROMPT)
    with torch.no_grad():
        compiled = torch.compile(model.model.get_image_features, backend="eager", fullgraph=True)
        found = compiled(inputs["pixel_values"]).pooler_output[0]
        assert torch.equal(found, model.model.get_image_features(inputs["pixel_values"]).pooler_output[0])


def test_a_hub_name_in_the_cache(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--nobody--llava"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    with_settings(tiny_checkpoint, repository / "snapshots" / ("0" * 40), **OTHER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for options in ({}, {"revision": "main"}, {"local_files_only": True}):
        model = LlavaForConditionalGeneration.from_pretrained("nobody/llava", **options)
        assert model.config.image_mean == OTHER["image_mean"]
    LlavaProcessor.from_pretrained("nobody/llava").check(model.config)


# Directories whose files disagree


def test_a_config_and_a_preprocessor_file_that_disagree(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_settings(tiny_checkpoint, tmp_path / "other", **OTHER)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.1] * 3}))
    for attempt in (
        lambda: LlavaForConditionalGeneration.from_pretrained(folder),
        lambda: convert(folder, tmp_path / "out", layout="hf"),
        lambda: chat.load(folder),
    ):
        with pytest.raises(
            ValueError, match=rf"^{folder}/processor_config.json normalises pixels with mean and deviation \(0.5, "
        ):
            attempt()
    assert not (tmp_path / "out").exists()


def test_an_image_processor_of_another_class_with_other_defaults(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_settings(tiny_checkpoint, tmp_path / "siglip")
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"] = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 28, "width": 28},
    }
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^the processor normalises pixels with mean and deviation \(0.5, 0.5, 0.5\)"):
        chat.load(folder, device="cpu")


def test_the_clip_directory_of_an_original_checkpoint(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.ours(tiny.config())
    clip, other = (tiny.save_clip(model, tmp_path / name) for name in ("clip", "other"))
    (clip / "preprocessor_config.json").write_text(json.dumps(OTHER))
    for name, inside in (("without", False), ("with", True)):
        folder = tiny.as_released(model, tmp_path / name, str(clip), tower=inside)
        again = LlavaForConditionalGeneration.from_pretrained(folder)
        assert (again.config.image_mean, again.config.image_std) == tuple(OTHER.values())
        assert not hasattr(
            LlavaForConditionalGeneration.from_pretrained(folder, vision_tower=other).config, "image_mean"
        )
    # A tower that was trained on other pixels than the checkpoint's processor makes.
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"^.*/clip/preprocessor_config.json normalises pixels with mean and deviation \(0.5"
    ):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", vision_tower=clip)
