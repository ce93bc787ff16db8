"""The data pipeline: what is read, what is refused, what is left out, and how samples become a pack."""

import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from llava_fast.processor.processor import LlavaProcessor
from llava_fast.processor.templates import Vicuna, get_template
from llava_fast.sequence import pack
from llava_fast.train import data
from llava_fast.train.data import LlavaDataset
from llava_fast.train.recipe import DataSource
from llava_fast.train.rows import IGNORE, expand, parse_row, tokenise
from llava_fast.train.sampler import PackedCollator

SYSTEM = 24  # <s> and the words of the v1 system prompt
IMAGE = 4  # tokens of an image


def row(*turns: str, image=None, first: str = "human", **extra) -> dict:
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    conversation = [{"from": roles[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"conversations": conversation, **({} if image is None else {"image": image}), **extra}


def load(folder: Path, processor: LlavaProcessor, rows: list, template: str = "v1", **options) -> LlavaDataset:
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return LlavaDataset(path, folder, processor, template, **options)


def words(processor: LlavaProcessor, ids) -> str:
    return " ".join(processor.tokenizer.convert_ids_to_tokens([int(i) for i in ids]))


PICTURE = row("<image>\nwhat is this", "one two", image="0.png", id="a")
TEXT = row("what is", "three", "this", "four five", id="b")


# Samples


def test_samples_of_all_kinds(folder, processor):
    several = row("<image> what", "one", "is <image>", "two", image=["1.png", "2.png"])
    dataset = load(folder, processor, [PICTURE, TEXT, several])
    assert len(dataset) == 3
    for sample, n_images in zip(dataset, [1, 0, 2]):
        assert set(sample) == {"input_ids", "labels", "pixel_values"}
        assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
        assert sample["input_ids"].shape == sample["labels"].shape
        assert sample["pixel_values"].dtype == torch.uint8
        assert sample["pixel_values"].shape == (n_images, 28, 28, 3)
        assert int((sample["input_ids"] == processor.image_token_id).sum()) == n_images * IMAGE
        supervised = sample["labels"] != IGNORE
        assert torch.equal(sample["labels"][supervised], sample["input_ids"][supervised])
    answers = [words(processor, s["labels"][s["labels"] != IGNORE]) for s in dataset]
    assert answers == ["one two </s>", "three </s> four five </s>", "one </s> two </s>"]
    assert words(processor, dataset[0]["input_ids"][SYSTEM:]).startswith("USER: <image> <image> <image> <image> what")
    assert [int(pixels[0, 0, 1]) for pixels in dataset[2]["pixel_values"]] == [128, 0]  # green, then blue
    assert dataset.modality == ["image", "text", "image"]
    assert dataset.lengths == [len(sample["input_ids"]) for sample in dataset]
    assert dataset[-1]["input_ids"].tolist() == dataset[2]["input_ids"].tolist()
    with pytest.raises(IndexError):
        dataset[3]


def test_json_lines_read_the_same(folder, processor):
    rows = [PICTURE, TEXT, row("what\u2028is", "one\u0085two", id="c\u2028d", image=[], more=1)]
    expected = [sample["input_ids"].tolist() for sample in load(folder, processor, rows)]
    lines = folder / "data.jsonl"
    lines.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", encoding="utf-8-sig")
    dataset = LlavaDataset(lines, folder, processor)
    assert [sample["input_ids"].tolist() for sample in dataset] == expected
    assert dataset.row(2) == {"id": "c\u2028d", "image": []}


def test_text_rows_need_no_image_folder(folder, processor):
    (folder / "text.json").write_text(json.dumps([TEXT]))
    assert len(LlavaDataset(folder / "text.json", None, processor)) == 1
    (folder / "text.json").write_text(json.dumps([TEXT, PICTURE]))
    with pytest.raises(ValueError, match=r"row 1 \(id a\): image '0.png' needs an image_folder"):
        LlavaDataset(folder / "text.json", None, processor)


def test_leading_answer_is_dropped(folder, processor):
    late = row("left over", "what", "one", first="gpt")
    assert load(folder, processor, [late])[0]["input_ids"].tolist() == (
        load(folder, processor, [row("what", "one")])[0]["input_ids"].tolist()
    )


def test_captions(folder, processor):
    caption = row("Describe it. <image>", "one two", image="3.png")
    sample = load(folder, processor, [caption], "plain")[0]
    assert words(processor, sample["input_ids"]) == "<s> <image> <image> <image> <image> one two"
    assert sample["labels"].tolist() == [IGNORE] * 5 + sample["input_ids"][5:].tolist()


def test_lengths_need_no_image_to_be_decoded(folder, processor, monkeypatch):
    monkeypatch.setattr(data, "_SCAN_ROWS", 3)
    rows = [row("<image> what " + "one " * i, "two " * i, image=f"{i % 4}.png") for i in range(1, 9)]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        dataset = load(folder, processor, rows, max_length=44)
        lengths = dataset.lengths
    assert lengths == [len(sample["input_ids"]) for sample in dataset]
    assert max(lengths) == 44
    assert dataset.report.truncated == lengths.count(44) - 1 > 0  # one row is exactly that long


def test_what_the_scan_measured_is_what_is_trained_on(folder, processor, monkeypatch):
    """Every kind of row: ids and labels are those of the row alone, and nothing is tokenised after the scan."""
    monkeypatch.setattr(data, "_SCAN_ROWS", 3)
    kinds = [
        PICTURE,
        TEXT,
        row("<image> what", "one", "is <image>", "two", image=["1.png", "2.png"]),
        row("left over", "what", "one", first="gpt"),
        row("what", "", "this", "two three"),
        row("<image> what", "one " * 40, image="3.png"),  # cut
        row("what", "one " * 9, "is", "two " * 30),  # cut within the second answer
        row("what", "one " * 40, "<image>", "two", image="3.png"),  # left out
        row("what " * 60, "one"),  # left out
    ]
    (folder / "kinds.json").write_text(json.dumps(kinds))
    source = DataSource(folder / "kinds.json", sampling="repeat", count="200%")
    template, max_length, image = get_template("v1"), 48, processor.image_token_id
    dataset = LlavaDataset([source], folder, processor, template, max_length)
    expected = []
    for talk in map(parse_row, kinds[:7]):
        (tokens,) = tokenise([template.pieces(talk.turns)], processor)
        expected.append([array[:max_length].tolist() for array in expand(tokens, image, IMAGE)])
    assert len(dataset) == 14 and dataset.report.dropped == {"image_truncated": 1, "fully_masked": 1}
    assert dataset.report.truncated == 4
    monkeypatch.setattr(type(processor.tokenizer), "__call__", None)
    train, validation = dataset.split(0.3)
    assert len(train) + len(validation) == 14
    for part in (dataset, train, validation, pickle.loads(pickle.dumps(dataset))):
        for i in range(len(part)):
            sample, (ids, labels) = part[i], expected[part.place(i)[1]]
            assert sample["input_ids"].tolist() == ids and sample["labels"].tolist() == labels
            assert part.tokens(i) == (ids, labels) and part.lengths[i] == len(ids) <= max_length
            assert len(sample["pixel_values"]) == part.n_images[i] == ids.count(image) // IMAGE
    for batch in DataLoader(dataset, 7, num_workers=1, collate_fn=list):
        assert [sample["input_ids"].tolist() for sample in batch] == [ids for ids, _ in expected]


def test_cache_keeps_samples(folder, processor):
    cached = load(folder, processor, [PICTURE, TEXT], cache=True)
    first = cached[0]
    (folder / "0.png").unlink()
    assert cached[0] is first
    again = load(folder, processor, [row("<image>", "one", image="1.png")])
    assert again[0] is not again[0]


def test_pickles_for_spawned_workers(folder, processor):
    dataset = load(folder, processor, [PICTURE, TEXT])
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0]["pixel_values"], dataset[0]["pixel_values"])
    assert copy.report == dataset.report


