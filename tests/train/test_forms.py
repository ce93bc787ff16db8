"""Every form of a row gives the sample that LLaVA's own form gives, and the text that inference is prompted with."""

import base64
import io
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import LlavaProcessor as HuggingFaceProcessor
from trl.data_utils import prepare_multimodal_messages

from llava_fast.processor.templates import TEMPLATES, get_template
from llava_fast.train import tables
from llava_fast.train.checkpoints import made_from
from llava_fast.train.data import Embedded, LlavaDataset
from llava_fast.train.inspect import check_images, inspect, show
from llava_fast.train.recipe import DataSource
from llava_fast.train.rows import IGNORE, parse_row
from llava_fast.train.trainer import run

LLAVA = [
    {"id": "a", "image": "0.png", "conversations": [
        {"from": "human", "value": "<image>\nwhat is this"}, {"from": "gpt", "value": "one two"},
        {"from": "human", "value": "is this"}, {"from": "gpt", "value": "three"}]},
    {"id": "b", "conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "four"}]},
    {"id": "c", "image": ["1.png", "2.png"], "conversations": [
        {"from": "human", "value": "<image>\n<image>\nwhat is"}, {"from": "gpt", "value": "five six"}]},
]  # fmt: skip


def said(row: dict) -> list[tuple[str, str]]:
    return [(("user", "assistant")[i % 2], turn["value"]) for i, turn in enumerate(row["conversations"])]


def names(row: dict) -> list[str]:
    images = row.get("image", [])
    return [images] if isinstance(images, str) else images


def parts(text: str, images: list) -> list[dict]:
    """The parts of a message: its images first, each taken from `images`, or a mark if that is empty."""
    marks = [{"type": "image", **({"image": images.pop(0)} if images else {})} for _ in range(text.count("<image>"))]
    return [*marks, {"type": "text", "text": text.replace("<image>\n", "")}]


def contents(folder: Path, row: dict) -> list[bytes]:
    return [(folder / name).read_bytes() for name in names(row)]


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def url_parts(text: str, urls: list) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": urls.pop(0)}} for _ in range(text.count("<image>"))]
    return [*images, {"type": "text", "text": text.replace("<image>\n", "")}]


def messages(row: dict, content=lambda text, images: text, images=()) -> list[dict]:
    left = list(images)
    return [{"role": role, "content": content(text, left)} for role, text in said(row)]


def without_marks(text: str, images: list) -> str:
    return text.replace("<image>\n", "")


# LLaVA's row, and the folder of its images, to the same row in another form.
FORMS = {
    "user and assistant": lambda row, _: {
        **row, "conversations": [{"from": role, "value": text} for role, text in said(row)]
    },
    "conversations of role and content": lambda row, _: {**row, "conversations": messages(row)},
    "messages with marks": lambda row, _: {"images": names(row), "messages": messages(row)},
    "messages of parts": lambda row, _: {"images": names(row), "messages": messages(row, parts)},
    "TRL's messages without marks": lambda row, _: {"images": names(row), "messages": messages(row, without_marks)},
    "messages with paths": lambda row, _: {"messages": messages(row, parts, names(row))},
    "OpenAI's messages with file names": lambda row, _: {"messages": messages(row, url_parts, names(row))},
    "OpenAI's messages with data URLs": lambda row, folder: {
        "messages": messages(row, url_parts, map(data_url, contents(folder, row)))
    },
    "a path of datasets": lambda row, _: {**row, "image": [{"path": name, "bytes": None} for name in names(row)]},
}  # fmt: skip


def in_form(form: str, row: dict, folder: Path) -> dict:
    return {"id": row["id"], **FORMS[form](row, folder)}


def same_samples(found: LlavaDataset, expected: LlavaDataset) -> None:
    assert len(found) == len(expected)
    for sample, wanted in zip(found, expected):
        assert all(torch.equal(sample[key], wanted[key]) for key in wanted)
    assert (found.lengths, found.n_images) == (expected.lengths, expected.n_images)
    assert [found.row(i)["id"] for i in range(len(found))] == [expected.row(i)["id"] for i in range(len(expected))]


@pytest.fixture
def expected(folder, processor) -> LlavaDataset:
    (folder / "llava.json").write_text(json.dumps(LLAVA))
    return LlavaDataset(folder / "llava.json", folder, processor, on_error="raise")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrow"])
def test_every_form_gives_the_sample_of_llavas_form(folder, processor, expected, form, suffix):
    rows = [in_form(form, row, folder) for row in LLAVA]
    path = folder / f"data{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        rows = [{**row, "image": names(row)} if "image" in row else row for row in rows]
        write(pa.Table.from_pylist(rows), path)
    same_samples(LlavaDataset(path, folder, processor, on_error="raise"), expected)


def test_forms_may_be_mixed_in_a_file(folder, processor, expected):
    forms = ["messages of parts", "user and assistant", "OpenAI's messages with data URLs"]
    rows = [in_form(form, row, folder) for form, row in zip(forms, LLAVA)]
    (folder / "mixed.json").write_text(json.dumps(rows))
    same_samples(LlavaDataset(folder / "mixed.json", folder, processor, on_error="raise"), expected)


def write(table: pa.Table, path: Path, row_group_size: int = 2) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=row_group_size)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


