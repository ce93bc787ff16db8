"""A LLaVA from a CLIP directory and a Llama directory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from llava_fast.drop_in import LlavaForConditionalGeneration


@pytest.fixture
def tower(tiny: SimpleNamespace, tmp_path: Path) -> Path:
    model = CLIPVisionModel(tiny.config().vision_config)
    tiny.randomize(model)
    model.save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


@pytest.fixture
def language(tiny: SimpleNamespace, tmp_path: Path) -> Path:
    return save_language(tiny, tmp_path / "language")


def save_language(tiny: SimpleNamespace, folder: Path, kind: str = "llama", **changes: object) -> Path:
    config = tiny.config(changes, kind=kind).text_config
    model = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}[kind](config)
    tiny.randomize(model, 1)
    model.save_pretrained(folder)
    return folder


def tokenizer(words: int, special: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """`words` words, and then the special tokens."""
    vocabulary = {"<unk>": 0, **{f"w{i}": i for i in range(1, words)}}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    result = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    result.add_special_tokens({"additional_special_tokens": list(special)})
    return result


def assert_parts(model: torch.nn.Module, tower: Path, language: Path, rows: int) -> None:
    """Every weight of the two directories is in the model; of the embeddings the first `rows`."""
    vision = CLIPVisionModel.from_pretrained(tower)
    for name, weight in vision.state_dict().items():
        ours = model.get_parameter("model.vision_tower." + name.removeprefix("vision_model."))
        assert torch.equal(ours, weight), name
    text = transformers.AutoModelForCausalLM.from_pretrained(language)
    for name, weight in text.state_dict().items():
        ours = model.get_parameter(name if name.startswith("lm_head") else f"model.language_{name}")
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            ours, weight = ours[:rows], weight[:rows]
        assert torch.equal(ours, weight), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_parts_come_together(tiny: SimpleNamespace, tmp_path: Path, tower: Path, tied: bool, kind: str) -> None:
    language = save_language(tiny, tmp_path / "language", kind, tie_word_embeddings=tied, num_key_value_heads=2)
    model = LlavaForConditionalGeneration.assemble(
        vision_tower=tower, language_model=language, image_token_index=tiny.IMAGE
    )
    assert_parts(model, tower, language, tiny.VOCABULARY)
    assert not model.training
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert model.config.tie_word_embeddings is tied
    assert model.config.image_token_id == tiny.IMAGE
    assert model.config.image_seq_length == 9
    assert model.config.text_config.model_type == kind
    projector = model.model.multi_modal_projector
    assert projector.linear_1.weight.std() > 0
    assert not projector.linear_1.bias.any()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[2] for name in frozen} == {"encoder", "post_layernorm"}

    inputs = tiny.batch(model.config, [[4, "image", 6], [9]])
    model(**inputs).loss.backward()
    model.save_pretrained(tmp_path / "llava")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    real = inputs["attention_mask"].bool()
    tiny.assert_near(model(**inputs).logits[real], theirs(**inputs).logits[real])


def test_a_whole_clip_model(tiny: SimpleNamespace, tmp_path: Path, language: Path) -> None:
    config = CLIPConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 50,
        },
        vision_config=tiny.config().vision_config.to_dict(),
        projection_dim=8,
    )
    clip = CLIPModel(config)
    tiny.randomize(clip)
    clip.save_pretrained(tmp_path / "clip")
    model = LlavaForConditionalGeneration.assemble(
        vision_tower=tmp_path / "clip", language_model=language, image_token_index=tiny.IMAGE
    )
    assert model.config.vision_config.hidden_size == 24
    for name, weight in clip.vision_model.state_dict().items():
        assert torch.equal(model.get_parameter(f"model.vision_tower.{name}"), weight), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_tokenizer_longer_than_the_vocabulary(tiny: SimpleNamespace, tmp_path: Path, tower: Path, tied: bool) -> None:
    language = save_language(tiny, tmp_path / "language", tie_word_embeddings=tied)
    words = tokenizer(tiny.VOCABULARY, ("<image>", "<pad>"))
    assert len(words) == tiny.VOCABULARY + 2
    model = LlavaForConditionalGeneration.assemble(vision_tower=tower, language_model=language, tokenizer=words)
    assert model.config.image_token_id == tiny.VOCABULARY
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == 128
    assert model.lm_head.weight.shape == (128, 32)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert_parts(model, tower, language, tiny.VOCABULARY)
    # New rows are near the mean of the old: their scores do not stand out.
    old, new = model.lm_head.weight[: tiny.VOCABULARY], model.lm_head.weight[tiny.VOCABULARY :]
    assert (new - old.mean(0)).abs().max() < 0.1 * old.std()
    image = words("w5 <image> w6").input_ids
    assert image[1] == tiny.VOCABULARY
    model.save_pretrained(tmp_path / "llava")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    ids = torch.tensor([[5, *[tiny.VOCABULARY] * 9, 6]])
    pixels = torch.randn(1, 3, 12, 12)
    assert torch.equal(again(ids, pixels).logits, model(ids, pixels).logits)


def test_a_tokenizer_that_fits(tiny: SimpleNamespace, tower: Path, language: Path) -> None:
    words = tokenizer(tiny.VOCABULARY - 1, ("<image>",))
    model = LlavaForConditionalGeneration.assemble(vision_tower=tower, language_model=language, tokenizer=words)
    assert model.config.image_token_id == tiny.VOCABULARY - 1
    assert model.config.text_config.vocab_size == tiny.VOCABULARY
    assert_parts(model, tower, language, tiny.VOCABULARY)


def test_a_tokenizer_without_the_image_token(tower: Path, language: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer of .*language has no '<image>' token"):
        LlavaForConditionalGeneration.assemble(
            vision_tower=tower, language_model=language, tokenizer=tokenizer(50, ("<pad>",))
        )


def test_other_fields_of_the_config(tiny: SimpleNamespace, tower: Path, language: Path) -> None:
    model = LlavaForConditionalGeneration.assemble(
        vision_tower=tower,
        language_model=language,
        image_token_index=tiny.IMAGE,
        vision_feature_layer=[-1, -2],
        vision_feature_select_strategy="full",
        mm_projector_type="linear",
    )
    assert model.config.image_seq_length == 10
    assert model.model.multi_modal_projector.linear_1.weight.shape == (32, 48)
    assert not hasattr(model.model.multi_modal_projector, "linear_2")


def test_dtype_and_seed(tiny: SimpleNamespace, tower: Path, language: Path) -> None:
    parts = {"vision_tower": tower, "language_model": language, "image_token_index": tiny.IMAGE}
    model = LlavaForConditionalGeneration.assemble(**parts, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(LlavaForConditionalGeneration.assemble(**parts).state_dict())
    for name, weight in made[0].items():
        assert torch.equal(weight, made[1][name]), name


def test_parts_that_are_not_complete(tiny: SimpleNamespace, tower: Path, language: Path) -> None:
    parts = {"vision_tower": tower, "language_model": language, "image_token_index": tiny.IMAGE}
    for folder, name in ((tower, "encoder.layers.1.mlp.fc1.weight"), (language, "layers.1.mlp.up_proj.weight")):
        weights = load_file(folder / "model.safetensors")
        full = dict(weights)
        key = next(key for key in weights if key.endswith(name))
        del weights[key]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{folder.name}: .* missing .*{name}"):
            LlavaForConditionalGeneration.assemble(**parts)
        misshaped = {**full, key: full[key][1:].contiguous()}
        save_file(misshaped, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{folder.name}: .*{name} has shape") as caught:
            LlavaForConditionalGeneration.assemble(**parts)
        assert "\n" not in str(caught.value)
        save_file(full, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match="nowhere"):
        LlavaForConditionalGeneration.assemble(**{**parts, "vision_tower": tower.parent / "nowhere"})


def test_parts_of_the_wrong_kind(tiny: SimpleNamespace, tower: Path, language: Path) -> None:
    with pytest.raises(ValueError, match=r"language is a 'llama' checkpoint; expected clip_vision_model"):
        LlavaForConditionalGeneration.assemble(vision_tower=language, language_model=language)
    with pytest.raises(ValueError, match=r"tower is a 'clip_vision_model' checkpoint; expected llama or mistral"):
        LlavaForConditionalGeneration.assemble(vision_tower=tower, language_model=tower)
