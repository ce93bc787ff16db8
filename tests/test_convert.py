"""Checkpoints of the original code, in and out, whole and in pieces, and `convert` between the layouts."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_fast import cli
from llava_fast.checkpoint.weights import open_weights
from llava_fast.convert import convert
from llava_fast.drop_in import LlavaForConditionalGeneration

ROWS = [[4, "image", 6], [9], [2, "image", 3, "image", 7]]
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "gqa": ({"num_key_value_heads": 2}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "linear": ({}, {"mm_projector_type": "linear"}),
    "mlp3x": ({}, {"mm_projector_type": "mlp3x_gelu"}),
    "full": ({"rope_theta": 5e5}, {"vision_feature_select_strategy": "full", "vision_feature_layer": 2}),
    "identity": ({"hidden_size": 24}, {"mm_projector_type": "identity"}),
}


def make(tiny: SimpleNamespace, kind: str = "plain") -> LlavaForConditionalGeneration:
    text, llava = KINDS[kind]
    return tiny.ours(tiny.config(text, **llava))


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def assert_grown(model: torch.nn.Module, expected: torch.nn.Module, tiny: SimpleNamespace) -> None:
    """`model` is `expected` with an image token after its vocabulary, and answers as it does."""
    vocabulary = expected.config.text_config.vocab_size
    assert model.config.image_token_index == vocabulary
    assert model.config.text_config.vocab_size == -(-(vocabulary + 2) // 64) * 64
    for name, weight in expected.state_dict().items():
        ours = model.state_dict()[name]
        if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            tiny.assert_near(ours[vocabulary:], weight.mean(0).expand(len(ours) - vocabulary, -1), 1e-6, name)
            ours = ours[:vocabulary]
        assert torch.equal(ours, weight), name
    inputs = tiny.batch(expected.config, ROWS)
    wanted = expected(**inputs).logits
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, vocabulary)
    with torch.no_grad():
        logits = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
    tiny.assert_near(logits[..., :vocabulary], wanted, 1e-6)
    assert (logits[..., vocabulary:].amax(-1) <= logits[..., :vocabulary].amax(-1)).all()


# Reading what the original code writes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", [False, True], ids=["tower-apart", "tower-inside"])
def test_an_original_checkpoint_is_read(tiny: SimpleNamespace, tmp_path: Path, kind: str, tower: bool) -> None:
    model = make(tiny, kind)
    clip = tiny.save_clip(model, tmp_path / "clip")
    folder = tiny.as_released(model, tmp_path / "original", str(clip), tower=tower)
    again = LlavaForConditionalGeneration.from_pretrained(folder)
    assert_grown(again, model, tiny)
    assert not again.training
    assert again.name_or_path == str(folder)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is (kind == "tied")
    assert again.config.image_aspect_ratio == "pad"


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_original_files_of_every_format(tiny: SimpleNamespace, tmp_path: Path, binary: bool, shards: int) -> None:
    model = make(tiny)
    clip = tiny.save_clip(model, tmp_path / "original" / "tower", prefix="")  # named relative to the checkpoint
    shutil.move(tmp_path / "original", tmp_path / "aside")
    folder = tiny.as_released(model, tmp_path / "original", "tower", binary=binary, shards=shards)
    shutil.move(tmp_path / "aside" / "tower", clip)
    assert_grown(LlavaForConditionalGeneration.from_pretrained(folder), model, tiny)
    again = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_a_model_outlives_its_files(tiny: SimpleNamespace, tmp_path: Path, binary: bool) -> None:
    """Files are mapped into memory; saving over them must not change a model that was read from them."""
    model = make(tiny)
    clip = tiny.save_clip(model, tmp_path / "clip")
    folder = tiny.as_released(model, tmp_path / "original", str(clip), binary=binary)
    again = LlavaForConditionalGeneration.from_pretrained(folder)
    for file in (*folder.iterdir(), clip / "model.safetensors"):
        size = file.stat().st_size
        with open(file, "r+b") as opened:
            opened.write(bytes(size))
    assert_grown(again, model, tiny)


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_saved_where_it_was_read(tiny: SimpleNamespace, tmp_path: Path, layout: str) -> None:
    model = make(tiny)
    model.save_pretrained(tmp_path, layout=layout, **({} if layout == "hf" else {"mm_vision_tower": "nobody/clip"}))
    LlavaForConditionalGeneration.from_pretrained(tmp_path).save_pretrained(tmp_path, layout=layout)
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path), model)


def test_names_of_the_hub_are_found_in_the_cache(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(tiny)

    def cached(name: str) -> Path:
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots").mkdir()
        return folder / "snapshots" / ("0" * 40)

    tiny.save_clip(model, cached("openai/clip"))
    snapshot = tiny.as_released(model, cached("liuhaotian/llava"), "openai/clip")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_grown(LlavaForConditionalGeneration.from_pretrained("liuhaotian/llava"), model, tiny)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"liuhaotian/llava is in the original layout: download it"):
        LlavaForConditionalGeneration.from_pretrained("liuhaotian/llava")


def test_the_tower_that_is_passed_comes_first(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model, other = make(tiny), tiny.ours(tiny.config(), 1)
    clip = tiny.save_clip(other, tmp_path / "other")
    folder = tiny.as_released(model, tmp_path / "original", str(tiny.save_clip(model, tmp_path / "clip")), tower=True)
    model.save_pretrained(tmp_path / "hf")
    for path in (folder, tmp_path / "hf"):
        again = LlavaForConditionalGeneration.from_pretrained(path, vision_tower=clip)
        assert_same(again.model.vision_tower, other.model.vision_tower)
        assert_same(again.model.multi_modal_projector, model.model.multi_modal_projector)


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_projector_of_stage_1(tiny: SimpleNamespace, tmp_path: Path, ending: str) -> None:
    model, other = make(tiny), tiny.ours(tiny.config(), 1)
    file = tmp_path / f"mm_projector.{ending}"
    other.save_projector(file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert open_weights(file).keys() == {f"model.mm_projector.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    model.save_pretrained(tmp_path / "hf")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", mm_projector=file)
    assert_same(again.model.multi_modal_projector, other.model.multi_modal_projector)
    assert_same(again.model.language_model, model.model.language_model)

    # On a bare language model, as the original code starts stage 2.
    base = tmp_path / "text"
    text = {k: v.clone() for k, v in model.model.language_model.state_dict().items()}
    weights = {f"model.{name}": weight for name, weight in text.items()} | {"lm_head.weight": model.lm_head.weight}
    model.config.text_config.save_pretrained(base)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, base / "model.safetensors")
    clip = tiny.save_clip(model, tmp_path / "clip")
    again = LlavaForConditionalGeneration.from_pretrained(base, mm_projector=file, vision_tower=clip)
    model.model.multi_modal_projector.load_state_dict(other.model.multi_modal_projector.state_dict())
    assert_grown(again, model, tiny)

    # The config that stage 1 leaves beside its projector says which feature layer it was trained on.
    config = json.loads((tiny.as_released(model, tmp_path / "stage1", str(clip)) / "config.json").read_text())
    (tmp_path / "stage1" / "config.json").write_text(json.dumps({**config, "mm_vision_select_layer": -1}))
    shutil.copy(file, tmp_path / "stage1")
    again = LlavaForConditionalGeneration.from_pretrained(base, mm_projector=tmp_path / "stage1" / file.name)
    assert again.config.vision_feature_layer == -1


def test_a_projector_of_another_ending_is_not_written(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mm_projector.pt ends in '.pt'; expected .bin or .safetensors"):
        make(tiny).save_projector(tmp_path / "mm_projector.pt")
    assert not list(tmp_path.iterdir())


# Round trips


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_the_original_layout(tiny: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    model = make(tiny, kind)
    clip = tiny.save_clip(model, tmp_path / "clip")
    model.save_pretrained(tmp_path / "with", layout="original", mm_vision_tower="nobody/has-this-clip")
    model.save_pretrained(tmp_path / "without", layout="original", mm_vision_tower=str(clip), with_tower=False)
    inside = load_file(tmp_path / "with" / "model.safetensors").keys()
    outside = load_file(tmp_path / "without" / "model.safetensors").keys()
    assert {name for name in inside if "vision" in name} == inside - outside
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias" in inside
    settings = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("with", "without")]
    assert [flat["unfreeze_mm_vision_tower"] for flat in settings] == [True, False]
    inputs = tiny.batch(model.config, ROWS)
    for name in ("with", "without"):
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path / name)
        assert_same(again, model)
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        assert again.config.image_token_index == tiny.IMAGE


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_there_and_back_are_bit_equal(tiny: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    model = make(tiny, kind)
    clip = tiny.save_clip(model, tmp_path / "clip")
    first = tiny.as_released(model, tmp_path / "original", str(clip))
    done = convert(first, tmp_path / "hf", layout="hf", max_shard_size="30KB")
    assert done["shards"] > 2
    assert_grown(LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf"), model, tiny)
    assert_same(
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf"),
        LlavaForConditionalGeneration.from_pretrained(first),
    )
    convert(tmp_path / "hf", tmp_path / "back", layout="original", with_tower=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "back"))
    assert before.keys() - after.keys() == {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    convert(tmp_path / "back", tmp_path / "hf2", layout="hf", max_shard_size="30KB")
    for file in (tmp_path / "hf").iterdir():
        assert (tmp_path / "hf2" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_list_of_feature_layers_goes_from_hf_to_hf(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.ours(tiny.config(vision_feature_layer=[-2, 1]))
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again", layout="hf")
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path / "again"), model)
    with pytest.raises(ValueError, match=r"vision_feature_layer is \[-2, 1\]"):
        convert(tmp_path / "hf", tmp_path / "original", layout="original")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "hf"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversion_to_another_dtype(tiny: SimpleNamespace, tmp_path: Path, dtype: str) -> None:
    model = make(tiny)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "half", layout="hf", dtype=dtype)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert_same(again, model.to(getattr(torch, dtype)))


def test_the_command(tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(tiny)
    clip = tiny.save_clip(model, tmp_path / "clip")
    source = tiny.as_released(model, tmp_path / "original", "nobody/has-this-clip")

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["convert", *map(str, arguments)])
        return exit_.value.code or 0

    assert run(source, tmp_path / "hf", "--layout", "hf", "--vision-tower", clip) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'hf'}: hf layout, 80 tensors, 0.2 MiB in 1 file, verified\n"
    assert run(source, tmp_path / "hf", "--layout", "hf", "--vision-tower", clip) == 2
    assert capsys.readouterr().err == f"llava-fast: error: {tmp_path / 'hf'} exists; it is not written over\n"
    assert run(source, tmp_path / "hf2", "--layout", "hf") == 2
    assert "pass vision_tower=DIRECTORY" in capsys.readouterr().err


def test_processor_files(tiny_checkpoint: Path, tiny: SimpleNamespace, tmp_path: Path) -> None:
    """An original checkpoint has a tokenizer alone; in HF's layout it gets a processor."""
    from llava_fast import LlavaProcessor

    convert(tiny_checkpoint, tmp_path / "copied", layout="hf")
    names = {path.name for path in tiny_checkpoint.iterdir()}
    assert {path.name for path in (tmp_path / "copied").iterdir()} == names
    LlavaProcessor.from_pretrained(tmp_path / "copied")

    convert(tiny_checkpoint, tmp_path / "original", layout="original", mm_vision_tower="nobody/clip")
    for name in ("processor_config.json", "chat_template.jinja"):
        (tmp_path / "original" / name).unlink(missing_ok=True)
    convert(tmp_path / "original", tmp_path / "hf", layout="hf")
    processor = LlavaProcessor.from_pretrained(tmp_path / "hf")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert processor.pad_to_square
    assert processor.image_token_id == model.config.image_token_index == 3
    assert processor.num_image_tokens() == model.config.image_seq_length == 4


