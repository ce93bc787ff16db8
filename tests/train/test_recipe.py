"""Recipes: what is read, what is refused, and that the shipped ones carry LLaVA-1.5's published values."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from llava_fast.model.language import DecoderLayer
from llava_fast.model.vision import VisionTower
from llava_fast.train.__main__ import main
from llava_fast.train.recipe import Lora, Recipe, RecipeError, load_recipe

RECIPES = Path(__file__).parents[2] / "train"


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    """A valid LoRA recipe whose files exist."""
    (tmp_path / "base").mkdir()
    (tmp_path / "chat.json").write_text("[]")
    path = tmp_path / "recipe.yaml"
    path.write_text("stage: lora\nmodel: base\ndata: chat.json\noutput_dir: out\nlora: {r: 64}\n")
    return path


# The original scripts' values: stage, batch, rate, the projector's rate, conversation, images, grouping.
PUBLISHED = {
    "llava-1.5-7b-stage1": ("projector", 256, 1e-3, None, "plain", "crop", "none"),
    "llava-1.5-7b-stage2-full": ("full", 128, 2e-5, None, "v1", "pad", "modality"),
    "llava-1.5-7b-stage2-lora": ("lora", 128, 2e-4, 2e-5, "v1", "pad", "modality"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_recipes_are_the_published_ones(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    stage, batch, rate, projector_rate, template, aspect, group_by = PUBLISHED[name]
    assert (recipe.stage, recipe.global_batch_size) == (stage, batch)
    assert (recipe.learning_rate, recipe.projector_learning_rate) == (rate, projector_rate)
    assert (recipe.template, recipe.image_aspect, recipe.group_by) == (template, aspect, group_by)
    assert (recipe.epochs, recipe.max_steps) == (1.0, None)
    assert (recipe.scheduler, recipe.warmup_ratio, recipe.weight_decay) == ("cosine", 0.03, 0.0)
    assert (recipe.dtype, recipe.max_length) == ("bf16", 2048)
    assert recipe.lora == (Lora(r=128, alpha=256, dropout=0.05) if stage == "lora" else None)
    assert recipe.accumulation(8) == 1  # as published on eight GPUs
    assert recipe.accumulation(1) == 8


def test_published_recipes_chain():
    stage1 = load_recipe(RECIPES / "llava-1.5-7b-stage1.yaml")
    for name in ("full", "lora"):
        stage2 = load_recipe(RECIPES / f"llava-1.5-7b-stage2-{name}.yaml")
        assert stage2.model.resolve() == stage1.output_dir.resolve()


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_load_and_leave_the_dtype_to_the_recipe(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"
    kind = {"one": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == kind[path.stem.split("-")[0]]
    assert config.num_processes == (1 if path.stem == "one-gpu" else 8)
    if config.deepspeed_config:
        # Anything else would contradict the recipe's batch sizes, which the Trainer refuses.
        assert config.deepspeed_config["gradient_accumulation_steps"] == "auto"
        assert config.deepspeed_config["zero_stage"] == int(path.stem[4])
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
        wrapped = {DecoderLayer.__name__, VisionTower.__name__}
        assert set(config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")) == wrapped


def test_all_accelerate_configs_are_there():
    names = {path.stem for path in (RECIPES / "accelerate").glob("*.yaml")}
    assert names == {"one-gpu", "ddp-8gpu", "fsdp2-8gpu", "zero2-8gpu", "zero3-8gpu"}


def test_overrides_are_typed(recipe_file):
    overrides = "learning_rate=1e-4 lora.alpha=32 epochs=2 validation=0.1 resume=true seed=7".split()
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.learning_rate == 1e-4
    assert recipe.lora == Lora(r=64, alpha=32, dropout=0.05)
    assert recipe.epochs == 2.0 and isinstance(recipe.epochs, float)
    assert recipe.validation == 0.1
    assert recipe.resume is True
    assert recipe.seed == 7


def test_paths_are_relative_to_the_file_or_to_the_shell(recipe_file, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(recipe_file, ["output_dir=2024", "validation=val.json", "image_folder=/images"])
    assert recipe.data == tmp_path / "chat.json"
    assert recipe.model == tmp_path / "base"
    assert recipe.output_dir == elsewhere / "2024"  # text that looks like a number
    assert recipe.validation == elsewhere / "val.json"
    assert recipe.image_folder == Path("/images")


def test_yaml_scientific_notation_is_a_number(recipe_file):
    recipe_file.write_text(recipe_file.read_text() + "learning_rate: 2e-5\n")  # YAML 1.1 says text
    assert load_recipe(recipe_file).learning_rate == 2e-5


def test_printed_config_reads_back(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["learning_rate=3e-4", "validation=0.25"])
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "recipe.yaml"
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lerning_rate=1"], "unknown key 'lerning_rate'; the nearest known key is 'learning_rate'"),
        (["lora.alfa=1"], "unknown key 'lora.alfa'; the nearest known key is 'lora.alpha'"),
        (["lroa.r=1"], "unknown key 'lroa'; the nearest known key is 'lora'"),
        (["learning_rate=fast"], "learning_rate: expected a number, got 'fast'"),
        (["max_steps=1.5"], "max_steps: expected a whole number or null, got 1.5"),
        (["gradient_checkpointing=1"], "gradient_checkpointing: expected true or false, got 1"),
        (["stage=second"], "stage: expected projector, full or lora, got 'second'"),
        (["lora=5"], "lora: expected a mapping with r, alpha, dropout or null, got 5"),
        (["lora.r=0"], "lora.r: must be at least 1, got 0"),
        (["learning_rate=nan"], "learning_rate: must be positive, got nan"),
        (["warmup_ratio=1"], "warmup_ratio: must be in [0, 1), got 1.0"),
        (["validation=2"], "validation: a share must be in (0, 1), got 2.0"),
        (["validation=nan"], "validation: a share must be in (0, 1), got nan"),
        (["validation=1e999"], "validation: a share must be in (0, 1), got inf"),
        (["eval_steps=5"], "eval_steps: there is nothing to evaluate on, set validation"),
        (["scheduler=cosinus"], "scheduler: 'cosinus' is not one of cosine, linear, constant"),
        (["global_batch_size=100"], "global_batch_size: 100 is not a multiple of per_device_batch_size 16"),
        (["model=null"], "model: give a LLaVA checkpoint folder, or vision_tower and language_model"),
        (["vision_tower=clip"], "model: give either model or vision_tower and language_model, not both"),
        (["stage=full"], "lora: only with stage: lora, not full; remove it, or set lora=null"),
        (["stage=projector", "lora=null", "projector_learning_rate=1"], "projector_learning_rate: in stage"),
        (["stage=projector", "lora=null", "vision_learning_rate=1"], "vision_learning_rate: stage projector trains"),
        (["vision_layers=2"], "vision_layers: the vision tower is frozen; set vision_learning_rate to train it"),
        (["report_to=nobody"], "report_to: 'nobody' is not one of azure_ml, clearml"),
        (["report_to=tensorboard,wandb"], "; give several as a list, [tensorboard, wandb]"),
        (["report_to=[none, nobody]"], "report_to: 'nobody' is not one of"),
        (["report_to=[kubeflow]"], "report_to: kubeflow is not installed; pip install it, or set report_to=none"),
        (
            ["model=null", "vision_tower=a", "language_model=b"],
            "model: stage lora adapts a checkpoint on disk; train stage projector first",
        ),
        (["learning_rate"], "'learning_rate' is not key=value"),
        (["data=missing.json"], "data: no file"),
        (["model=missing"], "model: no folder"),
        (["image_folder=missing"], "image_folder: no folder"),
        (["validation=missing.json"], "validation: no file"),
        (["resume=true"], "resume: no checkpoint-N folder in"),
        (["resume=missing"], "resume: no folder"),
    ],
)
def test_a_bad_recipe_is_one_line_and_exit_code_2(recipe_file, overrides, message, capsys, monkeypatch):
    monkeypatch.chdir(recipe_file.parent)
    assert main([str(recipe_file), *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(path.name for path in recipe_file.parent.iterdir()) == ["base", "chat.json", "recipe.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: lora\ndata: a.json\nmodel: base\n", "missing key 'output_dir'"),
        ("- a\n- b\n", "a recipe is a mapping of keys to values"),
        ("stage: [lora\n", "not YAML"),
        ("", "a recipe is a mapping"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")
    for name in ("llava-1.5-7b-stage1", tmp_path / "llava-1.5-7b-stage1.yaml"):
        with pytest.raises(RecipeError, match=r"`llava-fast recipes copy llava-1\.5-7b-stage1` writes"):
            load_recipe(name)


def test_an_output_folder_in_use_is_refused(recipe_file):
    out = recipe_file.parent / "out"
    for step in (9, 10):
        (out / f"checkpoint-{step}").mkdir(parents=True)
        (out / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"output_dir: .* holds checkpoints of an earlier run"):
        load_recipe(recipe_file).check_files()
    resumed = load_recipe(recipe_file, ["resume=true"])
    resumed.check_files()
    assert resumed.checkpoint() == out / "checkpoint-10"
    with pytest.raises(RecipeError, match="is the model that training starts from"):
        load_recipe(recipe_file, [f"output_dir={recipe_file.parent / 'base'}"]).check_files()
    (out / "checkpoint-10" / "trainer_state.json").unlink()
    with pytest.raises(RecipeError, match="is not a training checkpoint"):
        resumed.check_files()


def test_recipes_made_in_python_are_checked_alike():
    with pytest.raises(RecipeError, match="epochs: expected a number, got 'many'"):
        Recipe(stage="full", data="a", model="b", output_dir="c", epochs="many")
    recipe = Recipe(stage="lora", data="a", model="b", output_dir="c", lora={"r": 8})
    assert recipe.lora == Lora(r=8) and recipe.data == Path("a")
    with pytest.raises(RecipeError, match="64 is not a multiple of per_device_batch_size 16 x 3 processes"):
        Recipe(stage="full", data="a", model="b", output_dir="c", global_batch_size=64).accumulation(3)


def test_command_line(recipe_file):
    command = [sys.executable, "-m", "llava_fast.train"]
    text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "RECIPE" in text.upper() and "key=value" in text and "--print-config" in text
    arguments = [*command, str(recipe_file), "--print-config", "lora.r=32"]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert yaml.safe_load(printed)["lora"]["r"] == 32
    failed = subprocess.run([*command, str(recipe_file), "lr=1"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr == "error: command line: unknown key 'lr'; the nearest known key is 'lora'\n"
