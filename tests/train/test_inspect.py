"""`llava-fast inspect`: what it shows, what it finds, its exit status, and the memory it predicts."""

import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from llava_fast import LlavaForConditionalGeneration, cli
from llava_fast.demo import run as demo
from llava_fast.processor.processor import LlavaProcessor
from llava_fast.train.inspect import Inspection, check_images, inspect, show, statistics
from llava_fast.train.recipe import Recipe
from llava_fast.train.trainer import GroupedSampler, load_data, load_processor

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo_out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    demo.draw(out, demo.Size(captions=32, pictures=8, questions=3, held_out=2))
    return out


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["inspect", *map(str, arguments)])
    return exit_.value.code or 0


def printed(found: Inspection, **options) -> str:
    limit = options.pop("limit", 50)
    console = Console(file=io.StringIO(), **{"width": 80, **options})
    show(found, console, limit)
    return console.file.getvalue()


def test_the_demos_data_is_fine(demo_out, capsys):
    before = sorted(demo_out.rglob("*"))
    assert run(ROOT / "train" / "demo-stage1.yaml", f"data={demo_out / 'stage1.json'}", "--samples", 1) == 0
    captured = capsys.readouterr()
    out = captured.out
    assert "\x1b" not in out  # plain text where there is no terminal
    first = json.loads((demo_out / "stage1.json").read_text())[0]
    assert f"row 0 (id {first['id']}): " in out
    assert f"<s> [{first['id']}.png: 16 tokens] »" in out
    caption = first["conversations"][1]["value"]
    assert caption.replace(" ", " Ġ").replace(",", " ,").replace(".", " .") + " Ċ«" in out
    assert f"       32        32           32      100.0%     100.0%  {demo_out / 'stage1.json'}" in out
    assert "packs: 2 of " in out and "no padding" in out
    assert "memory: predicted by a formula, not measured: at least " in out
    assert out.rstrip().endswith("0 broken rows, 0 rows left out as too long or without an answer, 32 images read")
    assert captured.err == ""  # no progress bar without a terminal
    assert sorted(demo_out.rglob("*")) == before  # nothing is written


def test_as_a_program_without_a_terminal(demo_out):
    recipe = ROOT / "train" / "demo-stage1.yaml"
    rows = json.loads((demo_out / "stage1.json").read_text())
    rows[3]["image"] = "images/none.png"
    (demo_out / "broken.json").write_text(json.dumps(rows))
    command = [Path(sys.executable).with_name("llava-fast"), "inspect", recipe, f"data={demo_out / 'broken.json'}"]
    environment = {"COLUMNS": "40", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, "--samples", "1"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "16 tokens] \\xbb" in done.stdout and " \\u0120" in done.stdout
    assert f"image_missing: {demo_out / 'broken.json'}, row 3 (id train-00003): no image file images/none.png\n" in (
        done.stdout
    )
    assert "1 broken rows" in done.stdout


@pytest.fixture
def mixed(tiny, recipe_for, tmp_path) -> Recipe:
    """A mixture with six broken rows: every kind of them, and one row that is just too long."""
    rows = json.loads(tiny.chat.read_text())[:24]
    with_image = [row for row in rows if "image" in row]
    with_image[0]["conversations"][1]["from"] = "human"
    with_image[1]["image"] = "none.png"
    with_image[2]["conversations"][0]["value"] = "no mark"
    with_image[3]["image"] = with_image[4]["image"] = "cut.png"
    with_image[5]["image"] = "../secret.png"
    with_image[6]["conversations"][0]["value"] = "<image> What colour? " * 1 + "red " * 300
    (tmp_path / "pictures").symlink_to(tiny.folder)
    for path in tiny.folder.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:-40])
    (tmp_path / "mixed.json").write_text(json.dumps(rows))
    data = [
        {"path": tmp_path / "mixed.json"},
        {"path": tiny.chat, "image_folder": tmp_path / "pictures", "sampling": "repeat", "count": 144},
    ]
    return recipe_for(data=data, max_length=200, per_device_batch_size=4, group_by="modality")


