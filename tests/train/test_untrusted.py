"""Data and pictures that nobody vouches for: each bad input is one line that names it, and writes nothing.

To add one, add a line to a table. The fuzz tests at the end allow two outcomes only: a valid sample, or such a line.
"""

import ast
import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import llava_fast
from llava_fast.processor.processor import read_rgb
from llava_fast.processor.templates import TEMPLATES, get_template
from llava_fast.train import rows
from llava_fast.train.data import LlavaDataset
from llava_fast.train.inspect import check_images
from llava_fast.train.recipe import DataSource
from llava_fast.train.rows import IGNORE
from llava_fast.train.sampler import choose_rows

SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture], "derandomize": True}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(folder: Path, call, *parts: str) -> str:
    """The one line of a refusal that holds all `parts` and left the folder as it was."""
    before = snapshot(folder)
    with pytest.raises((ValueError, OSError)) as error:
        call()
    message = str(error.value)
    assert message.isprintable() and len(message) < 1000, message
    for part in parts:
        assert part in message
    assert snapshot(folder) == before
    return message


def talk(*turns: str, **row) -> dict:
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"conversations": said, **row}


def chat(*contents, **row) -> dict:
    said = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": said, **row}


GOOD = talk("<image>\nwhat", "one", image="0.png", id="good")

# Data files: what is in data.json, and what the line says besides the file's name.
FILES = {
    "not UTF-8": (b'["\xff"]', "not UTF-8 text"),
    "a list cut short": (b'[{"conversations": []}', "line 1: not JSON"),
    "a comma too many": (b"[\n[],\n]", "line 3: not JSON"),
    "NaN": (b'[{"conversations": NaN}]', "not JSON (the number NaN is not finite)"),
    "infinity": (b'{"id": -Infinity}', "line 1: not JSON (the number -Infinity is not finite)"),
    "a number past the largest": (b"[1e999]", "not JSON (the number 1e999 is not finite)"),
    "a number of 5000 digits": (b"[" + b"9" * 5000 + b"]", "not JSON (Exceeds the limit (4300 digits)"),
    "nested lists": (b"[" * 100_000, "not JSON (nested too deeply)"),
    "nested objects": (b'{"a":' * 100_000, "line 1: not JSON (nested too deeply)"),
    "a number of a line": (b'{"conversations": []}\n{oops}', "line 2: not JSON"),
    "a list of nothing": (b"[]", "none of 0 rows can be used: the file is empty"),
    "nothing": (b"", "none of 0 rows can be used: the file is empty"),
    "a control character in text": (b'[{"id": "a\tb"}]', "line 1: not JSON (Invalid control character at)"),
    "a pickle": (b"\x80\x04\x95\x10\x00\x00\x00", "not UTF-8 text"),
}