# Images inside of tables


def embedded(folder: Path, kind: str) -> pa.Table:
    """LLaVA's rows with images as the datasets library stores them, as bytes, or within the messages."""
    if kind == "datasets":
        cells = [[{"bytes": content, "path": None} for content in contents(folder, row)] for row in LLAVA]
        return pa.table({"id": ["a", "b", "c"], "images": cells, "messages": [messages(row) for row in LLAVA]})
    if kind == "bytes":
        cells = [contents(folder, row) for row in LLAVA]
        return pa.table({"id": ["a", "b", "c"], "images": cells, "messages": [messages(row) for row in LLAVA]})
    if kind == "some by path":
        cells = [[{"bytes": None, "path": name} for name in names(row)] for row in LLAVA]
        cells[0] = [{"bytes": contents(folder, LLAVA[0])[0], "path": "elsewhere.png"}]
        turns = [row["conversations"] for row in LLAVA]
        return pa.table({"id": ["a", "b", "c"], "image": cells, "conversations": turns})
    if kind == "data URLs":
        urls = [[*map(data_url, contents(folder, row))] for row in LLAVA]
        return pa.table({"id": ["a", "b", "c"], "images": urls, "messages": [messages(row) for row in LLAVA]})
    cells = [[{"bytes": content, "path": None} for content in contents(folder, row)] for row in LLAVA]
    rows = [{"id": row["id"], "messages": messages(row, parts, cell)} for row, cell in zip(LLAVA, cells)]
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize("kind", ["datasets", "bytes", "some by path", "data URLs", "in messages"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_images_in_tables(folder, processor, expected, kind, suffix, monkeypatch):
    write(embedded(folder, kind), folder / f"data{suffix}")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # the scan decodes no image
        found = LlavaDataset(folder / f"data{suffix}", folder, processor, on_error="raise")
        assert found.lengths == expected.lengths
    same_samples(found, expected)
    same_samples(pickle.loads(pickle.dumps(found)), expected)
    backwards = [found[i]["pixel_values"] for i in (2, 1, 0)]
    assert all(torch.equal(a, expected[i]["pixel_values"]) for a, i in zip(backwards, (2, 1, 0)))
    assert (
        sum(len(s["pixel_values"]) for batch in DataLoader(found, 2, num_workers=2, collate_fn=list) for s in batch)
        == 3
    )
    assert check_images([found], 4) == ([], 3)
    if kind in ("datasets", "bytes", "in messages"):
        assert found.images(2) == [Embedded(folder / f"data{suffix}", 2, i) for i in range(2)]
        assert len(LlavaDataset(folder / f"data{suffix}", None, processor)) == 3  # no image folder is needed


def test_the_scan_does_not_read_the_contents_of_images(folder, processor):
    """It succeeds where they are unreadable."""
    cells = [{"bytes": np.random.default_rng(i).bytes(10_000), "path": f"{i}.png"} for i in range(8)]
    talk = [{"role": "user", "content": "<image>\nwhat"}, {"role": "assistant", "content": "one"}]
    path = folder / "data.parquet"
    write(pa.table({"image": cells, "messages": [talk] * 8}), path, 8)
    group = pq.read_metadata(path).row_group(0)
    (column,) = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "image.bytes"]
    start, size = column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
    whole = path.read_bytes()
    path.write_bytes(whole[:start] + bytes(size) + whole[start + size :])
    found = LlavaDataset(path, None, processor, on_error="raise")
    assert found.n_images == [1] * 8
    with pytest.raises(ValueError, match=r"data\.parquet, row 0: .*not readable as Parquet"):
        found[0]


def test_an_image_that_cannot_be_decoded_is_named(folder, processor):
    good, bad = (folder / "0.png").read_bytes(), b"\x80\x04pickle"
    talk = [{"role": "user", "content": "<image>\nwhat"}, {"role": "assistant", "content": "one"}]
    table = pa.table({"id": [0, 1], "image": [good, bad], "messages": [talk, talk]})
    for suffix in (".parquet", ".arrow"):
        write(table, folder / f"data{suffix}")
        strict = LlavaDataset(folder / f"data{suffix}", None, processor, on_error="raise")
        with pytest.raises(ValueError, match=rf"data{suffix}, row 1 \(id 1\): cannot read image of 8 bytes: cannot id"):
            strict[1]
        lenient = LlavaDataset(folder / f"data{suffix}", None, processor, on_error="skip")
        assert torch.equal(lenient[1]["pixel_values"], lenient[0]["pixel_values"])
        problems, n_images = check_images([lenient], 2)
        assert [problem.row for problem in problems] == [1] and n_images == 2


def test_samples_of_one_embedded_image_stay_together(folder, processor):
    pictures = [(folder / f"{i % 3}.png").read_bytes() for i in range(30)]
    talk = [{"role": "user", "content": "<image>\nwhat"}, {"role": "assistant", "content": "one"}]
    write(pa.table({"image": pictures, "messages": [talk] * 30}), folder / "data.parquet")
    train, validation = LlavaDataset(folder / "data.parquet", None, processor).split(0.3)
    colours = [{tuple(s["pixel_values"].flatten()[:3].tolist()) for s in part} for part in (train, validation)]
    assert (len(train), len(validation)) == (20, 10) and not colours[0] & colours[1]


def test_an_unreadable_image_does_not_stop_a_split(folder, processor):
    """It is found, and counted, when its sample is loaded."""
    talk = [{"role": "user", "content": "<image>\nwhat"}, {"role": "assistant", "content": "one"}]
    cells = [{"bytes": None, "path": f"{i % 3}.png"} for i in range(10)]
    cells[4]["path"] = "../elsewhere.png"
    write(pa.table({"image": cells, "messages": [talk] * 10}), folder / "data.parquet")
    rows = [{"images": [cell["path"]], "messages": talk} for cell in cells]
    rows[4]["images"] = ["data:image/png;base64,no"]
    (folder / "data.json").write_text(json.dumps(rows))
    for name in ("data.parquet", "data.json"):
        parts = LlavaDataset(folder / name, folder, processor, on_error="skip").split(0.3)
        assert sum(map(len, parts)) == sum(len(list(part)) for part in parts) == 10
        assert sum(part.report.unreadable for part in parts) == 1


# Folders


@pytest.mark.parametrize(
    ("files", "split", "rows"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         None, [0, 1]),
        (["data/small-00000-of-00001.parquet", "data/large-00000-of-00001.parquet"], "small", [0]),
        (["train/b.json", "train/a.jsonl", "validation/a.json"], "validation", [2]),
        (["train/b.json", "train/a.jsonl", "validation/a.json"], "train", [1, 0]),
        (["my_train_2.jsonl", "my_dev.jsonl", "other.jsonl"], "validation", [1]),
        (["b.parquet", "a.parquet", ".hidden.parquet", "__cache__/c.parquet"], None, [1, 0]),
        (["sub/b.json", "a.json", "README.md"], "train", [1, 0]),
    ],
)  # fmt: skip
def test_folders_are_read_as_datasets_reads_them(tmp_path, files, split, rows):
    for i, name in enumerate(files):
        path = tmp_path / "set [1]" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"id": i, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
        if path.suffix == ".parquet":
            write(pa.Table.from_pylist([row]), path)
        else:
            path.write_text(json.dumps(row))
    folder = tables.open_table(tmp_path / "set [1]", split)
    assert [row["id"] for row in folder.read(range(len(folder)))] == rows
    assert [folder.where(i) for i in range(len(folder))] == [(tmp_path / "set [1]" / files[i], 0) for i in rows]
    (tmp_path / "set [1]").rename(tmp_path / "set")  # brackets are wildcards to datasets
    theirs = datasets.load_dataset(str(tmp_path / "set"), split=split or "train", streaming=True)
    assert [row["id"] for row in theirs] == rows