def test_an_image_token_is_added(tiny: SimpleNamespace, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from llava_fast import LlavaProcessor

    model = make(tiny)
    folder = tiny.as_released(model, tmp_path / "original", str(tiny.save_clip(model, tmp_path / "clip")))
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(98))])}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>", pad_token="<unk>")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.9, "max_length": 4096}')
    convert(folder, tmp_path / "hf", layout="hf")
    processor = LlavaProcessor.from_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [101, 102]
    assert (config["image_token_index"], config["pad_token_id"]) == (101, 102)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {"eos_token_id": 2}

    tokenizer.add_tokens([f"more{i}" for i in range(40)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"original: the tokenizer has 143 tokens, but the model only 128 embeddings"):
        convert(folder, tmp_path / "longer", layout="hf")
    assert not (tmp_path / "longer").exists()


def test_every_command_of_the_page(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/checkpoints.md, with tiny models in the places of those it names."""
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    python, bash = (re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) for language in ("python", "bash"))
    assert len(python) == len(bash) == 1
    monkeypatch.chdir(tmp_path)
    model = make(tiny)
    tiny.save_clip(model, Path("clip-vit-large-patch14-336"))
    tiny.as_released(model, Path("llava-v1.5-7b"), "openai/clip-vit-large-patch14-336")
    # The adapter's own config names the tower by its directory.
    tiny.as_released(model, Path("llava-lora"), "clip-vit-large-patch14-336")
    Path("llava-lora/model.safetensors").unlink()
    a, b = torch.ones(2, 32), torch.ones(32, 2)
    pair = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_": None for i in range(2)}
    adapter = {f"{name}{letter}.weight": value.clone() for name in pair for letter, value in (("A", a), ("B", b))}
    save_file(adapter, "llava-lora/adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    Path("llava-lora/adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"})
    )
    Path("stage1").mkdir()
    model.save_projector("stage1/mm_projector.bin")
    projector = torch.load("stage1/mm_projector.bin", weights_only=True)
    torch.save(
        {f"base_model.model.{name}": weight for name, weight in projector.items()}, "llava-lora/non_lora_trainables.bin"
    )
    model.config.text_config.save_pretrained("vicuna-7b-v1.5")
    text = load_file("llava-v1.5-7b/model.safetensors")
    save_file({k: v for k, v in text.items() if "mm_projector" not in k}, "vicuna-7b-v1.5/model.safetensors")

    names: dict[str, Any] = {}
    exec(python[0], names)
    assert type(names["merged"]) is LlavaForConditionalGeneration
    assert type(names["kept"]).__name__.startswith("PeftModel")
    assert open_weights(Path("out/mm_projector.bin")).keys() == projector.keys()
    for line in bash[0].splitlines():
        command, *arguments = shlex.split(line)
        assert command == "llava-fast"
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert not exit_.value.code, capsys.readouterr().err
    for folder in ("out/hf", "out/original", "out/converted", "out/merged"):
        LlavaForConditionalGeneration.from_pretrained(folder)