# Rows of a data file: the row, and what the line says besides "data.json, row 1".
ROWS = {
    "text": ("what is this", "expected an object with a list of 'conversations'"),
    "null": (None, "expected an object with a list of 'conversations'"),
    "a list": ([["human", "what"]], "expected an object with a list of 'conversations'"),
    "no conversations": ({"id": 1, "image": "0.png"}, "(id 1): expected an object with a list of 'conversations'"),
    "conversations in text": ({"conversations": "what"}, "expected an object with a list"),
    "a turn that is text": ({"conversations": ["what"]}, "turn 0 has no text 'value'"),
    "a turn without text": ({"conversations": [{"from": "human"}]}, "turn 0 has no text 'value'"),
    "a number for text": ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 has no text 'value'"),
    "a role twice": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "roles must alternate: turn 1 is from 'human', not 'gpt'",
    ),
    "a role missing": (
        {"conversations": [{"from": "human", "value": "a"}, {"value": "b"}]},
        "turn 1 is from NoneType, not 'gpt'",
    ),
    "a role that is a list": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": [["gpt"]], "value": "b"}]},
        "turn 1 is from list, not 'gpt'",
    ),
    "an endless role": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "x" * 10_000, "value": "b"}]},
        "turn 1 is from 'xxxxxxxxxxxxxxxxxxxx…xxxxxxxxxxxxxxxxxxxx', not 'gpt'",
    ),
    "endless text": (talk("what", "a" * 1_000_001), "1000005 characters of text are more than the limit of 1000000"),
    "half a surrogate pair": (talk("what", "\ud83d"), "turn 1 is no Unicode text"),
    "an id with line breaks": (talk("what", 3, id="a\nb\x1b[31m"), "(id a b\\x1b[31m): turn 1 has no text"),
    "an endless id": (talk("what", 3, id="i" * 10**6), "turn 1 has no text 'value'"),
    "a number for an image": (talk("<image>", "one", image=3), "'image' must be a file name or a list of them"),
    "an object for an image": (talk("<image>", "one", image={"file": "0.png"}), "'image' must be a file name"),
    "null among images": (talk("<image>", "one", image=["0.png", None]), "'image' must be a file name"),
    "a way up": (talk("<image>", "one", image="../x.png"), "image '../x.png' is outside of the image folder"),
    "a way down and up": (talk("<image>", "one", image="a/../../x.png"), "is outside of the image folder"),
    "an absolute path": (talk("<image>", "one", image="/etc/passwd"), "image '/etc/passwd' is outside"),
    "a device": (talk("<image>", "one", image="/dev/zero"), "image '/dev/zero' is outside of the image folder"),
    "a link out": (talk("<image>", "one", image="out.png"), "image 'out.png' is outside of the image folder"),
    "a link in the way": (talk("<image>", "one", image="out/x.png"), "image 'out/x.png' is outside"),
    "a link to itself": (talk("<image>", "one", image="loop.png"), "no image file loop.png"),
    "a NUL": (talk("<image>", "one", image="a\0b.png"), "no image file a\\x00b.png"),
    "a NUL in a folder": (talk("<image>", "one", image="\0/b.png"), "image '\\x00/b.png' cannot be the name of a file"),
    "half a surrogate in a name": (talk("<image>", "one", image="\ud83d/a.png"), "cannot be the name of a file"),
    "an endless name": (talk("<image>", "one", image="a" * 10_000), "no image file aaa"),
    "a line break in a name": (talk("<image>", "one", image="a\nb.png"), "no image file a b.png"),
    "a URL": (
        talk("<image>", "one", image="https://a.b/c.png"),
        "no image file https://a.b/c.png (URLs are not fetched)",
    ),
    "a folder": (talk("<image>", "one", image="sub"), "no image file sub"),
    "the folder itself": (talk("<image>", "one", image=["."]), "no image file ."),
    "no name": (talk("<image>", "one", image=[""]), "no image file"),
    "a pipe": (talk("<image>", "one", image="pipe.png"), "no image file pipe.png"),
    "no such file": (talk("<image>", "one", image="none.png", id=7), "(id 7): no image file none.png"),
    "two marks, one image": (talk("<image><image>", "one", image="0.png"), "2 <image> marks but 1 images"),
    "no mark": (talk("what", "one", image="0.png"), "0 <image> marks but 1 images"),
    "a mark without an image": (talk("<image>", "one"), "1 <image> marks but 0 images"),
    "messages that are text": ({"messages": "what"}, "of 'messages', or of 'prompt' and 'completion'"),
    "a prompt without its completion": ({"prompt": [{"role": "user", "content": "what"}]}, "'prompt' and 'completion'"),
    "a message that is text": ({"messages": ["what"]}, "turn 0 has no 'content', a text or a list of parts"),
    "a message without content": (chat("what", None), "turn 1 has no 'content', a text or a list of parts"),
    "a part that is text": (chat(["what"], "one"), "part 0 of turn 0 is neither a 'text' nor an 'image'"),
    "a part of no text": (chat([{"type": "text"}], "one"), "part 0 of turn 0 is neither a 'text' nor an 'image'"),
    "a part of sound": (chat("what", [{"type": "audio"}]), "part 0 of turn 1 is neither a 'text' nor an 'image'"),
    "a part that is a number": (chat([{"type": "image", "image": 3}], "one"), "the image of part 0 of turn 0 must be"),
    "no URL in a part": (
        chat([{"type": "image_url", "image_url": {}}], "one"),
        "the image of part 0 of turn 0 must be",
    ),
    "a URL in a part": (
        chat([{"type": "image_url", "image_url": {"url": "http://a.b/c.png"}}], "one"),
        "no image file http://a.b/c.png (URLs are not fetched)",
    ),
    "a file URL": (
        chat([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "one"),
        "image '/etc/passwd' is outside of the image folder",
    ),
    "a way up in a part": (chat([{"type": "image", "path": "../x.png"}], "one"), "image '../x.png' is outside of the"),
    "a part without an image": (chat([{"type": "image"}], "one"), "1 <image> marks but 0 images"),
    "an image without a part": (chat([{"type": "text", "text": "what"}], "one", images=["0.png"]), "0 <image> marks"),
    "two questions": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        "roles must alternate: turn 1 is from 'user', not 'assistant'",
    ),
    "two questions after a system turn": (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}] * 2},
        "roles must alternate: turn 2 is from 'system', not 'assistant'",
    ),
    "a role of nobody": ({"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}, "turn 1 is from NoneType"),
    "endless text of parts": (chat("what", [{"type": "text", "text": "a" * 10**6}]), "1000004 characters of text are"),
    "an endless system turn": (
        {"messages": [{"role": "system", "content": "a" * 10**6}, {"role": "user", "content": "b"}]},
        "1000001 characters of text are more than the limit",
    ),
    "half a surrogate pair in a system turn": (
        {"conversations": [{"from": "system", "value": "\ud83d"}, {"from": "human", "value": "b"}]},
        "turn 0 is no Unicode text",
    ),
    "a mark in an answer": (talk("<image> what", "<image>", image="0.png"), "2 <image> marks but 1 images"),
}

# Rows that template `plain`, captions after images, cannot take.
PLAIN = {
    "a second question": (talk("<image>", "a", "q", "b", image="0.png"), "takes exactly two turns, got 4"),
    "no answer": (talk("<image>", image="0.png"), "takes exactly two turns, got 1"),
    "no image": (talk("what", "one"), "needs <image> in the first turn"),
}


def picture(format: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def not_a_number() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


JPEG, PNG = picture("JPEG"), picture("PNG")

# Picture files: their bytes, and what the line says besides "cannot read image" and the file's name.
PICTURES = {
    "empty": (b"", "cannot identify image file"),
    "a web page": (b"<html>404 not found</html>", "cannot identify image file"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "cannot identify image file"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify image file"),
    "a pickle": (b"\x80\x04\x8c\x02os\x94.", "cannot identify image file"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "half a PNG": (PNG[: len(PNG) // 2], "truncated"),
    "a JPEG's header": (JPEG[:20], ""),
    "a PNG's header": (PNG[:30], ""),
    "half a GIF": (picture("GIF", "P")[:900], ""),
    "half a WebP": (picture("WEBP")[:200], ""),
    "half a TIFF": (picture("TIFF")[:200], ""),
    "bytes flipped": (PNG[:60] + bytes(40) + PNG[100:], ""),
    "a small file of 10^10 pixels": (png_of(100_000, 100_000), "decompression bomb"),
    "pixels just past the limit": (png_of(9_500, 9_500), "9500x9500 pixels are more than the limit of 89478485"),
    "no pixels": (png_of(0, 5), ""),
    "a PNG without data": (png_of(8, 8), ""),
    "a bitmap of negative width": (b"BM" + struct.pack("<IHHIIiiHH", 90, 0, 0, 54, 40, -5, 5, 1, 24) + bytes(40), ""),
    "not a number": (not_a_number(), "pixels that are NaN or infinite"),
    "text past the limit": (
        PNG[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))) + PNG[33:],
        "",
    ),
    "thin enough to grow": (picture("PNG", "L", (200_000, 1)), "more than the limit"),
}


@pytest.fixture
def surroundings(folder) -> Path:
    """The image folder of the tests, with links and other things in it that are not pictures."""
    images = folder / "images"
    (images / "sub").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(images / "0.png")
    (images / "out.png").symlink_to(folder / "0.png")
    (images / "out").symlink_to(folder)
    (images / "loop.png").symlink_to(images / "loop.png")
    os.mkfifo(images / "pipe.png")
    return folder


def dataset(folder: Path, processor, content: bytes | list, template: str = "v1", **options) -> LlavaDataset:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "data.json").write_bytes(raw)
    return LlavaDataset(folder / "data.json", folder / "images", processor, template, **options)


def reader(folder: Path, *arguments, **options):
    """A call that reads a data file which is already there, so that the folder can be compared."""
    dataset_of = []
    with pytest.raises((ValueError, OSError)):  # writes data.json
        dataset_of.append(dataset(folder, *arguments, **options))
    template = arguments[2] if len(arguments) > 2 else "v1"
    return lambda: LlavaDataset(folder / "data.json", folder / "images", arguments[0], template, **options)


@pytest.mark.parametrize("name", FILES)
def test_bad_files(surroundings, processor, name):
    content, words = FILES[name]
    refused(surroundings, reader(surroundings, processor, content), str(surroundings / "data.json"), words)


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows(surroundings, processor, name):
    row, words = ROWS[name]
    where = f"{surroundings / 'data.json'}, row 1"
    refused(surroundings, reader(surroundings, processor, [GOOD, row], on_error="raise"), where, words)
    skipped = dataset(surroundings, processor, [GOOD, row], on_error="skip")
    assert len(skipped) == 1 and skipped.report.errors == 1 and words in str(skipped.problems[0])
    capped = reader(surroundings, processor, [GOOD, row], on_error="skip", max_errors=0)
    refused(surroundings, capped, where, words, "it is broken row 1, and max_errors is 0")


@pytest.mark.parametrize("name", PLAIN)
def test_bad_captions(surroundings, processor, name):
    row, words = PLAIN[name]
    where = f"{surroundings / 'data.json'}, row 1"
    refused(surroundings, reader(surroundings, processor, [GOOD, row], "plain", on_error="raise"), where, words)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", PICTURES)
def test_bad_pictures(surroundings, processor, name):
    content, words = PICTURES[name]
    path = surroundings / "images" / "bad.jpg"
    path.write_bytes(content)
    message = refused(surroundings, lambda: processor.image_pixels(path), str(path), words)
    assert message.startswith(("cannot read image", "cannot resize image"))
    refused(surroundings, lambda: processor.image_pixels(content), "cannot re", words)
    inline = talk("<image>", "one", image="data:image/png;base64," + base64.b64encode(content).decode())
    there = dataset(surroundings, processor, [inline], on_error="raise")
    refused(surroundings, lambda: there[0], f"{surroundings / 'data.json'}, row 0: cannot re", words)
    row = talk("<image>", "one", image="bad.jpg", id=name)
    strict = dataset(surroundings, processor, [GOOD, row], on_error="raise")
    refused(surroundings, lambda: strict[1], f"{surroundings / 'data.json'}, row 1 (id {name}): cannot re", words)
    lenient = dataset(surroundings, processor, [GOOD, row], on_error="skip")
    assert torch.equal(lenient[1]["input_ids"], lenient[0]["input_ids"])
    assert lenient.report.unreadable == lenient.report.errors == 1


def test_files_that_are_no_files(surroundings, processor):
    os.mkfifo(surroundings / "pipe.json")
    (surroundings / "images" / "vast.png").touch()
    os.truncate(surroundings / "images" / "vast.png", 2**40)
    for name in ("none.json", "images", "pipe.json"):
        path = surroundings / name
        refused(surroundings / "images" / "sub", lambda path=path: LlavaDataset(path, None, processor), str(path))
    missing = surroundings / "nowhere"
    (surroundings / "data.json").write_text("[]")
    refused(surroundings / "images" / "sub", lambda: LlavaDataset(surroundings / "data.json", missing, processor),
            f"no image folder {missing}")  # fmt: skip
    with pytest.raises(ValueError, match=r"vast\.png: 1099511627776 bytes, at most 1073741824"):
        read_rgb(surroundings / "images" / "vast.png")


def test_a_link_to_the_image_folder_is_followed(surroundings, processor):
    (surroundings / "link").symlink_to(surroundings)
    (surroundings / "data.json").write_text(json.dumps([talk("<image>", "one", image="1.png")]))
    assert len(LlavaDataset(surroundings / "data.json", surroundings / "link", processor)) == 1


def test_a_directory_of_many_names_is_listed_once(surroundings, processor, monkeypatch):
    listed = []
    monkeypatch.setattr(os, "scandir", lambda path, scan=os.scandir: listed.append(path) or scan(path))
    names = ["./" * i + "0.png" for i in range(20)] + ["sub/../" * i + "0.png" for i in range(20)]
    rows = [talk("<image>", "one", image=name) for name in names]
    assert len(dataset(surroundings, processor, rows, on_error="raise")) == 40
    assert listed.count(str(surroundings / "images")) == 1


def test_a_path_through_a_link_is_the_one_that_is_read(surroundings, processor):
    """With deep a link to sub/sub, `deep/../../x` is x in the folder; as a string it would be x beside the folder."""
    images = surroundings / "images"
    (images / "sub" / "sub").mkdir()
    (images / "deep").symlink_to(images / "sub" / "sub")
    Image.new("RGB", (9, 9)).save(images / "x.png")
    through = dataset(surroundings, processor, [talk("<image>", "one", image="deep/../../x.png")], on_error="raise")
    assert through[0]["pixel_values"].shape[0] == 1
    assert through.images(0) == [str(images / "x.png")]
    assert check_images([through], 1) == ([], 1)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((4, 4, 3), np.nan, np.float32), "is uint8 with 2 or 3 dimensions, not float32 [4, 4, 3]"),
        (torch.full((3, 4, 4), torch.inf, dtype=torch.bfloat16), "not bfloat16 [3, 4, 4]"),
        (torch.zeros(3, 4, 4, requires_grad=True), "not float32 [3, 4, 4]"),
        (np.zeros((6, 6, 5), np.uint8), "with 1 to 4 channels, not [6, 6, 5]"),
        (np.zeros((0, 4, 3), np.uint8), "with 1 to 4 channels, not [0, 4, 3]"),
        (np.zeros((2, 4, 4, 3), np.uint8), "not uint8 [2, 4, 4, 3]"),
        (np.zeros((4, 4), object), "not object [4, 4]"),
    ],
)
def test_bad_arrays(tmp_path, processor, array, words):
    refused(tmp_path, lambda: processor.image_pixels(array), words)