def test_a_split_that_is_not_there(tmp_path, processor):
    for name in ("a", "b"):
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "data" / f"{name}-00000-of-00001.json").write_text("[]")
    for split, words in ((None, "no split 'train'; there are a, b"), ("c", "no split 'c'; there are a, b")):
        with pytest.raises(ValueError, match=f"set: {words}"):
            LlavaDataset([DataSource(tmp_path / "set", split=split)], None, processor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty: no data files \(\.json, \.jsonl, \.parquet, \.arrow\) in this folder"
    ):
        LlavaDataset(tmp_path / "empty", None, processor)
    with pytest.raises(ValueError, match=r"a-00000-of-00001\.json: a split is of a folder, and this is a file"):
        LlavaDataset([DataSource(tmp_path / "set/data/a-00000-of-00001.json", split="train")], None, processor)


def test_what_the_datasets_library_saves(folder, processor, expected):
    """`save_to_disk` of a Dataset in shards and of a DatasetDict, and `to_parquet`, with the `Image` feature."""
    image = datasets.Image()
    columns = {
        "id": [row["id"] for row in LLAVA],
        "images": [[{"bytes": content, "path": None} for content in contents(folder, row)] for row in LLAVA],
        "messages": [messages(row) for row in LLAVA],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(image))
    assert isinstance(table[0]["images"][0], Image.Image)
    table.save_to_disk(folder / "saved", num_shards=2)
    (folder / "saved" / "cache-123.arrow").write_bytes(b"what map() leaves there")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(folder / "both")
    table.to_parquet(folder / "data.parquet")
    for path in ("saved", "both", "data.parquet"):
        same_samples(LlavaDataset(folder / path, None, processor, on_error="raise"), expected)
    assert len(LlavaDataset([DataSource(folder / "both", split="test")], None, processor)) == 1
    table.save_to_disk(folder / "both" / "train", num_shards=3)  # the one shard of before stays there
    assert len(list((folder / "both" / "train").glob("*.arrow"))) == 4
    assert len(datasets.load_from_disk(folder / "both")["train"]) == 3
    same_samples(LlavaDataset(folder / "both", None, processor, on_error="raise"), expected)
    found = LlavaDataset(folder / "saved", None, processor)
    assert found.images(2)[0] == Embedded(folder / "saved" / "data-00001-of-00002.arrow", 0, 0)


