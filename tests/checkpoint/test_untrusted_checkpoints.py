"""Values in the files of a checkpoint that no code expects, and code in it: one line with the file, and no harm."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from llava_fast import cli
from llava_fast.checkpoint.reader import open_checkpoint
from llava_fast.checkpoint.weights import open_weights, read_json
from llava_fast.convert import convert
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.processor.processor import LlavaProcessor


@pytest.fixture(scope="module")
def released(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound checkpoint `original`, its `clip`, an `hf` one, and an `adapter` of that."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("released")
    model = tiny.ours(tiny.config())
    tiny.as_released(model, folder / "original", "../clip")
    tiny.save_clip(model, folder / "clip")
    words = {f"t{i}": i for i in range(tiny.VOCABULARY - 1)} | {"<unk>": tiny.VOCABULARY - 1}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "original" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "original" / "tokenizer_config.json").write_text(json.dumps(settings))
    model.save_pretrained(folder / "hf")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def copied(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "copied"))


def edit(file: Path, *keys: str, value: Any) -> None:
    """Set a (nested) key of a JSON file."""
    content = json.loads(file.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(content))


def refused(attempt: Callable[[], object], file: Path, message: str | None = None) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert str(file) in str(caught.value)


DAMAGE = [
    ("original", ("mm_projector_type",), 5),
    ("original", ("mm_vision_select_feature",), ["patch"]),
    ("original", ("mm_vision_select_layer",), True),
    ("original", ("rope_theta",), "x"),
    ("original", ("torch_dtype",), []),
    ("original", ("vocab_size",), True),
    ("original", ("intermediate_size",), -1),
    ("original", ("intermediate_size",), "wide"),
    ("original", ("hidden_size",), 2**70),
    ("original", ("num_attention_heads",), 0),
    ("original", ("mm_vision_config",), {"num_hidden_layers": "x"}),
    ("clip", ("vision_config",), []),
    ("clip", ("vision_config", "patch_size"), 0),
    ("clip", ("vision_config", "hidden_act"), "gelu\n5"),
    ("hf", ("text_config",), "x"),
    ("hf", ("text_config", "hidden_size"), -1),
    ("hf", ("text_config", "model_type"), "unheard-of"),
    ("hf", ("vision_config", "image_size"), None),
    ("hf", ("dtype",), 5),
    # No model of such a depth is built to find out that it does not fit.
    ("original", ("num_hidden_layers",), 10**9),
    ("original", ("mm_projector_type",), f"mlp{10**9}x_gelu"),
    ("clip", ("vision_config", "num_hidden_layers"), 10**9),
    ("hf", ("text_config", "num_hidden_layers"), 10**9),
    ("hf", ("mm_projector_type",), f"mlp{10**9}x_gelu"),
]


@pytest.mark.parametrize(("part", "keys", "value"), DAMAGE)
def test_values_that_no_config_takes(copied: Path, part: str, keys: tuple[str, ...], value: Any) -> None:
    if keys == ("mm_vision_config",):
        weights = {key: stored.read() for key, stored in open_weights(copied / "original").items()}
        tower = "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"
        save_file({**weights, tower: torch.zeros(24)}, copied / "original" / "model.safetensors")
    edit(copied / part / "config.json", *keys, value=value)
    checkpoint = copied / ("hf" if part == "hf" else "original")
    refused(lambda: LlavaForConditionalGeneration.from_pretrained(checkpoint), copied)
    refused(lambda: convert(checkpoint, copied / "out", layout="hf"), copied)
    assert not list(copied.glob("*out*"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "unheard-of"),
        ("peft_type", []),
        ("r", "x"),
        ("r", 0),
        ("lora_alpha", []),
        ("target_modules", None),
    ],
)
def test_values_that_no_adapter_takes(copied: Path, key: str, value: Any) -> None:
    edit(copied / "adapter" / "adapter_config.json", key, value=value)
    refused(
        lambda: LlavaForConditionalGeneration.from_pretrained(copied / "adapter", base_model=copied / "hf"),
        copied / "adapter" / "adapter_config.json",
    )


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '{"r": ' + "1" * 5000 + "}"])
def test_json_that_cannot_be_read(copied: Path, text: str) -> None:
    file = copied / "adapter" / "adapter_config.json"
    file.write_bytes(text.encode("latin1"))
    refused(lambda: read_json(file), file)
    refused(lambda: LlavaForConditionalGeneration.from_pretrained(copied / "adapter", base_model=copied / "hf"), file)


def test_an_original_adapter_of_another_kind_of_model(copied: Path) -> None:
    (copied / "adapter" / "non_lora_trainables.bin").write_bytes(b"")
    file = copied / "adapter" / "config.json"
    file.write_text('{"model_type": "bert", "vocab_size": 101}')
    refused(lambda: open_checkpoint(copied / "original", settings=file), file, "model_type is 'bert'")


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2Jcleared", "null\0"])
def test_names_that_a_terminal_obeys(copied: Path, name: str) -> None:
    folder = copied / "hf"
    save_file({name: torch.zeros(1)}, folder / "model.safetensors")
    refused(lambda: LlavaForConditionalGeneration.from_pretrained(folder), folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "nowhere.safetensors"}}))
    refused(lambda: LlavaForConditionalGeneration.from_pretrained(folder), folder)


@pytest.mark.parametrize("text", ["{", '{"version": "1.0"}', '{"model": {"type": "BPE", "vocab": 5}}'])
def test_a_damaged_tokenizer_is_named(copied: Path, text: str) -> None:
    (copied / "original" / "tokenizer.json").write_text(text)
    refused(lambda: convert(copied / "original", copied / "out", layout="hf"), copied / "original")
    refused(lambda: LlavaProcessor.from_pretrained(copied / "original"), copied / "original")
    assert not list(copied.glob("*out*"))


def test_code_beside_a_checkpoint_is_not_run_and_nobody_is_asked(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on the terminal whether it may run the code, and takes the answer from a pipe, too."""
    monkeypatch.setattr(builtins, "input", lambda _="": "y")
    original, processed = copied / "original", copied / "processed"
    convert(original, processed, layout="hf")
    (processed / "processor_config.json").unlink()
    for folder, file, kind in (
        (original, "tokenizer_config.json", "AutoTokenizer"),
        (processed, "preprocessor_config.json", "AutoImageProcessor"),
    ):
        names = ["evil.Evil"] * 2 if kind == "AutoTokenizer" else "evil.Evil"
        (folder / file).write_text(
            json.dumps({"tokenizer_class": "Evil", "image_processor_type": "Evil", "auto_map": {kind: names}})
        )
        (folder / "evil.py").write_text(f"import os\nos.mkdir({str(copied / 'code-has-run')!r})\nclass Evil: pass\n")
    refused(lambda: convert(original, copied / "out", layout="hf"), original)
    refused(lambda: LlavaProcessor.from_pretrained(processed), processed, "contains custom code")
    edit(original / "config.json", "model_type", value="evil")
    edit(original / "config.json", "auto_map", value={"AutoConfig": "evil.Evil"})
    for assemble in (LlavaProcessor.assemble, LlavaForConditionalGeneration.assemble):
        with pytest.raises((ValueError, OSError), match=r"custom code|trust_remote_code"):
            assemble(vision_tower=original, language_model=original)
    assert not (copied / "code-has-run").exists()


