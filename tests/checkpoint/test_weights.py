"""Damaged, malicious and ill-fitting checkpoints, wrong arguments, and writes that fail: each one line that names the
file, key or value, and nothing written."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llava_fast import convert as converter
from llava_fast.checkpoint import weights as weight_files
from llava_fast.checkpoint.weights import parse_size
from llava_fast.convert import convert
from llava_fast.drop_in import LlavaForConditionalGeneration


def index_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    file = folder / "model.safetensors.index.json"
    return file, json.loads(file.read_text())


def repoint(folder: Path, name: Any) -> None:
    """Have the index say that a key is in another file."""
    file, index = index_of(folder)
    index["weight_map"]["lm_head.weight"] = name
    file.write_text(json.dumps(index))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    for file in folder.glob("model-*.safetensors"):
        weights = load_file(file)
        if "lm_head.weight" in weights:
            edit(weights)
            save_file(weights, file)
            ours = {name: file.name for name in weights}
    file, index = index_of(folder)
    gone = {k: v for k, v in index["weight_map"].items() if v != next(iter(ours.values())) or k in ours}
    file.write_text(json.dumps({"weight_map": {**gone, **ours}}))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def damage_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of the first shard as if it were true."""
    file = first_shard(folder)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    head = json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])


class Harmful:
    """Pickled, it makes a directory when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder / "code-has-run"),)


def become_bin(folder: Path, content: Any, **settings: Any) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin", **settings)


def largest(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


SHARD = r"model-0000\d-of-00003.safetensors"
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing-key": (lambda f: edit_weights(f, lambda w: w.pop("lm_head.weight")), r"missing lm_head.weight$"),
    "unexpected-key": (
        lambda f: edit_weights(f, lambda w: w.update({"model.image_newline": torch.zeros(4)})),
        r"unexpected model.image_newline$",
    ),
    "mis-shaped": (
        lambda f: edit_weights(f, lambda w: w.update({"model.norm.weight": torch.zeros(31)})),
        r"model.language_model.norm.weight has shape \[31\], expected \[32\]",
    ),
    "shorter-head": (
        lambda f: edit_weights(f, lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:90].contiguous()})),
        r"lm_head.weight has 90 rows, but config.json says vocab_size 101$",
    ),
    "longer-vocabulary": (
        lambda f: edit_config(f, vocab_size=120),
        r"has 101 rows, but config.json says vocab_size 120",
    ),
    "twice": (
        lambda f: edit_weights(f, lambda w: w.update({"language_model.lm_head.weight": w["lm_head.weight"].clone()})),
        r"lm_head.weight is there twice",
    ),
    "tied-but-different": (lambda f: edit_config(f, tie_word_embeddings=True), r"lm_head and embed_tokens differ"),
    "truncated-header": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:60]), SHARD),
    "truncated-data": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-40]), SHARD),
    "empty-shard": (lambda f: first_shard(f).write_bytes(b""), SHARD),
    "header-longer-than-file": (lambda f: first_shard(f).write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"), SHARD),
    "header-is-no-json": (lambda f: first_shard(f).write_bytes((8).to_bytes(8, "little") + b"not json"), SHARD),
    "offsets-beyond-the-end": (
        lambda f: damage_header(f, lambda h: largest(h).update(data_offsets=[0, 10**12])),
        SHARD,
    ),
    "shape-unlike-offsets": (lambda f: damage_header(f, lambda h: largest(h).update(shape=[10**6, 10**6])), SHARD),
    "overlapping-tensors": (
        lambda f: damage_header(
            f, lambda h: [e.update(data_offsets=[0, 4], shape=[1]) for k, e in h.items() if "_m" not in k]
        ),
        SHARD,
    ),
    "dtype-unheard-of": (lambda f: damage_header(f, lambda h: largest(h).update(dtype="F7")), SHARD),
    "index-leaves-the-folder": (
        lambda f: repoint(f, "../secret.safetensors"),
        r"'../secret.safetensors', which is not",
    ),
    "index-is-absolute": (
        lambda f: repoint(f, "/etc/secret.safetensors"),
        r"'/etc/secret.safetensors', which",
    ),
    "index-names-a-number": (lambda f: repoint(f, 7), r"lm_head.weight is said to be in 7, which is not a file"),
    "index-names-another-file": (lambda f: repoint(f, "config.json"), r"'config.json', which is no weight file"),
    "index-of-a-missing-shard": (lambda f: repoint(f, "model-9.safetensors"), r"model-9.safetensors is missing, but"),
    "index-lies": (
        lambda f: (
            repoint(f, index_of(f)[1]["weight_map"]["model.layers.0.mlp.up_proj.weight"])
            or repoint(f, next(p.name for p in sorted(f.glob("model-*")) if "lm_head.weight" not in load_file(p)))
        ),
        r"lacks lm_head.weight, which model.safetensors.index.json says is there",
    ),
    "index-is-empty": (lambda f: index_of(f)[0].write_text("{}"), r"index.json has no weight_map"),
    "index-is-no-json": (lambda f: index_of(f)[0].write_text("{"), r"index.json is not JSON"),
    "index-is-deep": (lambda f: index_of(f)[0].write_text("[" * 10**6), r"index.json is not JSON"),
    "code-in-a-bin": (
        lambda f: become_bin(f, Harmful(f)),
        r"pytorch_model.bin holds code .posix.mkdir. beside its tensors",
    ),
    "code-in-an-old-bin": (
        lambda f: become_bin(f, {"lm_head.weight": Harmful(f)}, _use_new_zipfile_serialization=False),
        r"pytorch_model.bin holds code",
    ),
    "bin-of-no-tensors": (
        lambda f: become_bin(f, {"lm_head.weight": [1.0]}),
        r"pytorch_model.bin is not a dict",
    ),
    "truncated-bin": (lambda f: become_bin(f, b"PK\x03\x04 and no more"), r"pytorch_model.bin"),
    "no-weights": (lambda f: [p.unlink() for p in f.glob("model*")], r"has no weights"),
    "no-config": (lambda f: (f / "config.json").unlink(), r"original/config.json"),
    "config-is-a-list": (lambda f: (f / "config.json").write_text("[]"), r"config.json holds a JSON list"),
    "config-is-binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config.json is not JSON"),
    "another-model": (lambda f: edit_config(f, model_type="bert"), r"model_type is 'bert'; expected 'llava' .HF."),
    "no-model-type": (lambda f: edit_config(f, model_type=None), r"model_type is None; expected 'llava'"),
    "unknown-projector": (lambda f: edit_config(f, mm_projector_type="cabstractor"), r"mm_projector_type is 'cabstrac"),
    "another-projector": (
        lambda f: edit_config(f, mm_projector_type="mlp3x_gelu"),
        r"missing .*linear_3.bias",
    ),
    "tower-elsewhere": (
        lambda f: edit_config(f, mm_vision_tower="openai/clip-vit-large-patch14-336"),
        r"mm_vision_tower: no directory openai/clip-vit-large-patch14-336, .* or pass vision_tower=DIRECTORY",
    ),
    "tower-is-a-number": (lambda f: edit_config(f, mm_vision_tower=5), r"mm_vision_tower: expected .* got 5"),
    "tower-of-another-kind": (
        lambda f: (f.parent / "clip" / "config.json").write_text('{"model_type": "siglip"}'),
        r"clip/config.json: model_type is 'siglip'; expected 'clip'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(tiny: SimpleNamespace, tmp_path: Path, name: str) -> None:
    mistake, message = MISTAKES[name]
    model = tiny.ours(tiny.config())
    folder = tiny.as_released(model, tmp_path / "original", str(tiny.save_clip(model, tmp_path / "clip")), shards=3)
    mistake(folder)
    before = sorted(tmp_path.rglob("*"))
    for attempt in (
        lambda: LlavaForConditionalGeneration.from_pretrained(folder),
        lambda: convert(folder, tmp_path / "out", layout="hf"),
    ):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "torch"}, "layout is 'torch'; expected 'hf' or 'original'"),
        ({"dtype": "int8"}, "dtype 'int8' is not a floating dtype"),
        ({"dtype": "load"}, "dtype 'load' is not a floating dtype"),
        ({"max_shard_size": "big"}, "max_shard_size is 'big'; expected a size such as 5GB"),
        ({"max_shard_size": 0}, "max_shard_size is 0; expected"),
        ({"vision_tower": "nowhere"}, "vision_tower: no directory nowhere"),
        ({"mm_projector": "nowhere.bin"}, "mm_projector: no file nowhere.bin"),
        ({"base_model": "base"}, "base_model is for adapters, and .*/hf has no adapter_config.json"),
        ({"target": "missing/out"}, "no directory .*/missing to put out in"),
        ({"target": "hf"}, "/hf exists; it is not overwritten"),
        ({"source": "nowhere"}, "no directory .*/nowhere"),
        ({"layout": "original"}, "this model does not say which: pass mm_vision_tower"),
    ],
)
def test_wrong_arguments_are_one_line(
    tiny: SimpleNamespace, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    tiny.ours(tiny.config()).save_pretrained(tmp_path / "hf")
    settings = {"source": "hf", "target": "out", "layout": "hf", **arguments}
    source, target = tmp_path / settings.pop("source"), tmp_path / settings.pop("target")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        convert(source, target, **settings)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_wrong_arguments_of_loading_and_saving(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.ours(tiny.config())
    model.save_pretrained(tmp_path / "hf")
    for arguments, message in (
        ({"weights_only": False}, "weights_only=False would run code"),
        ({"base_model": "base"}, "base_model is for adapters, and .* has no adapter_config.json"),
        ({"mm_projector": tmp_path / "hf" / "config.json"}, "config.json is not a PyTorch file of tensors alone"),
        ({"mm_projector": tmp_path / "hf", "config": model.config}, "mm_projector goes with a checkpoint directory"),
    ):
        with pytest.raises(ValueError, match=message):
            LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", **arguments)
    for arguments, message in (
        ({"layout": "torch"}, "layout is 'torch'; expected 'hf' or 'original'"),
        ({"with_tower": False}, "with_tower=False is for layout=original"),
        ({"layout": "original", "push_to_hub": True}, "push_to_hub goes with layout='hf'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_damaged_hf_checkpoint_is_named(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """transformers reads it, but only after it has been looked through."""
    tiny.ours(tiny.config()).save_pretrained(tmp_path, max_shard_size="60KB")
    file, index = index_of(tmp_path)
    index["weight_map"]["language_model.lm_head.weight"] = "../../elsewhere.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"in '../../elsewhere.safetensors', which is not a file of this folder$"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)
    become_bin(tmp_path, Harmful(tmp_path))
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds code") as caught:
        LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "code-has-run").exists()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A weight file of three tensors, by its ending."""
    folder = tmp_path_factory.mktemp("sound")
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(())}
    save_file(weights, folder / "model.safetensors")
    torch.save(weights, folder / "model.bin")
    return {file.suffix[1:]: file.read_bytes() for file in folder.iterdir()}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=4),
    length=st.none() | st.integers(0, 3000),
    ending=st.sampled_from(["safetensors", "bin"]),
)
def test_no_bytes_do_harm(
    sound: dict[str, bytes], tmp_path: Path, places: list[tuple[int, int]], length: int | None, ending: str
) -> None:
    """Whatever the bytes, a file is read or refused in one line with its name."""
    data = bytearray(sound[ending])
    for place, value in places:
        data[place % len(data)] = value
    file = tmp_path / f"model.{ending}"
    file.write_bytes(data[:length])
    try:
        for stored in weight_files.open_weights(file).values():
            assert tuple(stored.read().shape) == stored.shape
    except ValueError as error:
        assert str(error).startswith(str(file))
        assert "\n" not in str(error)


