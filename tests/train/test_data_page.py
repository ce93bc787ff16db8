"""docs/data.md: its rows are one, its recipe loads, and its commands run and do what it says."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from llava_fast import cli
from llava_fast.processor.processor import FORMATS
from llava_fast.train.recipe import load_recipe
from llava_fast.train.rows import ERRORS, parse_row

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture
def workplace(tiny, tmp_path, monkeypatch) -> Path:
    """A folder with everything that the page's recipe names."""
    (tmp_path / "model").symlink_to(tiny.base)
    (tmp_path / "coco").mkdir()
    for picture in tiny.folder.glob("*.png"):
        shutil.copy(picture, tmp_path / "coco")
    rows = json.loads(tiny.chat.read_text())
    (tmp_path / "instruct.json").write_text(json.dumps(rows))
    (tmp_path / "vqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copy(tiny.captions, tmp_path / "captions.json")
    (tmp_path / "chats.json").write_text(json.dumps([row for row in rows if "image" not in row]))
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_rows_are_one():
    rows = [parse_row(json.loads(row)) for row in blocks("json")]
    assert len(rows) == 6
    for row in rows:
        assert row[:2] == (["<image>\nWhat is on the table?", "A cup of tea."], ["000007.jpg"])
        assert row.system is None


def run(line: str, capsys) -> tuple[int, str]:
    words = shlex.split(line)
    assert words[0] == "llava-fast"
    target = words.index(">") if ">" in words else len(words)
    with pytest.raises(SystemExit) as exit_:
        cli.main(words[1:target])
    out = capsys.readouterr().out
    if target < len(words):
        Path(words[target + 1]).write_text(out)
    return exit_.value.code or 0, out


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(workplace, capsys, line):
    status, out = run(line, capsys)
    assert status == 0 and out


def test_they_do_what_the_page_says(workplace, capsys):
    sources = load_recipe("recipe.yaml").sources()
    assert [source.image_folder.resolve().name for source in sources] == ["coco"] * 3 + [workplace.name]
    (workplace / "coco" / "0.png").write_bytes(b"<html>")
    status, _ = run(COMMANDS[-1], capsys)
    found = json.loads((workplace / "inspection.json").read_text())
    assert status == 1
    assert [source["samples"] for source in found["sources"]] == [96, 48, 288, 20]
    assert {problem["reason"] for problem in found["problems"]} == {"unreadable"}
    shutil.rmtree(workplace / "coco")
    assert run(COMMANDS[0], capsys)[0] == 2


def test_names_in_the_page_are_the_programs():
    assert all(f"`{reason}`" in PAGE for reason in ERRORS)
    listed = PAGE[PAGE.index("formats outside of") :].partition(".\n")[0].upper()
    assert re.findall(r"[A-Z0-9]+", listed.replace(" AND ", " "))[3:] == FORMATS
