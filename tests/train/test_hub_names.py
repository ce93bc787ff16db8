"""Recipes that name models by hub id; the hub is one on this machine."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import set_seed

from llava_fast.train.memory import read_config
from llava_fast.train.recipe import Recipe, RecipeError, load_recipe
from llava_fast.train.trainer import run
from tests.hub import Hub, serving

KEYS = {"stage": "full", "data": "chat.json", "output_dir": "out"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path / "hub") as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def written(folder: Path, **keys: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(json.dumps({**KEYS, **keys}))
    return folder / "recipe.yaml"


def test_a_folder_beside_the_recipe_comes_before_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path / "recipes", model="org/model")
    assert load_recipe(file).model == "org/model"
    assert load_recipe(written(tmp_path / "recipes", model="models/a/b")).model == tmp_path / "recipes/models/a/b"
    assert load_recipe(written(tmp_path / "recipes", model="./org/model")).model == tmp_path / "recipes/org/model"
    assert load_recipe(file, ["model=other/model", "processor=org/model"]).processor == "org/model"
    (tmp_path / "recipes/org/model").mkdir(parents=True)
    file = written(tmp_path / "recipes", model="org/model")
    assert load_recipe(file).model == tmp_path / "recipes/org/model"


@pytest.mark.parametrize("key", ["model", "processor"])
@pytest.mark.parametrize(
    ("value", "shown"), [(5, "got 5"), ("", "got ''"), ("a\0b", r"got 'a\\x00b'"), ([], r"got \[\]")]
)
def test_what_is_no_name_is_one_line(key: str, value: Any, shown: str) -> None:
    with pytest.raises(RecipeError, match=rf"^{key}: expected a path, a hub id or null, {shown}$"):
        Recipe(**{**KEYS, "model": "org/model", key: value})


def test_a_recipe_reads_back_with_its_id(tmp_path: Path) -> None:
    recipe = Recipe(
        stage="full", data="chat.json", output_dir="out", vision_tower="org/tower", language_model="org/text"
    )
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again.assembled_from == ("org/tower", "org/text")


@pytest.mark.parametrize("key", ["model", "processor"])
def test_a_typo_is_found_before_anything_is_loaded(key: str, hub: Hub, tiny: SimpleNamespace, recipe_for) -> None:
    shutil.copytree(tiny.base, hub.root / "org/model")
    recipe = recipe_for(**{"model": "org/model", key: "org/typo"})
    with pytest.raises(RecipeError, match=f"^{key}: no directory org/typo, and no model org/typo is on {hub.url} "):
        run(recipe)
    assert not recipe.output_dir.exists()
    assert "model.safetensors" not in hub.downloads()


def test_the_config_of_a_model_and_of_its_parts(hub: Hub, tiny: SimpleNamespace, recipe_for) -> None:
    shutil.copytree(tiny.base, hub.root / "org/model")
    shutil.copytree(tiny.tower, hub.root / "org/tower")
    shutil.copytree(tiny.text, hub.root / "org/text")
    expected = read_config(recipe_for()).vision_config.to_dict()
    assert read_config(recipe_for(model="org/model")).vision_config.to_dict() == expected
    parts = read_config(recipe_for(model=None, vision_tower="org/tower", language_model="org/text"))
    assert parts.vision_config.hidden_size == expected["hidden_size"]


def test_a_lora_run_names_its_base_by_id(hub: Hub, tiny: SimpleNamespace, recipe_for, tmp_path: Path) -> None:
    shutil.copytree(tiny.base, hub.root / "org/model")
    keys = {"stage": "lora", "max_steps": 2, "save_steps": 1}
    result = run(recipe_for(model="org/model", **keys))
    for adapter in (result["output_dir"] / "adapter", result["output_dir"] / "checkpoint-1"):
        settings = json.loads((adapter / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "org/model"
    set_seed(0)
    expected = run(recipe_for(**keys, output_dir=tmp_path / "local"))
    assert result["train_loss"] == expected["train_loss"]
    assert load_recipe(result["output_dir"] / "recipe.yaml").model == "org/model"
    again = {"resume": result["output_dir"] / "checkpoint-1", "output_dir": tmp_path / "again"}
    resumed = run(recipe_for(model="org/model", **again, **keys))
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in (resumed["output_dir"], expected["output_dir"])
    ]
    assert weights[0] == weights[1]
    assert hub.downloads().count("model.safetensors") == 1