# Interruptions


@pytest.fixture
def saved(tiny: SimpleNamespace, tmp_path: Path) -> Path:
    tiny.ours(tiny.config()).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_disk_that_takes_no_more(saved: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match=r"partial-.*/model.safetensors'$") as caught:
            convert(saved, saved.parent / "out", layout="hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in saved.parent.iterdir()] == ["hf"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(weight_files.os, "fsync", fail)
    with pytest.raises(type(error)) as caught:
        convert(saved, saved.parent / "out", layout="hf", max_shard_size="50KB")
    if isinstance(error, OSError):
        assert str(caught.value).startswith("[Errno 28] No space left on device: '")
    assert [path.name for path in saved.parent.iterdir()] == ["hf"]


def test_too_little_room_is_said_at_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"out needs 0.00 GiB, but its disk has 0.00 GiB left"):
        convert(saved, saved.parent / "out", layout="hf")
    assert [path.name for path in saved.parent.iterdir()] == ["hf"]


@pytest.mark.parametrize("place", [-1, 40, 3000])
def test_what_was_written_is_verified(saved: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """A byte that changes between writing and reading back: in a value, in a name, in a shape."""

    def flip(folder: Path, *arguments: Any) -> dict[str, str]:
        digests = weight_files.write_weights(folder, *arguments)
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)
        return digests

    monkeypatch.setattr(converter, "write_weights", flip)
    with pytest.raises(ValueError, match=r"as it was written|not a whole safetensors file"):
        convert(saved, saved.parent / "out", layout="hf")
    assert [path.name for path in saved.parent.iterdir()] == ["hf"]