@pytest.mark.parametrize("name", ["v7", "", "V1", "plain\n", "../v1", None, ["v1"]])
def test_bad_templates(tmp_path, name):
    refused(tmp_path, lambda: get_template(name), "unknown template", "known: v1, llava_v1, plain")


# No pickles: a checkpoint or a data file must not be able to run code.


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CODE = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def unsafe_calls(source: str) -> list[str]:
    """The calls that could run code out of a file, and imports of what makes such calls."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            names = {alias.name for alias in node.names} - {"UnpicklingError"}  # which torch.load raises
            found += [f"{node.lineno}: from {node.module} import {name}" for name in sorted(names)]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in CODE or called.partition(".")[0] in PICKLES:
            found.append(f"{node.lineno}: {called}")
        if called.endswith("torch.load") and options.get("weights_only") != "True":
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        found += [
            f"{node.lineno}: {called} with {key}"
            for key in ("allow_pickle", "trust_remote_code")
            if options.get(key, "False") != "False"
        ]
    return found


def test_nothing_is_unpickled():
    package = Path(llava_fast.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    assert [f"{path}:{call}" for path, source in sources.items() for call in unsafe_calls(source)] == []
    assert sum(source.count("torch.load(") for source in sources.values()) > 0  # checkpoints in .bin files are read


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "pickle.load(file)",
        "from pickle import loads",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "exec(text)",
    ],
)
def test_an_unsafe_call_is_found(source):
    assert len(unsafe_calls(source)) == 1


# Whatever comes in


def one_line_naming(error: BaseException, *names: str) -> None:
    message = str(error)
    assert message.isprintable() and any(name in message for name in names), message


NAMES = st.sampled_from(["0.png", "../0.png", "none.png", "out/0.png", "sub", "", "a\0", "\ud800"]) | st.text(
    max_size=9
)
TEXTS = st.sampled_from(["<image>", "<image>\nwhat", "one </s> two", "", "<ima", "\x00", "\ud800", "é ﷺ 🦙"]) | st.text(
    st.sampled_from("<image>/s \n\u2028Ünî"), max_size=30
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url"])},
    optional={"text": TEXTS, "image": NAMES, "image_url": NAMES | st.fixed_dictionaries({"url": NAMES})},
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
TURNS = st.fixed_dictionaries(
    {}, optional={"from": st.sampled_from(["human", "gpt", "system"]) | VALUES, "value": TEXTS | VALUES}
)
MESSAGES = st.lists(TEXTS | st.lists(PARTS, max_size=3) | VALUES, max_size=4).map(lambda c: chat(*c)["messages"])
GOOD_TURNS = st.lists(TEXTS, max_size=5).map(lambda texts: talk(*texts)["conversations"])
ROW = st.fixed_dictionaries(
    {}, optional={"id": VALUES, "image": NAMES | st.lists(NAMES, max_size=3) | VALUES,
                  "conversations": GOOD_TURNS | st.lists(TURNS, max_size=4) | VALUES, "model": VALUES,
                  "images": NAMES | st.lists(NAMES, max_size=3) | VALUES, "messages": MESSAGES | VALUES,
                  "prompt": MESSAGES, "completion": MESSAGES}
)  # fmt: skip


@settings(max_examples=150, **SHARED)
@given(content=st.lists(ROW | VALUES, max_size=4), template=st.sampled_from(sorted(TEMPLATES)), lines=st.booleans(),
       on_error=st.sampled_from([None, "raise", "skip"]), max_length=st.integers(1, 60))  # fmt: skip
def test_any_json_is_a_sample_or_one_line(surroundings, processor, content, template, lines, on_error, max_length):
    raw = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    path = surroundings / "data.json"
    path.write_text(raw, encoding="utf-8")
    try:
        data = LlavaDataset(path, surroundings / "images", processor, template, max_length, on_error=on_error)
    except (ValueError, OSError) as error:
        one_line_naming(error, str(path))
        return
    assert len(data) == data.report.rows - sum(data.report.dropped.values()) > 0
    for i, sample in enumerate(data):
        n_image_tokens = int((sample["input_ids"] == processor.image_token_id).sum())
        assert n_image_tokens == len(sample["pixel_values"]) * processor.num_image_tokens()
        assert len(sample["input_ids"]) == len(sample["labels"]) == data.lengths[i] <= max_length
        assert (sample["labels"] != IGNORE).any()


@settings(max_examples=150, **SHARED)
@given(raw=st.binary(max_size=200) | st.text(st.sampled_from('[]{}":,\\ue1\n NaN'), max_size=60).map(str.encode))
def test_any_bytes_are_rows_or_one_line(tmp_path, raw):
    path = tmp_path / "data.json"
    path.write_bytes(raw)
    try:
        found = rows.read_rows(path)
    except (ValueError, OSError) as error:
        one_line_naming(error, str(path))
        return
    for row in found:
        try:
            rows.parse_row(row)
        except ValueError as error:
            assert str(error).isprintable()


@settings(max_examples=200, **SHARED)
@given(turns=st.lists(st.text(max_size=40) | TEXTS, max_size=7), name=st.sampled_from(sorted(TEMPLATES)))
def test_any_conversation_has_a_prompt_or_one_line(turns, name):
    template = get_template(name)
    try:
        pieces = template.pieces(turns)
    except ValueError as error:
        one_line_naming(error, name)
        return
    prompt = "".join(text for text, _ in pieces)
    if name == "plain":
        assert prompt.count("<image>") >= turns[0].count("<image>") > 0
    else:
        assert prompt.count("<image>") >= sum(turn.count("<image>") for turn in turns)


SEEDS = [
    JPEG, PNG, picture("GIF", "P"), picture("WEBP"), picture("TIFF", "CMYK"), picture("BMP"), picture("PNG", "LA"),
    picture("TIFF", compression="tiff_lzw"), picture("PPM"), picture("JPEG2000"), picture("ICO"), picture("TGA"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, about corrupt EXIF data
@settings(max_examples=250, **SHARED)
@given(seed=st.sampled_from(SEEDS), cut=st.floats(0, 1), length=st.integers(0, 40), junk=st.binary(max_size=12),
       tail=st.booleans())  # fmt: skip
def test_any_picture_is_pixels_or_one_line(tmp_path, processor, seed, cut, length, junk, tail):
    at = int(cut**2 * len(seed))  # headers rather than pixels
    path = tmp_path / "fuzz.img"
    path.write_bytes(seed[:at] + junk + (seed[at + length :] if tail else b""))
    try:
        pixels = processor.image_pixels(path)
    except ValueError as error:
        one_line_naming(error, str(path))
        return
    assert pixels.shape == (28, 28, 3) and pixels.dtype == np.uint8


@settings(max_examples=200, **SHARED)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_any_mixture_takes_rows_that_are_there(sizes, seed, data):
    weighted = data.draw(st.booleans())
    sources = []
    for _ in sizes:
        sampling = data.draw(st.sampled_from(["first", "last", "random", "repeat"]))
        count = data.draw(st.integers(1, 80) | st.integers(1, 300).map(lambda n: f"{n}%"))
        size = {"weight": data.draw(st.floats(0.01, 100))} if weighted else {"count": count}
        sources.append(DataSource("a.json", sampling=sampling, **size))
    try:
        chosen = choose_rows(sources, sizes, seed)
    except ValueError as error:
        one_line_naming(error, "a.json")
        assert not weighted
        return
    for source, size, numbers in zip(sources, sizes, chosen):
        assert ((0 <= numbers) & (numbers < size)).all()
        if source.sampling != "repeat":
            assert len(np.unique(numbers)) == len(numbers)
