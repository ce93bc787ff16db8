"""Names of models, against a hub on this machine that answers as huggingface.co does."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from llava_fast import LlavaForConditionalGeneration, LlavaModel, LlavaProcessor, chat, cli
from llava_fast.convert import convert
from llava_fast.hub import MODEL, PROJECTOR, is_id, local_folder
from tests.checkpoint.files import assert_grown, assert_same, make
from tests.checkpoint.test_adapter import assert_merged, original_lora
from tests.hub import COMMIT, Hub, serving
from tests.train.conftest import write_parts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without repositories, used by this process, with an empty cache."""
    with serving(tmp_path / "hub") as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def repository(hub: Hub, name: str, *files: str) -> Path:
    """A repository with files of a few bytes."""
    folder = hub.root / name
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    return folder


def unreachable(monkeypatch: pytest.MonkeyPatch, url: str = "http://127.0.0.1:9") -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava-hf/llava-1.5-7b-hf", True),
        ("liuhaotian/llava-v1.5-7b", True),
        ("openai/clip-vit-large-patch14-336", True),
        ("./llava-hf/llava", False),
        ("../llava", False),
        ("/models/llava", False),
        ("~/llava", False),
        ("out/runs/llava", False),
        ("out\\llava", False),
        ("llava-hf/llava/", False),
        ("llava-hf/..", False),
        ("llava--hf/llava", False),
        ("llava-hf/llava-", False),
        ("llava-hf/" + "x" * 97, False),
        ("llava", False),
        ("stage1/mm_projector.bin", False),
        ("out/model.safetensors", False),
        ("out/llava 7b", False),
        ("", False),
    ],
)
def test_what_is_a_hub_id(name: str, expected: bool) -> None:
    assert is_id(name) is expected


def test_a_path_that_is_not_there_is_never_asked_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    for name in ("./org/model", "a/b/c", "a--b/c", "nowhere", "org/model.bin", str(tmp_path / "model")):
        with pytest.raises(FileNotFoundError, match=f"^no directory {name}$"):
            local_folder(name)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file"):
        local_folder(tmp_path / "file")
    assert hub.requests == []


def test_a_directory_comes_before_an_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub, "org/model", "config.json")
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("org/model") == Path("org/model")
    assert hub.requests == []


BESIDE = ("README.md", "modeling.py", "tf_model.h5", "onnx/model.safetensors", "checkpoint-1/config.json")
SETTINGS = ("config.json", "tokenizer.model", "tokenizer_config.json", "merges.txt", "chat_template.jinja")


@pytest.mark.parametrize(
    ("weights", "wanted", "others"),
    [
        (MODEL, ["model.safetensors"], ["pytorch_model.bin", "model.fp16.safetensors", "consolidated.safetensors"]),
        (MODEL, ["pytorch_model.bin"], ["flax_model.msgpack"]),
        (
            MODEL,
            [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] + ["model.safetensors.index.json"],
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        ),
        (
            MODEL,
            [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)] + ["pytorch_model.bin.index.json"],
            ["mm_projector.bin"],
        ),
        (MODEL, ["model.safetensors"], ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]),
        (MODEL, ["adapter_model.safetensors", "non_lora_trainables.bin"], ["adapter_model.bin"]),
        (PROJECTOR, ["mm_projector.bin"], ["pytorch_model.bin"]),
        ((), [], ["model.safetensors", "model.safetensors.index.json"]),
    ],
)
def test_only_needed_files_are_downloaded_and_once(
    hub: Hub, weights: tuple[str, ...], wanted: list[str], others: list[str]
) -> None:
    repository(hub, "org/model", *BESIDE, *SETTINGS, *wanted, *others)
    folder = local_folder("org/model", weights)
    expected = sorted([*SETTINGS, *wanted])
    assert hub.downloads() == expected
    assert sorted(file.name for file in folder.iterdir()) == expected
    assert (folder / "config.json").read_text() == "config.json"
    assert local_folder("org/model", weights) == folder
    assert hub.downloads() == expected


def test_revision_cache_folder_and_subfolder(hub: Hub, tmp_path: Path) -> None:
    repository(hub, "org/model", "config.json", "model.safetensors", "deep/config.json", "deep/model.safetensors")
    assert local_folder("org/model", revision="v1", cache_dir=tmp_path / "other").is_relative_to(tmp_path / "other")
    local_folder("org/model", (), subfolder="deep")
    assert hub.downloads() == ["config.json", "deep/config.json", "model.safetensors"]
    with pytest.raises(FileNotFoundError, match=f"org/model has no revision 'v2' on {hub.url}"):
        local_folder("org/model", revision="v2")
    assert local_folder("org/model", (), revision=COMMIT).name == COMMIT