def test_every_broken_row_is_listed(mixed):
    found = inspect(mixed, samples=4, threads=3)
    reasons = [problem.reason for problem in found.broken]
    assert sorted(reasons) == sorted([*["malformed", "unreadable"] * 2, "image_missing", "image_count"])
    assert [problem.reason for problem in found.problems if problem not in found.broken] == ["fully_masked"]
    text = printed(found)
    for problem in found.problems:
        assert f"\n{problem.reason}: {problem.path}, row {problem.row} (id {problem.identity}): " in text
    assert "image '../secret.png' is outside of the image folder" in text
    assert text.count("cut.png") == 2  # each row that uses a file, which is read once
    assert "6 broken rows, 1 rows left out as too long or without an answer" in text
    short = printed(found, limit=2)
    assert "… and 5 more" in short and short.count(", row ") == 4 + 2


def test_numbers_are_those_of_training(mixed):
    found = inspect(mixed, samples=2)
    processor = load_processor(mixed)
    train, _ = load_data(Recipe(**{**vars(mixed), "on_error": "skip"}), processor)
    assert found.lengths == sorted(train.lengths)
    assert [source.samples for source in found.sources] == [24 - 5, 144]
    assert [source.rows for source in found.sources] == [24 - 5, 96]
    assert sum(source.tokens for source in found.sources) == sum(train.lengths) == sum(found.packs)
    tokens = [train.tokens(i) for i in range(len(train))]
    n_tokens = sum(len(ids) for ids, _ in tokens)
    assert found.image_share == sum(ids.count(processor.image_token_id) for ids, _ in tokens) / n_tokens
    assert found.supervised_share == sum(len(labels) - labels.count(-100) for _, labels in tokens) / n_tokens
    order = list(GroupedSampler(train, "modality", 4, mixed.global_batch_size, mixed.seed))
    packs = [[train.lengths[i] for i in order[start : start + 4]] for start in range(0, len(order), 4)]
    assert found.packs == [sum(pack) for pack in packs]
    assert found.padded_share == pytest.approx(1 - n_tokens / sum(len(pack) * max(pack) for pack in packs))
    assert len(found.packs) == -(-len(train) // 4)
    assert found.images == len({image for i in range(len(train)) for image in train.images(i)})
    assert found.truncated == train.report.truncated


def test_batches_of_one_need_no_padding(recipe_for, tiny):
    assert inspect(recipe_for(data=tiny.chat, per_device_batch_size=1), samples=0).padded_share == 0


def test_validation_rows_are_checked_too(recipe_for, tiny, tmp_path):
    rows = json.loads(tiny.captions.read_text())[:3]
    rows[1]["image"] = "none.png"
    (tiny.folder / "validation.json").write_text(json.dumps(rows))
    found = inspect(recipe_for(validation=tiny.folder / "validation.json"), samples=0)
    assert found.validation_samples == 2
    assert [str(problem) for problem in found.problems] == [
        f"{tiny.folder / 'validation.json'}, row 1 (id 1): no image file none.png"
    ]
    split = inspect(recipe_for(validation=0.25), samples=0)
    assert split.validation_samples >= 24 and split.problems == []
    assert "validation: 2 samples" in printed(found)


@pytest.mark.parametrize("width", [20, 40, 200])
def test_lines_are_not_broken_on_a_narrow_terminal(mixed, width):
    found = inspect(mixed, samples=1)
    assert printed(found, width=width) == printed(found, width=80)


def test_colours_on_a_terminal(recipe_for, tiny):
    found = inspect(recipe_for(data=tiny.captions, template="plain"), samples=1)
    text = printed(found, force_terminal=True, color_system="standard")
    assert "\x1b[1;32ma" in text  # the caption is green
    assert "\x1b[36m[0.png: 4 tokens]" in text
    assert "»" not in text
    assert "»a" in printed(found)
    assert "»a" in printed(found, force_terminal=True, color_system="standard", no_color=True)


def test_text_cannot_steer_the_terminal(recipe_for, tiny):
    said = [{"from": "human", "value": "\x1b[2J\x07 hi"}, {"from": "gpt", "value": "[bold]no[/bold] \x9b31m\u202e"}]
    path = tiny.folder / "escape.json"
    path.write_text(json.dumps([{"id": "\x1b[2J", "conversations": said}, {"id": "\x1b]0;x\x07", "conversations": 3}]))
    text = printed(inspect(recipe_for(data=path), samples=1))
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}
    assert r"(id \x1b]0;x\x07): expected an object with a list" in text