# The text of training is that of inference

TALKS = {
    "text": [{"role": "user", "content": "what is"}, {"role": "assistant", "content": "one"}],
    "a system turn": [
        {"role": "system", "content": "one two."},
        {"role": "user", "content": "what is"}, {"role": "assistant", "content": "one"}],
    "an empty system turn": [
        {"role": "system", "content": ""},
        {"role": "user", "content": "what is"}, {"role": "assistant", "content": "one"}],
    "a system turn of parts": [
        {"role": "system", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "what is"}, {"role": "assistant", "content": "one"}],
    "an image after its text": [
        {"role": "user", "content": [{"type": "text", "text": " what is "}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "one "}]},
        {"role": "user", "content": [{"type": "text", "text": " and "}, {"type": "text", "text": "this"}]},
        {"role": "assistant", "content": ""}],
    "a mark amid a text": [
        {"role": "user", "content": "what is <image> here"}, {"role": "assistant", "content": "one"}],
    "an image alone": [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, {"role": "assistant", "content": "one"}],
    "OpenAI's parts": [
        {"role": "user", "content": [
            {"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": "0.png"}}]},
        {"role": "assistant", "content": "one"}],
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
@pytest.mark.parametrize("talk", TALKS)
def test_training_text_is_what_the_chat_template_makes(processor, name, talk):
    template = get_template(name)
    parsed = parse_row({"messages": TALKS[talk], "images": []})
    trained = "".join(text for text, _ in template.pieces(parsed.turns, parsed.system))
    assert trained == processor.apply_chat_template(TALKS[talk], template.chat_template)
    if name == "v1":  # transformers' own class, with this template
        theirs = HuggingFaceProcessor(processor.image_processor, processor.tokenizer, 14, "default")
        assert trained == theirs.apply_chat_template(TALKS[talk], template.chat_template)