# Rows that break the format


@pytest.mark.parametrize(
    ("bad", "template", "message"),
    [
        (row("q", "a") | {"conversations": "q"}, "v1", "expected an object with a list of 'conversations'"),
        (["q", "a"], "v1", "expected an object with a list of 'conversations'"),
        ({"conversations": [{"from": "human"}]}, "v1", "turn 0 has no text 'value'"),
        (
            {"id": 7, "conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "r"}]},
            "v1",
            r"row 1 \(id 7\): roles must alternate: turn 1 is from 'human', not 'gpt'",
        ),
        (
            {"conversations": [{"from": "tool", "value": "q"}, {"from": "assistant", "value": "a"}]},
            "v1",
            "roles must alternate: turn 1 is from 'assistant', not 'human'",
        ),
        (row("<image>", "a", image=3), "v1", "'image' must be a file name or a list of them"),
        (row("<image>", "a", image=["0.png", None]), "v1", "'image' must be a file name or a list of them"),
        (row("<image>", "a", "q", "a", image="0.png"), "plain", "takes exactly two turns, got 4"),
        (row("q", "a", image="0.png"), "plain", "needs <image> in the first turn"),
        (row("<image>", "a", image="../out.png"), "v1", "image '../out.png' is outside of the image folder"),
        (row("<image>", "a", image="/etc/passwd"), "v1", "image '/etc/passwd' is outside of the image folder"),
    ],
)
def test_broken_rows_are_named(folder, processor, bad, template, message):
    good = row("<image>", "one", image="0.png")
    with pytest.raises(ValueError, match=message) as error:
        load(folder, processor, [good, bad], template)
    assert str(error.value).startswith(f"{folder / 'data.json'}, row 1")
    assert "\n" not in str(error.value)


def test_broken_files_are_named(folder, processor):
    path = folder / "data.json"
    with pytest.raises(FileNotFoundError, match=r"no data file .*none\.json"):
        LlavaDataset(folder / "none.json", folder, processor)
    for content, message in [
        (b'[{"a": 1},\n{"b": }]', r"data\.json, line 2: not JSON"),
        (b'{"conversations": []}\n{oops}\n', r"data\.json, line 2: not JSON .*expected a list or JSONL"),
        (b"[]", r"data\.json: none of 0 rows can be used: the file is empty"),
        (b'["\xff"]', r"data\.json: not UTF-8 text"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            LlavaDataset(path, folder, processor)
    path.write_text(json.dumps([PICTURE]))
    with pytest.raises(FileNotFoundError, match="no image folder"):
        LlavaDataset(path, folder / "nowhere", processor)
    with pytest.raises(ValueError, match="unknown template 'v7'"):
        LlavaDataset(path, folder, processor, "v7")


def test_links_cannot_leave_the_image_folder(folder, processor):
    images = folder / "images"
    (images / "inside").mkdir(parents=True)
    Image.new("RGB", (5, 5)).save(images / "inside" / "x.png")
    os.symlink(images / "inside" / "x.png", images / "good.png")
    os.symlink(folder / "0.png", images / "bad.png")
    os.symlink(folder, images / "bad")
    path = folder / "data.json"

    def read(name):
        path.write_text(json.dumps([row("<image>", "one", image=name)]))
        return LlavaDataset(path, images, processor)

    for name in ("good.png", "inside/x.png", "inside/../good.png", str(images / "good.png")):
        assert read(name)[0]["pixel_values"].shape == (1, 28, 28, 3)
    for name in ("bad.png", "bad/0.png", "inside/../../0.png", "../images2/x.png"):
        with pytest.raises(ValueError, match="outside of the image folder"):
            read(name)


def test_a_tokenizer_without_offsets_is_refused(folder, processor, monkeypatch):
    monkeypatch.setattr(type(processor.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="has no character offsets"):
        load(folder, processor, [TEXT])


# Rows that are left out, and counted


def test_rows_that_cannot_be_used_are_counted(folder, processor, caplog):
    rows = [
        PICTURE,
        row("<image> <image>", "one", image="0.png", id="too many marks"),
        row("what", "one", image="0.png"),
        row("what is <image>", "one", id="text that speaks of images"),
        row("<image>", "one", image="none.png"),
        row("<image>", "one", image="none/none.png"),
        row("what", ""),
        row("what"),
        TEXT,
    ]
    with caplog.at_level(logging.WARNING):
        dataset = load(folder, processor, rows)
    report = dataset.report
    assert len(dataset) == report.samples == 2
    assert [dataset.row(i)["id"] for i in range(2)] == ["a", "b"]
    assert report.dropped == {"image_count": 3, "image_missing": 2, "fully_masked": 2}
    assert report.rows == 9
    assert report.with_images == 1
    assert report.examples["image_count"][0] == (
        f"{folder / 'data.json'}, row 1 (id too many marks): 2 <image> marks but 1 images"
    )
    assert report.examples["image_missing"][1].endswith("row 5: no image file none/none.png")
    assert json.loads(json.dumps(report.to_dict()))["dropped"] == report.dropped
    assert dict(report.items()) == {
        "rows": 9,
        "samples": 2,
        "with_images": 1,
        "truncated": 0,
        "unreadable": 0,
        "dropped_image_count": 3,
        "dropped_image_missing": 2,
        "dropped_fully_masked": 2,
    }
    assert sum("dropped" in record.message for record in caplog.records) == 3


def test_nothing_left_is_an_error(folder, processor):
    with pytest.raises(ValueError, match=r"none of 2 rows can be used: .*row 0: no image file x\.png") as error:
        load(folder, processor, [row("<image>", "one", image="x.png"), row("<image>", "one", image="y.png")])
    assert "\n" not in str(error.value)


def test_truncation_never_cuts_an_image(folder, processor):
    # <s> one USER: 4 + 4 image tokens what ASSISTANT: one two </s>
    template = Vicuna("short", "one")
    picture = row("<image> <image>\nwhat", "one two", image=["0.png", "1.png"])
    text = row("", "one two three")
    whole = load(folder, processor, [picture], template)[0]
    length, first_answer = 16, 13
    assert len(whole["input_ids"]) == length
    assert int((whole["labels"] != IGNORE).nonzero()[0]) == first_answer
    outcomes = {}
    for max_length in range(5, length + 2):
        dataset = load(folder, processor, [picture, text], template, max_length=max_length)
        outcomes[max_length] = dataset.report.dropped
        if len(dataset) == 2:
            sample = dataset[0]
            assert len(sample["input_ids"]) == min(max_length, length) == dataset.lengths[0]
            assert sample["input_ids"].tolist() == whole["input_ids"][:max_length].tolist()
            assert (sample["labels"] != IGNORE).any()
        assert dataset.report.truncated == int(max_length < 7) + int(first_answer < max_length < length)
    assert all(outcomes[n] == {"image_truncated": 1} for n in range(5, 11))
    assert all(outcomes[n] == {"fully_masked": 1} for n in range(11, 14))
    assert all(outcomes[n] == {} for n in range(14, length + 2))


def test_an_image_beyond_the_cut_drops_the_row(folder, processor):
    rows = [row("what", "one", "<image> is", "two", image="0.png"), TEXT]
    dataset = load(folder, processor, rows, max_length=SYSTEM + 6)
    assert dataset.report.dropped == {"image_truncated": 1}
    assert "cuts off image tokens" in dataset.report.examples["image_truncated"][0]


# Images that turn out unreadable


def test_an_unreadable_image_is_replaced_and_counted(folder, processor, caplog):
    rows = [
        row("<image>", "one", image="0.png"),
        TEXT,
        row("<image>", "two", image="1.png"),
        PICTURE | {"image": "2.png"},
    ]
    dataset = load(folder, processor, rows)
    (folder / "1.png").write_bytes(b"<html>")
    (folder / "2.png").unlink()
    assert dataset.report.unreadable == 0
    with caplog.at_level(logging.WARNING):
        replaced = dataset[2]
    assert torch.equal(replaced["input_ids"], dataset[0]["input_ids"])  # the next with an image, wrapping around
    assert dataset.report.unreadable == 2
    assert dataset.report.examples["unreadable"] == [
        f"{folder / 'data.json'}, row 2",
        f"{folder / 'data.json'}, row 3 (id a)",
    ]
    assert any("cannot read image" in record.message for record in caplog.records)
    assert dataset[1]["pixel_values"].shape == (0, 28, 28, 3)


def test_unreadable_images_are_counted_across_workers(folder, processor):
    dataset = load(folder, processor, [row("<image>", "one", image=f"{i}.png") for i in range(4)])
    (folder / "1.png").write_bytes(b"")
    (folder / "3.png").write_bytes(b"")
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=PackedCollator(processor))
    batches = list(loader)
    assert [len(batch["pixel_values"]) for batch in batches] == [2, 2]
    assert dataset.report.unreadable == 2


def test_no_readable_image_at_all_is_an_error(folder, processor):
    dataset = load(folder, processor, [row("<image>", "one", image=f"{i}.png") for i in range(4)])
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no readable sample near row 2; the last try: cannot read image .*1\.png"):
        dataset[2]


# Splitting


def test_split(folder, processor):
    rows = [row("<image>", "one " * (i + 1), image=f"{i % 4}.png", id=i) for i in range(40)]
    rows += [row("what", "two " * (i + 1), id=40 + i) for i in range(40)]
    dataset = load(folder, processor, rows, max_length=SYSTEM + 40)
    train, validation = dataset.split(0.25, seed=3)
    parts = [[part.row(i)["id"] for i in range(len(part))] for part in (train, validation)]
    assert sorted(parts[0] + parts[1]) == list(range(80))
    assert all(part == sorted(part) for part in parts)
    assert 20 <= len(validation) <= 30
    images = [{part.row(i).get("image") for i in range(len(part))} - {None} for part in (train, validation)]
    assert not images[0] & images[1]
    for part in (train, validation):
        assert part.lengths == [len(sample["input_ids"]) for sample in part]
        assert part.modality == ["image" if len(sample["pixel_values"]) else "text" for sample in part]
        assert part.report.samples == len(part)
        assert part.report.rows == 80
    assert train.report.truncated + validation.report.truncated == dataset.report.truncated > 0
    again = dataset.split(0.25, seed=3)[1]
    assert [again.row(i)["id"] for i in range(len(again))] == parts[1]
    other = dataset.split(0.25, seed=4)[1]
    assert [other.row(i)["id"] for i in range(len(other))] != parts[1]


def test_a_replacement_comes_from_the_same_part(folder, processor):
    for i in range(4, 20):
        Image.new("RGB", (9, 9)).save(folder / f"{i}.png")
    dataset = load(folder, processor, [row("<image>", "one " * i, image=f"{i}.png") for i in range(1, 20)])
    train, validation = dataset.split(0.3)
    held_out = {tuple(sample["input_ids"].tolist()) for sample in validation}
    for i in range(len(train) - 1):
        (folder / train.row(i)["image"]).write_bytes(b"")
    assert all(tuple(sample["input_ids"].tolist()) not in held_out for sample in (train[0], train[len(train) - 1]))
    assert train.report.unreadable > 0
    assert validation.report.unreadable == 0


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2])
def test_split_fraction_lies_between_0_and_1(folder, processor, fraction):
    with pytest.raises(ValueError, match="lies between 0 and 1"):
        load(folder, processor, [PICTURE, TEXT]).split(fraction)


def test_split_leaves_no_part_empty(folder, processor):
    train, validation = load(folder, processor, [PICTURE, TEXT]).split(0.01)
    assert len(train) == len(validation) == 1
    with pytest.raises(ValueError, match="leaves one part empty"):
        load(folder, processor, [PICTURE, PICTURE]).split(0.5)


# Packs


def test_pack_of_samples(folder, processor):
    several = row("<image> what", "one", "is <image>", "two", image=["1.png", "2.png"])
    dataset = load(folder, processor, [PICTURE, TEXT, several])
    samples = [dataset[i] for i in range(3)]
    before = [sample["labels"].clone() for sample in samples]
    batch = PackedCollator(processor)(samples)
    total = sum(dataset.lengths)
    assert set(batch) == {
        "input_ids", "labels", "target_rows", "position_ids", "key_start", "key_end", "sample_lengths", "pixel_values",
        "image_slots"
    }  # fmt: skip
    assert torch.equal(batch["target_rows"], (batch["labels"][0, 1:] != -100).nonzero().flatten())
    for key in ("input_ids", "labels", "position_ids"):
        assert batch[key].shape == (1, total)
        assert batch[key].dtype == torch.int64
    expected = pack(dataset.lengths)
    assert batch["sample_lengths"] == expected.lengths == tuple(dataset.lengths)
    for key in ("position_ids", "key_start", "key_end"):
        assert torch.equal(batch[key], getattr(expected, key))
    assert batch["key_start"].dtype == batch["key_end"].dtype == torch.int32
    assert batch["input_ids"][0].tolist() == [i for sample in samples for i in sample["input_ids"].tolist()]
    assert batch["input_ids"][0, batch["image_slots"]].tolist() == [processor.image_token_id] * 3 * IMAGE
    assert batch["image_slots"].dtype == torch.int64
    assert batch["pixel_values"].shape == (3, 28, 28, 3)
    assert torch.equal(batch["pixel_values"][1:], samples[2]["pixel_values"])
    assert torch.equal(batch["labels"][0], torch.cat(before))
    assert all(torch.equal(sample["labels"], labels) for sample, labels in zip(samples, before))


def test_first_label_of_a_sample_is_never_predicted(processor):
    sample = {
        "input_ids": torch.tensor([6, 7, 8]),
        "labels": torch.tensor([6, 7, 8]),
        "pixel_values": torch.zeros(0, 28, 28, 3, dtype=torch.uint8),
    }
    batch = PackedCollator(processor)([sample, sample])
    assert batch["labels"].tolist() == [[IGNORE, 7, 8, IGNORE, 7, 8]]
    assert sample["labels"].tolist() == [6, 7, 8]
    assert "pixel_values" not in batch
    assert batch["image_slots"].tolist() == []


def test_images_that_see_each_other(folder, processor):
    sample = load(folder, processor, [PICTURE])[0]
    batch = PackedCollator(processor, bidirectional_images=True)([sample, sample])
    assert "sample_lengths" not in batch
    slots = batch["image_slots"].reshape(2, IMAGE)
    assert batch["key_end"][0, slots].tolist() == [[int(image[-1]) + 1] * IMAGE for image in slots]
    causal = np.delete(np.arange(batch["key_end"].shape[1]), slots.flatten())
    assert batch["key_end"][0, causal].tolist() == (causal + 1).tolist()


def test_pack_refuses_images_that_do_not_match(folder, processor):
    samples = [load(folder, processor, [PICTURE, TEXT])[i] for i in range(2)]
    samples[1]["pixel_values"] = samples[0]["pixel_values"]
    with pytest.raises(ValueError, match="sample 1 has 0 image tokens where its 1 images need 4"):
        PackedCollator(processor)(samples)


def test_warns_where_prompts_will_differ_from_training(folder, processor, caplog):
    tokenizer = Tokenizer(models.BPE({"▁": 0, "x": 1, "\n": 2, "<unk>": 3, "<image>": 4}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")
    fast.add_tokens(["<image>"], special_tokens=True)
    load(folder, LlavaProcessor(processor.image_processor, fast, 14, "default"), [TEXT])
    assert any("leading space" in record.message for record in caplog.records)
    caplog.clear()
    load(folder, processor, [TEXT])
    assert not caplog.records