def test_what_the_hub_refuses_is_one_line(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match=f"^no directory org/typo, and no model org/typo is on {hub.url} .*$"):
        local_folder("org/typo")
    repository(hub, "org/gated", "config.json")
    hub.gated.add("org/gated")
    with pytest.raises(OSError, match=r"^org/gated .* is gated: accept its terms on .*/org/gated, .*$"):
        local_folder("org/gated")


@pytest.mark.parametrize("name", ["../evil.json", "../../../evil.json", "/tmp/evil.json", "a\\..\\evil.json", "*.json"])
def test_no_file_is_written_outside_the_cache(hub: Hub, tmp_path: Path, name: str) -> None:
    repository(hub, "org/model", "config.json", "deep/config.json")
    hub.extra_names.append(name)
    before = sorted(tmp_path.iterdir())
    folder = local_folder("org/model")
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "cache"])


def test_unreachable_is_one_line_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub, "org/model", "config.json", "model.safetensors")
    folder = local_folder("org/model", ())
    unreachable(monkeypatch)
    started = time.perf_counter()
    with pytest.raises(
        FileNotFoundError, match=r"^no directory org/other, and http://127.0.0.1:9 cannot be reached: .*$"
    ):
        local_folder("org/other")
    assert local_folder("org/model", ()) == folder
    with pytest.raises(
        FileNotFoundError, match=r"^no weights are in .*, the copy of org/model, and http.* cannot be rea"
    ):
        local_folder("org/model")
    assert time.perf_counter() - started < 1


def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_fast.hub._PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        unreachable(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.perf_counter()
        with pytest.raises(FileNotFoundError, match="cannot be reached"):
            local_folder("org/model")
        assert time.perf_counter() - started < 2


def test_offline_uses_the_cache_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub, "org/model", "config.json", "model.safetensors", "tf_model.h5")
    folder = local_folder("org/model")
    hub.requests.clear()
    assert local_folder("org/model", local_files_only=True) == folder
    with pytest.raises(FileNotFoundError, match=r"^no directory org/new, and the cache .* local_files_only forbids"):
        local_folder("org/new", local_files_only=True)
    assert hub.requests == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local_folder("org/model") == folder
    with pytest.raises(FileNotFoundError, match=r"^no directory org/new, and the cache .* HF_HUB_OFFLINE forbids"):
        local_folder("org/new")
    assert hub.requests == []


# Models


def released(tiny: SimpleNamespace, hub: Hub) -> LlavaForConditionalGeneration:
    """On the hub: an original checkpoint without tower, `liuhaotian/llava`, and its CLIP, in two formats."""
    model = make(tiny)
    clip = tiny.save_clip(model, hub.root / "openai/clip")
    torch.save({}, clip / "pytorch_model.bin")
    tiny.as_released(model, hub.root / "liuhaotian/llava", "openai/clip", binary=True, shards=2)
    return model


def test_a_model_in_hf_layout(tiny: SimpleNamespace, hub: Hub) -> None:
    model = make(tiny)
    model.save_pretrained(hub.root / "org/model")
    again, info = LlavaForConditionalGeneration.from_pretrained("org/model", output_loading_info=True)
    assert_same(again, model)
    assert not info["missing_keys"]
    assert again.name_or_path == again.config.name_or_path == "org/model"
    assert hub.downloads() == ["config.json", "generation_config.json", "model.safetensors"]
    hub.requests.clear()
    with pytest.raises(FileNotFoundError, match="no model org/other is on"):
        LlavaForConditionalGeneration.from_pretrained("org/other")
    assert len(hub.requests) == 1


def test_a_released_model_and_the_tower_that_it_names(
    tiny: SimpleNamespace, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = released(tiny, hub)
    again = LlavaForConditionalGeneration.from_pretrained("liuhaotian/llava", revision="v1")
    assert_grown(again, model, tiny)
    assert again.name_or_path == "liuhaotian/llava"
    assert not any(
        "/clip/" in request and "v1" in request for request in hub.requests
    )  # the tower has revisions of its own
    weights = ["model.safetensors", *(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))]
    assert [file for file in hub.downloads() if "json" not in file] == weights
    unreachable(monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"no directory liuhaotian/llava, and http://127.0.0.1:9 cannot"):
        LlavaForConditionalGeneration.from_pretrained("liuhaotian/llava")  # of revision main there is no copy
    assert_grown(LlavaForConditionalGeneration.from_pretrained("liuhaotian/llava", revision="v1"), model, tiny)