@pytest.mark.parametrize("talk", ["text", "a system turn", "an image after its text"])
def test_text_is_that_of_trls_messages(processor, talk):
    """TRL's `prepare_multimodal_messages`, then the chat template: for strings too, whose images TRL puts in front."""
    chat = TALKS[talk]
    marked = any(isinstance(message["content"], list) for message in chat)
    row = {"messages": chat, "images": ["0.png"] if marked else ["0.png", "1.png"]}
    prepared = prepare_multimodal_messages(chat, row["images"])
    parsed = parse_row(row)
    trained = "".join(text for text, _ in get_template("v1").pieces(parsed.turns, parsed.system))
    assert trained == processor.apply_chat_template(prepared, get_template("v1").chat_template)
    assert parsed.images == row["images"]


def test_a_system_turn_is_kept_in_every_form(folder, processor):
    llava = [{"from": "system", "value": "one two"}, *LLAVA[1]["conversations"]]
    openai = [{"role": "system", "content": "one two"}, *messages(LLAVA[1])]
    for name in TEMPLATES:
        if name == "plain":
            continue
        (folder / "data.json").write_text(json.dumps([{"conversations": llava}, {"messages": openai}]))
        first, second = LlavaDataset(folder / "data.json", folder, processor, name)
        assert torch.equal(first["input_ids"], second["input_ids"])
        (folder / "data.json").write_text(json.dumps([{"conversations": llava[1:]}]))
        assert not torch.equal(
            first["input_ids"], LlavaDataset(folder / "data.json", folder, processor, name)[0]["input_ids"]
        )
    dropped = parse_row({"conversations": [{"from": "gpt", "value": "left over"}, *llava[1:]]})
    assert dropped == parse_row({"conversations": llava[1:]})


