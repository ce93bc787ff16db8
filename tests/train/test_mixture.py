"""Mixtures: which rows a run takes of which file, always the same for a seed, and what is skipped."""

import json
import logging
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from llava_fast.train.__main__ import main
from llava_fast.train.data import LlavaDataset
from llava_fast.train.recipe import DataSource, Recipe, RecipeError, load_recipe
from llava_fast.train.sampler import choose_rows
from llava_fast.train.trainer import GroupedSampler, load_data, load_processor, run

# Datasets of several files


def write(path: Path, ids: range, image: bool, lines: bool = False) -> Path:
    rows = []
    for i in ids:
        said = [{"from": "human", "value": "<image> what" if image else "what"}, {"from": "gpt", "value": "one " * i}]
        rows.append({"id": i, "conversations": said, **({"image": f"{i % 4}.png"} if image else {})})
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


@pytest.fixture
def sources(folder) -> list[DataSource]:
    """Five pictures in a list, three times; four of eight texts in lines."""
    pictures, texts = folder / "pictures.json", folder / "texts.jsonl"
    write(pictures, range(1, 6), image=True)
    write(texts, range(11, 19), image=False, lines=True)
    return [
        DataSource(pictures, image_folder=folder, sampling="repeat", count="300%"),
        DataSource(texts, sampling="random", count="50%"),
    ]


def ids(dataset: LlavaDataset) -> list[int]:
    return [dataset.row(i)["id"] for i in range(len(dataset))]


def test_samples_of_a_mixture(sources, processor):
    dataset = LlavaDataset(sources, None, processor)
    assert ids(dataset)[:15] == [1, 2, 3, 4, 5] * 3
    assert len(dataset) == 19 and len(set(ids(dataset)[15:])) == 4 and min(ids(dataset)[15:]) > 10
    assert dataset.modality == ["image"] * 15 + ["text"] * 4
    assert dataset.lengths == [len(sample["input_ids"]) for sample in dataset]
    assert [dataset.place(i) for i in (0, 4, 5)] == [(0, 0), (0, 4), (0, 0)]
    assert dataset.place(15) == (1, ids(dataset)[15] - 11)
    report = dataset.report
    assert (report.rows, report.samples, report.with_images) == (9, 19, 15)
    assert ids(LlavaDataset(sources, None, processor)) == ids(dataset)
    assert ids(LlavaDataset(sources, None, processor, seed=5)) != ids(dataset)


def test_a_source_has_an_image_folder_of_its_own(sources, folder, processor, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "1.png").rename(elsewhere / "1.png")
    write(folder / "more.json", range(1, 2), image=True)
    more = DataSource(folder / "more.json", image_folder=elsewhere)
    dataset = LlavaDataset([DataSource(sources[0].path), more], folder, processor)
    assert dataset.report.dropped == {"image_missing": 2}  # rows 1 and 5 of the first source
    assert dataset[len(dataset) - 1]["pixel_values"].shape == (1, 28, 28, 3)
    assert dataset.images(len(dataset) - 1) == [str(elsewhere / "1.png")]


def test_order_does_not_depend_on_workers(sources, processor):
    dataset = LlavaDataset(sources, None, processor)

    def epoch(workers: int) -> list[list[int]]:
        sampler = GroupedSampler(dataset, "modality", 2, 4, seed=3)
        loader = DataLoader(dataset, 2, sampler=sampler, num_workers=workers, collate_fn=list)
        return [[sample["input_ids"].tolist() for sample in batch] for batch in loader]

    assert epoch(0) == epoch(2)


def test_repetitions_stay_on_one_side_of_a_split(sources, processor):
    train, validation = LlavaDataset(sources, None, processor).split(0.3, seed=1)
    assert not set(ids(train)) & set(ids(validation))
    assert len(train) + len(validation) == 19
    assert sorted(ids(train) + ids(validation))[:15] == sorted([1, 2, 3, 4, 5] * 3)


def test_a_cached_row_is_one_sample(sources, processor):
    dataset = LlavaDataset(sources, None, processor, cache=True)
    assert dataset[0] is dataset[5] is dataset[10]


# on_error and max_errors


@pytest.fixture
def broken(folder) -> Path:
    """Six rows of which 1 breaks the format, 2 misses its image and 3 and 4 have one that cannot be read."""
    path = write(folder / "broken.json", range(6), image=True)
    rows = json.loads(path.read_text())
    rows[0]["conversations"][1]["value"] = "none"
    rows[1]["conversations"][1]["from"] = "human"
    rows[2]["image"] = "none.png"
    rows[3]["image"], rows[4]["image"] = "3.png", "2.png"
    rows[5]["image"] = "1.png"
    path.write_text(json.dumps(rows))
    (folder / "2.png").write_bytes(b"<html>")
    (folder / "3.png").write_bytes(b"<html>")
    return path


def test_raise_stops_at_the_first_broken_row(broken, folder, processor):
    with pytest.raises(ValueError, match=r"broken\.json, row 1 \(id 1\): roles must alternate"):
        LlavaDataset(broken, folder, processor, on_error="raise")
    rows = json.loads(broken.read_text())
    broken.write_text(json.dumps([rows[0], rows[2]]))
    with pytest.raises(ValueError, match=r"broken\.json, row 1 \(id 2\): no image file none\.png"):
        LlavaDataset(broken, folder, processor, on_error="raise")
    broken.write_text(json.dumps([rows[0], rows[3]]))
    dataset = LlavaDataset(broken, folder, processor, on_error="raise")
    assert dataset[0]["pixel_values"].shape == (1, 28, 28, 3)
    with pytest.raises(ValueError, match=r"broken\.json, row 1 \(id 3\): cannot read image .*3\.png"):
        dataset[1]