def test_a_lora_names_its_base_by_id(tiny: SimpleNamespace, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder, expected = original_lora(tiny, hub.root / "org")
    for file, key, name in (
        ("adapter_config.json", "base_model_name_or_path", "vicuna"),
        ("config.json", "mm_vision_tower", "clip"),
    ):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**settings, key: f"org/{name}"}))
    assert_merged(tiny, LlavaForConditionalGeneration.from_pretrained("org/llava-lora"), expected)
    assert [file for file in hub.downloads() if "json" not in file] == [
        "adapter_model.safetensors",
        "model.safetensors",
        "model.safetensors",
        "non_lora_trainables.bin",
    ]
    (hub.root / "org/vicuna").rename(hub.root / "org/base")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.root.parent / "empty"))
    message = r"adapter_config.json: base_model_name_or_path: no directory org/vicuna, .*; or pass base_model="
    with pytest.raises(FileNotFoundError, match=message):
        LlavaForConditionalGeneration.from_pretrained("org/llava-lora")
    with pytest.raises(FileNotFoundError, match=r"^base_model: no directory org/vicuna, and no model org/vicuna is on"):
        LlavaForConditionalGeneration.from_pretrained("org/llava-lora", base_model="org/vicuna")
    model = LlavaForConditionalGeneration.from_pretrained("org/llava-lora", base_model="org/base")
    assert_merged(tiny, model, expected)


def test_an_adapter_on_a_model_of_the_hub_refers_to_it_by_id(tiny: SimpleNamespace, hub: Hub) -> None:
    make(tiny).save_pretrained(hub.root / "org/model")
    model = LlavaForConditionalGeneration.from_pretrained("org/model")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(hub.root / "org/adapter")
    settings = json.loads((hub.root / "org/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/model"
    inputs = tiny.batch(model.config, [[4, "image", 6]])
    expected = adapted(**inputs).logits
    kept = LlavaForConditionalGeneration.from_pretrained("org/adapter", merge_adapter=False)
    assert kept.peft_config["default"].base_model_name_or_path == "org/model"
    tiny.assert_near(kept(**inputs).logits, expected)
    tiny.assert_near(LlavaForConditionalGeneration.from_pretrained("org/adapter")(**inputs).logits, expected)


def test_a_projector_in_a_repository(tiny: SimpleNamespace, hub: Hub, tmp_path: Path) -> None:
    model, other = make(tiny), tiny.ours(tiny.config(), 1)
    model.save_pretrained(hub.root / "org/model")
    repository(hub, "org/stage1", "pytorch_model.bin")
    other.save_projector(hub.root / "org/stage1/mm_projector.bin")
    again = LlavaForConditionalGeneration.from_pretrained("org/model", mm_projector="org/stage1")
    assert_same(again.model.multi_modal_projector, other.model.multi_modal_projector)
    assert_same(again.model.language_model, model.model.language_model)
    beside = LlavaForConditionalGeneration.from_pretrained("org/model", mm_projector=hub.root / "org/stage1")
    assert_same(beside, again)
    assert "pytorch_model.bin" not in hub.downloads()
    with pytest.raises(
        FileNotFoundError, match=r"^mm_projector: no directory org/stage2, and no model org/stage2 is on"
    ):
        LlavaForConditionalGeneration.from_pretrained("org/model", mm_projector="org/stage2")
    with pytest.raises(FileNotFoundError, match=r"^mm_projector: no file .*mm_projector.bin$"):
        LlavaForConditionalGeneration.from_pretrained("org/model", mm_projector="org/model")


def test_options_that_only_transformers_reads(tiny: SimpleNamespace, hub: Hub) -> None:
    model = make(tiny)
    model.save_pretrained(hub.root / "org/model/deep")
    again = LlavaForConditionalGeneration.from_pretrained("org/model", subfolder="deep")
    assert_same(again, model)
    with pytest.raises(FileNotFoundError, match="no model org/other is on"):
        LlavaForConditionalGeneration.from_pretrained("org/other", variant="fp16")
    given = LlavaForConditionalGeneration.from_pretrained("org/model", subfolder="deep", config=model.config)
    assert_same(given, model)
    model.save_pretrained(hub.root / "org/half", variant="half")
    for kind, expected in ((LlavaForConditionalGeneration, model), (LlavaModel, model.model)):
        assert_same(kind.from_pretrained("org/half", variant="half"), expected)


def test_convert(tiny: SimpleNamespace, hub: Hub, tmp_path: Path) -> None:
    model = released(tiny, hub)
    converted = ["convert", "liuhaotian/llava", str(tmp_path / "hf"), "--layout", "hf"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*converted, "--vision-tower", "openai/clip"])
    assert ended.value.code == 0
    assert_grown(LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf"), model, tiny)
    with pytest.raises(FileNotFoundError, match="no model org/typo is on"):
        convert("org/typo", tmp_path / "typo", layout="hf")


def test_chat_with_a_released_model(tiny: SimpleNamespace, hub: Hub) -> None:
    released(tiny, hub)
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(98))])}
    vocabulary = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>", bos_token="<s>")
    tokenizer.save_pretrained(hub.root / "liuhaotian/llava")
    with pytest.raises(FileNotFoundError, match=r"^liuhaotian/llava has no processor .* llava-fast convert makes one$"):
        LlavaProcessor.from_pretrained("liuhaotian/llava")
    model, processor = chat.load("liuhaotian/llava", device="cpu")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index == 101
    assert processor.pad_to_square  # the config says image_aspect_ratio: pad
    turn = chat.Turn("w1", (Image.new("RGB", (30, 20), "red"),))
    assert "".join(chat.stream(model, processor, [turn], min_new_tokens=3, max_new_tokens=3))
    with pytest.raises(FileNotFoundError, match="no model liuhaotian/typo is on"):
        chat.load("liuhaotian/typo")


