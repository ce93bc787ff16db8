"""Recipes that nobody vouches for: each mistake is one line that names the key, and writes nothing.

To add one, add a line to the table.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_fast.train.__main__ import main
from llava_fast.train.recipe import load_recipe


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }


# Recipes: `data:` of the recipe, or a whole line, and what the message says.
RECIPES = {
    "a number": ("data: 3", "data: expected a path or a list of mappings with path, image_folder"),
    "an empty list": ("data: []", "data: a mixture needs at least one file"),
    "a mapping": ("data: {path: chat.json}", "data: expected a path or a list of mappings"),
    "names alone": ("data: [chat.json]", "data[0]: expected a mapping with path, image_folder"),
    "no path": ("data: [{count: 3}]", "data[0]: missing key 'path'"),
    "an unknown key": (
        "data: [{pth: chat.json}]",
        "unknown key 'data[0].pth'; the nearest known key is 'data[0].path'",
    ),
    "an unknown key that is a number": (
        "data: [{path: chat.json, 3: 4}]",
        "unknown key 'data[0].3'; the nearest known key is 'data[0].weight'",
    ),
    "an unknown sampling": ("data: [{path: chat.json, sampling: all}]", "data[0].sampling: expected first, last"),
    "no rows": ("data: [{path: chat.json, count: 0}]", "data[0].count: must be positive, got 0"),
    "no share": ("data: [{path: chat.json, count: 0%}]", "data[0].count: must be positive, got 0%"),
    "a count in words": ("data: [{path: chat.json, count: half}]", "data[0].count: expected a number of rows or a per"),
    "a negative weight": ("data: [{path: chat.json, weight: -1}]", "data[0].weight: must be from 1e-6 to 1e6"),
    "a weight that is no number": (
        "data: [{path: chat.json, weight: .nan}]",
        "data[0].weight: must be from 1e-6 to 1e6",
    ),
    "a weight out of proportion": ("data: [{path: chat.json, weight: 1e-320}]", "data[0].weight: must be from 1e-6 to"),
    "count and weight": ("data: [{path: a, count: 1, weight: 1}]", "data[0].weight: give either count or weight"),
    "some weights": ("data: [{path: a, weight: 1}, {path: b}]", "data[1].weight: give every source a weight, or none"),
    "repeat without end": ("data: [{path: a, sampling: repeat}]", "data[0].sampling: repeat needs a count"),
    "no such file": ("data: [{path: chat.json}, {path: none.json}]", "data[1].path: no file"),
    "no such folder": ("data: [{path: chat.json, image_folder: none}]", "data[0].image_folder: no folder"),
    "an unknown on_error": ("on_error: ignore", "on_error: expected raise, skip or null, got 'ignore'"),
    "errors below none": ("max_errors: -1", "max_errors: must not be negative, got -1"),
    "errors that cannot be": ("on_error: raise\nmax_errors: 3", "max_errors: nothing is skipped with on_error: raise"),
    "nested YAML": ("data: " + "[" * 20_000, "not YAML: nested too deeply"),
    "a bomb of aliases": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdefghij", "bcdefghijk"))
        + "stage: *k",
        "stage: expected projector, full or lora, got [[",
    ),
    "a bomb as a value": (
        "seed: &a [x, x, x, x, x, x, x, x, x]\n",
        "seed: expected a whole number, got ['x', 'x', 'x', 'x', 'x', 'x', ...]",
    ),
    "a Python object": ("seed: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
    "no such day": ("seed: 2024-13-45", "not YAML: month must be in 1..12"),
    "a truth that is none": ("cache: !!bool maybe", "not YAML: 'maybe'"),
    "a number of 5000 digits": ("seed: " + "9" * 5000, "not YAML: Exceeds the limit"),
    "a large seed": ("seed: 4294967296", "seed: must be below 2**32, got 4294967296"),
    "a number past the largest": ("epochs: 1" + "0" * 400, "is too large"),
    "nobody's home": ("data: ~nobody-at-all/chat.json", "data: Could not determine home directory"),
    "a NUL in a path": ('data: "a\\0b"', "data: expected a path"),
    "a line break in a path": ('data: "a\\nb"', "data: no file"),
    "a key that is a number": ("1: 2", "unknown key '1'"),
    "no unicode": (b"stage: \xff", "not YAML: 'utf-8' codec"),
    "a control character": (b"stage: \x00", "not YAML: unacceptable character"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipes(tmp_path, capsys, name):
    text, words = RECIPES[name]
    (tmp_path / "base").mkdir()
    (tmp_path / "chat.json").write_text("[]")
    recipe = tmp_path / "recipe.yaml"
    lines = {"stage": "full", "model": "base", "data": "chat.json", "output_dir": "out"}
    raw = text if isinstance(text, bytes) else text.encode()
    key = raw.split(b":")[0].decode()
    base = "".join(f"{k}: {v}\n" for k, v in lines.items() if k != key)
    recipe.write_bytes(base.encode() + raw + b"\n")
    before = snapshot(tmp_path)
    assert main([str(recipe)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and len(captured.err) < 1000
    assert words in captured.err
    assert snapshot(tmp_path) == before


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(raw=st.text(st.sampled_from("stage:dat{}[]&*!|>-? \n#'\"%@\t0123.~"), max_size=60) | st.binary(max_size=60))
def test_any_recipe_is_read_or_one_line(tmp_path, raw):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(ValueError) as error:  # too little for a recipe, whatever it is
        load_recipe(path)
    assert str(error.value).isprintable() and str(path) in str(error.value)


def test_an_override_of_what_is_set_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("stage: full\nmodel: m\noutput_dir: o\ndata: d\n")
    assert main([str(tmp_path / "recipe.yaml"), "data.0=other.json"]) == 2
    assert capsys.readouterr().err == (
        "error: command line: data.0: data is set as a whole, data=…; only lora has keys of its own\n"
    )