def test_skip_counts_and_goes_on(broken, folder, processor, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = LlavaDataset(broken, folder, processor, on_error="skip")
    assert dataset.report.dropped == {"malformed": 1, "image_missing": 1}
    assert sum("dropped 1 rows" in record.message for record in caplog.records) == 2
    assert len(list(dataset)) == 4
    report = dataset.report
    assert (report.unreadable, report.errors) == (2, 4)
    assert report.examples["malformed"] == [str(dataset.problems[0])]


@pytest.mark.parametrize("max_errors", [2, 3])
def test_max_errors_stops_past_the_cap(broken, folder, processor, max_errors):
    dataset = LlavaDataset(broken, folder, processor, on_error="skip", max_errors=max_errors)
    batches = iter(DataLoader(dataset, 1, num_workers=1, collate_fn=list))  # workers count as one with this process
    next(batches)
    with pytest.raises(RecipeError) as error:
        next(batches)
    row = max_errors + 1
    message = str(error.value)  # not the worker's traceback
    assert message.startswith(f"{broken}, row {row} (id {row}): cannot read image {folder}")
    assert message.endswith(f"; it is broken row {row}, and max_errors is {max_errors}") and message.isprintable()


def test_max_errors_is_what_may_be_skipped(broken, folder, processor):
    assert len(list(LlavaDataset(broken, folder, processor, on_error="skip", max_errors=4))) == 4
    with pytest.raises(ValueError, match=r"row 2 .*it is broken row 2, and max_errors is 1"):
        LlavaDataset(broken, folder, processor, on_error="skip", max_errors=1)


def test_max_errors_without_on_error_counts_images(broken, folder, processor):
    rows = json.loads(broken.read_text())
    broken.write_text(json.dumps([rows[0], rows[2], rows[2]]))
    assert len(LlavaDataset(broken, folder, processor, max_errors=2)) == 1
    with pytest.raises(ValueError, match=r"row 2 \(id 2\): no image file none\.png; it is broken row 2, and max_err"):
        LlavaDataset(broken, folder, processor, max_errors=1)
    with pytest.raises(ValueError, match="on_error is 'raise', 'skip' or None, not 'ignore'"):
        LlavaDataset(broken, folder, processor, on_error="ignore")
    with pytest.raises(ValueError, match="a mixture needs at least one data file"):
        LlavaDataset([], folder, processor)


# In a recipe


RECIPE = """
stage: full
model: base
output_dir: out
image_folder: pictures
on_error: skip
max_errors: 10
data:
  - {path: a.json}
  - {path: b.jsonl, image_folder: /elsewhere, sampling: random, count: 10%}
  - {path: c.json, sampling: first, count: 100}
"""


def test_a_recipe_with_a_mixture(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = load_recipe(path)
    assert [source.path for source in recipe.data] == [tmp_path / name for name in ("a.json", "b.jsonl", "c.json")]
    assert [source.image_folder for source in recipe.sources()] == [
        tmp_path / "pictures",
        Path("/elsewhere"),
        tmp_path / "pictures",
    ]
    assert (recipe.data[1].sampling, recipe.data[1].count, recipe.data[2].count) == ("random", "10%", 100)
    assert (recipe.on_error, recipe.max_errors) == ("skip", 10)
    (tmp_path / "printed.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "printed.yaml") == recipe
    one = load_recipe(path, [f"data={tmp_path / 'a.json'}"])
    assert one.data == tmp_path / "a.json" and one.sources()[0].image_folder == tmp_path / "pictures"
    several = load_recipe(path, ["data=[{path: /x.json, sampling: repeat, weight: 2}, {path: /y.json, weight: 1}]"])
    assert [source.weight for source in several.data] == [2.0, 1.0]


def test_image_folders_default_to_the_files_own(tmp_path):
    recipe = Recipe(stage="full", model="m", output_dir="o", data=[{"path": "x/a.json"}, DataSource("y/b.json")])
    assert [source.image_folder for source in recipe.sources()] == [Path("x"), Path("y")]
    assert Recipe(stage="full", model="m", output_dir="o", data="z/c.json").sources()[0].image_folder == Path("z")


def test_the_trainer_reads_the_mixture(recipe_for, tiny):
    data = [{"path": tiny.chat, "sampling": "random", "count": 8}, {"path": tiny.chat, "count": "50%"}]
    recipe = recipe_for(data=data, validation=tiny.captions, on_error="skip", max_errors=3, seed=7)
    train, validation = load_data(recipe, load_processor(recipe))
    assert len(train) == 8 + 48 and len(validation) == 96
    assert (train.on_error, train.max_errors) == ("skip", 3)
    rows = choose_rows(recipe.sources(), [96, 96], 7)
    assert [train.place(i)[1] for i in range(8)] == rows[0].tolist()


def test_a_run_that_meets_a_broken_picture_ends_in_one_line(recipe_for, tiny, tmp_path, capsys):
    rows = json.loads(tiny.captions.read_text())[:8]
    rows[5]["image"] = "cut.png"
    (tiny.folder / "cut.png").write_bytes((tiny.folder / "0.png").read_bytes()[:60])
    (tiny.folder / "cut.json").write_text(json.dumps(rows))
    recipe = recipe_for(data=tiny.folder / "cut.json", template="plain", on_error="raise", workers=1, max_steps=2)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert main([str(tmp_path / "recipe.yaml")]) == 2
    err = capsys.readouterr().err  # among progress bars
    assert "Traceback" not in err
    assert f"error: {tiny.folder / 'cut.json'}, row 5 (id 5): cannot read image {tiny.folder / 'cut.png'}: " in err
    skipping = load_recipe(tmp_path / "recipe.yaml", ["on_error=skip", f"output_dir={tmp_path / 'skipped'}"])
    assert run(skipping)["counts"]["samples"] == 8