def test_a_file_that_is_cut_short_after_it_was_opened(copied: Path) -> None:
    file = copied / "hf" / "model.safetensors"
    stored = next(iter(open_weights(file).values()))
    file.write_bytes(file.read_bytes()[:-10])
    refused(stored.read, file, "is not a whole safetensors file")


@pytest.mark.parametrize("part", ["clip", "hf"])
def test_parts_whose_config_is_damaged_are_named(copied: Path, part: str) -> None:
    """A tower or a language model that a new LLaVA is to be made of."""
    shutil.copy(copied / "original" / "tokenizer.json", copied / "hf")
    edit(copied / part / "config.json", "vision_config", value={"hidden_size": "x"})
    parts = {"vision_tower": copied / "clip", "language_model": copied / "hf"}
    refused(lambda: LlavaForConditionalGeneration.assemble(**parts), copied / part, "hidden_size")
    refused(lambda: LlavaProcessor.assemble(**parts), copied / part, "hidden_size")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-tower"], "error: --no-tower is for --layout original"),
        (["--mm-vision-tower", "clip"], "error: --mm-vision-tower clip is for --layout original"),
        (["--dtype", "float8_e4m3fn"], "error: --dtype 'float8_e4m3fn' is not a floating dtype"),
        (["--dtype", "Tensor"], "error: --dtype 'Tensor' is not a floating dtype"),
        (["--max-shard-size", "9" * 400], f"error: --max-shard-size is '{'9' * 400}'; expected a size such as 5GB"),
    ],
)
def test_options_that_cannot_be_met(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", str(released / "hf"), str(tmp_path / "out"), "--layout", "hf", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_chat_takes_no_other_dtype(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["chat", str(released / "hf"), "--prompt", "?", "--dtype", "Tensor"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "llava-fast: error: --dtype 'Tensor' is not a floating dtype such as float32, bfloat16 or float16\n"
    )