def test_of_prompt_and_completion_only_the_completion_is_supervised(folder, processor):
    talk = messages(LLAVA[0])
    rows = [
        {"images": ["0.png"], "prompt": talk[:1], "completion": talk[1:2]},
        {"images": ["0.png"], "prompt": talk[:3], "completion": talk[3:]},
        {"images": ["0.png"], "messages": talk},
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    for name in ("v1", "llava_llama_2", "hf"):
        samples = list(LlavaDataset(folder / "data.json", folder, processor, name, on_error="raise"))
        answers = [processor.tokenizer.decode(s["labels"][s["labels"] != IGNORE]) for s in samples]
        assert [answer.replace("</s>", "").split() for answer in answers] == [
            ["one", "two"],
            ["three"],
            ["one", "two", "three"],
        ]
        assert torch.equal(samples[1]["input_ids"], samples[2]["input_ids"])


# Training


def test_training_from_parquet_is_training_from_files(tiny, tmp_path, recipe_for):
    rows = json.loads(tiny.chat.read_text())
    cells = [
        {"bytes": (tiny.folder / row["image"]).read_bytes(), "path": row["image"]} if "image" in row else None
        for row in rows
    ]
    table = pa.table({"id": [row["id"] for row in rows], "image": cells, "messages": [messages(row) for row in rows]})
    for split, part in (("train", table), ("validation", table.slice(0, 8))):
        path = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part, path, 10)
    (tmp_path / "validation.json").write_text(json.dumps(rows[:8]))
    from_files = run(recipe_for(validation=tmp_path / "validation.json", image_folder=tiny.folder, max_steps=3))
    recipe = recipe_for(
        data=tmp_path / "set",
        validation=tmp_path / "set",
        output_dir=tmp_path / "again",
        max_steps=3,
        workers=1,
        save_steps=2,
    )
    from_table = run(recipe)
    losses = [
        [entry["loss"] for entry in result["log_history"] if "loss" in entry] for result in (from_files, from_table)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert from_files["eval_loss"] == from_table["eval_loss"]


def test_inspect_shows_embedded_images(tiny, tmp_path, recipe_for):
    rows = json.loads(tiny.chat.read_text())[:6]
    cells = [(tiny.folder / row["image"]).read_bytes() if "image" in row else None for row in rows]
    cells[1] = b"<html>"
    table = pa.table({"id": [row["id"] for row in rows], "image": cells, "messages": [messages(row) for row in rows]})
    write(table, tmp_path / "data.parquet")
    before = sorted(tmp_path.rglob("*"))
    found = inspect(recipe_for(data=tmp_path / "data.parquet"), samples=6)
    assert (found.images, found.sources[0].with_images) == (5, 5)
    assert [(problem.row, problem.reason) for problem in found.problems] == [(1, "unreadable")]
    console = Console(file=io.StringIO(), width=200)
    show(found, console)
    assert "[image 0 of row 2: 4 tokens]" in console.file.getvalue()
    words = "data.parquet, row 1 (id 1): cannot read image of 6 bytes: cannot identify image file\n"
    assert words in console.file.getvalue()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_resumes_only_with_the_same_table(tiny, tmp_path, recipe_for):
    talk = [{"role": "user", "content": "Say a number."}, {"role": "assistant", "content": "one"}]
    write(pa.table({"messages": [talk] * 4}), tmp_path / "set.parquet")
    recipe = recipe_for(data=[{"path": tmp_path}])
    first = made_from(recipe, [1], torch.nn.Identity())["files"]
    assert made_from(recipe, [1], torch.nn.Identity())["files"] == first
    (tmp_path / "notes.txt").write_text("no data")
    assert made_from(recipe, [1], torch.nn.Identity())["files"] == first
    talk[1]["content"] = "two"
    write(pa.table({"messages": [talk] * 4}), tmp_path / "set.parquet")
    second = made_from(recipe, [1], torch.nn.Identity())["files"]
    write(pa.table({"messages": [talk] * 4}), tmp_path / "set2.parquet")
    third = made_from(recipe, [1], torch.nn.Identity())["files"]
    assert first.keys() == {"data[0].path"} and len({json.dumps(files) for files in (first, second, third)}) == 3