def test_json_has_everything(mixed, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(mixed.to_yaml())
    assert run(tmp_path / "recipe.yaml", "--json", "--samples", 2) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == 6 and len(found["problems"]) == 7
    assert {"path", "row", "reason", "words"} <= found["problems"][0].keys()
    assert len(found["samples"]) == 2 and {run_[0] for run_ in found["samples"][0]["runs"]} >= {"context", "supervised"}
    assert found["lengths"]["max"] <= 200 and found["packs"]["count"] > 0
    assert found["memory"]["total"] == sum(value for key, value in found["memory"].items() if key != "total")
    assert found["sources"][1]["samples"] == 144


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data=none.json"], "data: no file"),
        (["model=none"], "model: no folder"),
        (["dta=x"], "unknown key 'dta'"),
        (["--sample=3"], "unknown key '--sample'"),
        (["image_folder=none"], "image_folder: no folder"),
        (["data=list.json"], "line 1: not JSON"),
    ],
)
def test_what_cannot_be_inspected_is_one_line_and_exit_status_2(
    recipe_for, tmp_path, capsys, monkeypatch, overrides, words
):
    (tmp_path / "recipe.yaml").write_text(recipe_for().to_yaml())
    (tmp_path / "list.json").write_text("[1,")
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "recipe.yaml", *overrides) == 2
    captured = capsys.readouterr()
    assert words in captured.err.splitlines()[-1] and captured.err.splitlines()[-1].startswith("llava-fast: error: ")
    assert captured.out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("max_length=3", "fully_masked: {chat}, row 3 (id 3): "),
        ("image_folder={empty}", "image_missing: {chat}, row 0 (id 0): no image file 0.png"),
        ("template=plain", "malformed: {chat}, row 3 (id 3): template 'plain' needs <image> in the first turn"),
    ],
)
def test_rows_are_listed_even_if_none_can_be_used(recipe_for, tiny, tmp_path, capsys, override, line):
    rows = [row for row in json.loads(tiny.chat.read_text()) if ("image" in row) == override.startswith("image")]
    path, empty = tmp_path / "chat.json", tmp_path / "empty"
    path.write_text(json.dumps(rows))
    empty.mkdir()
    (tmp_path / "recipe.yaml").write_text(recipe_for(data=path).to_yaml())
    assert run(tmp_path / "recipe.yaml", override.format(empty=empty), "--problems", 0) == 1
    out = capsys.readouterr().out
    row = line.format(chat=path).replace("row 3", "row 0")
    assert row in out and out.count(f"{path}, row ") == len(rows) + 1
    assert f"none of {len(rows)} rows can be used" in out
    assert run(tmp_path / "recipe.yaml", override.format(empty=empty), "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == len(rows)


def test_images_are_read_in_parallel_and_once(recipe_for, tiny, monkeypatch):
    recipe = recipe_for(data=[{"path": tiny.chat}, {"path": tiny.captions}])
    train, _ = load_data(recipe, load_processor(recipe))
    together, read = threading.Barrier(2, timeout=30), []

    def pixels(self, path):
        read.append(path)
        if len(read) <= 2:
            together.wait()  # two threads are here at the same time, or the barrier breaks

    monkeypatch.setattr(LlavaProcessor, "image_pixels", pixels)
    problems, n_images = check_images([train], threads=2)
    assert problems == [] and sorted(map(str, read)) == sorted(
        {image for i in range(len(train)) for image in train.images(i)}
    )
    assert n_images == len(read) == 96


def test_statistics():
    assert statistics([4, 1, 2, 3]) == {"min": 1, "mean": 2.5, "median": 2.5, "p95": pytest.approx(3.85), "max": 4}
    assert statistics([]) == {}


def test_a_model_of_any_layout_is_predicted(recipe_for, tiny, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(tiny.base)
    model.save_pretrained(tmp_path / "original", layout="original", mm_vision_tower=tiny.tower)
    expected = inspect(recipe_for(data=tiny.chat), samples=0).memory
    recipe = recipe_for(data=tiny.chat, model=tmp_path / "original", processor=tiny.base)
    assert inspect(recipe, samples=0).memory == expected


def test_no_prediction_says_why(recipe_for, tiny, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    found = inspect(recipe_for(data=tiny.chat, model=tmp_path / "model", processor=tiny.base), samples=0)
    assert str(tmp_path / "model" / "config.json") in found.memory
    assert f"memory: not predicted, {found.memory}\n" in printed(found)
    assert json.dumps(found.to_dict())
