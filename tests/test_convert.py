"""`convert` between the layouts, and the commands of docs/checkpoints.md."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_fast import cli
from llava_fast.checkpoint.weights import open_weights
from llava_fast.convert import convert
from llava_fast.drop_in import LlavaForConditionalGeneration
from tests.checkpoint.files import KINDS, assert_grown, assert_same, make
from tests.contracts.test_auto import registered


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
    assert capsys.readouterr().err == f"llava-fast: error: {tmp_path / 'hf'} exists; it is not overwritten\n"
    assert run(source, tmp_path / "hf2", "--layout", "hf") == 2
    assert "pass --vision-tower DIRECTORY" in capsys.readouterr().err


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
    tiny: SimpleNamespace,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """docs/checkpoints.md, with tiny models in the places of those it names."""
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    python, bash = (re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) for language in ("python", "bash"))
    assert (len(python), len(bash)) == (2, 1)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, "llava-hf/llava-1.5-7b-hf")
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
    Image.new("RGB", (30, 20), "red").save("cat.jpg")
    with registered():
        exec(python[1], names)
    assert type(names["ask"].model) is LlavaForConditionalGeneration
    assert "generated_text" in capsys.readouterr().out
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