def test_a_processor_without_the_weights(tiny_checkpoint: Path, hub: Hub) -> None:
    shutil.copytree(tiny_checkpoint, hub.root / "org/model")
    processor = LlavaProcessor.from_pretrained("org/model", revision="v1")
    expected = LlavaProcessor.from_pretrained(tiny_checkpoint)
    assert processor.to_dict() == expected.to_dict()
    assert processor.tokenizer.name_or_path == "org/model"
    text = "USER: <image>\nWhat word1? ASSISTANT:"
    image = Image.new("RGB", (30, 20), "red")
    ours, theirs = processor(images=image, text=text), expected(images=image, text=text)
    assert ours["input_ids"] == theirs["input_ids"]
    assert "model.safetensors" not in hub.downloads()
    with pytest.raises(FileNotFoundError, match="no model org/typo is on"):
        LlavaProcessor.from_pretrained("org/typo")


def test_assembled_from_models_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    write_parts(hub.root / "org")
    (hub.root / "org/text/README.md").touch()
    processor = LlavaProcessor.assemble("org/tower", "org/text")
    assert not any("safetensors" in file for file in hub.downloads())
    assert "<image>" in processor.tokenizer.get_vocab()
    model = LlavaForConditionalGeneration.assemble(vision_tower="org/tower", language_model="org/text")
    folders = {"vision_tower": hub.root / "org/tower", "language_model": hub.root / "org/text"}
    expected = LlavaForConditionalGeneration.assemble(**folders)
    assert_same(model.model.vision_tower, expected.model.vision_tower)
    assert_same(model.model.language_model, expected.model.language_model)


# A process of its own, with huggingface_hub's environment variables


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=settings, timeout=120)


SNIPPET = """
from PIL import Image
from llava_fast import LlavaForConditionalGeneration, LlavaProcessor

model = LlavaForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf", dtype="auto")
processor = LlavaProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")
inputs = processor(
    images=Image.new("RGB", (30, 20), "red"), text="USER: <image> What is this? ASSISTANT:", return_tensors="pt"
)
answer = model.generate(**inputs.to(model.device), max_new_tokens=4)
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
"""


@pytest.mark.slow
def test_a_snippet_then_chat_offline(tiny_checkpoint: Path, hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, hub.root / "llava-hf/llava-1.5-7b-hf")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    done = run("-c", SNIPPET, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("USER: ")
    asked = ["-m", "llava_fast.cli", "chat", "llava-hf/llava-1.5-7b-hf", "--prompt", "word1?", "--max-new-tokens", "4"]
    hub.requests.clear()
    offline = run(*asked, **environment, HF_HUB_OFFLINE="1")
    assert (offline.returncode, hub.requests) == (0, []), offline.stderr


TIMED = """
import time
import llava_fast

for kind in (llava_fast.LlavaForConditionalGeneration, llava_fast.LlavaProcessor):
    started = time.perf_counter()
    try:
        kind.from_pretrained("org/model")
    except OSError as error:
        print(time.perf_counter() - started, error)
"""


@pytest.mark.slow
def test_an_unreachable_hub_is_one_line_within_seconds(tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run("-c", TIMED, **environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        seconds, message = line.split(" ", 1)
        assert float(seconds) < 1
        assert message.startswith("no directory org/model, and http://127.0.0.1:9 cannot be reached: ")