MEMORY = """
import sys, threading, time
from pathlib import Path
from llava_fast.convert import convert

def own_mib():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

for source in sys.argv[1:]:
    before, peak, done = own_mib(), 0.0, False
    def watch():
        global peak
        while not done:
            peak = max(peak, own_mib())
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        convert(source, source + "-hf", layout="hf", max_shard_size="60MB")
    finally:
        done = True
        thread.join()
    print(peak - before)
"""


def test_memory_is_bounded(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """The process's own memory grows by a few tensors, not by the model."""
    model = LlavaForConditionalGeneration(
        tiny.config({"hidden_size": 640, "intermediate_size": 2560, "vocab_size": 4000, "num_hidden_layers": 5})
    )
    folders = [tmp_path / "safetensors", tmp_path / "bin"]
    for folder in folders:
        tiny.as_released(model, folder, "x", tower=True, binary=folder.name == "bin", shards=2)
        edit_config(folder, mm_vision_config=model.config.vision_config.to_dict())
    widest_mib = max(weight.nbytes for weight in model.state_dict().values()) / 2**20
    model_mib = sum(file.stat().st_size for file in folders[0].iterdir()) / 2**20
    done = subprocess.run([sys.executable, "-c", MEMORY, *folders], capture_output=True, text=True, check=True)
    grown_mib = [float(line) for line in done.stdout.split()[-2:]]
    assert 4.5 * widest_mib < model_mib / 3
    assert max(grown_mib) < 4.5 * widest_mib
    for folder in folders:
        sizes = [file.stat().st_size for file in Path(f"{folder}-hf").glob("*.safetensors")]
        assert len(sizes) >= 3
        assert max(sizes) < 61e6


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("700", 700), (700, 700), ("2mb", 2 * 10**6)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size
