"""README.md and docs/*.md: their Python runs as pasted, their commands are taken by the programs they name.

A model id such as `llava-hf/llava-1.5-7b-hf` is a tiny model in the hub's cache, where a download would be. Three pages
have tests of their own that run their commands; what no test can run is fenced as `text` and listed in NOT_RUN.
"""

import argparse
import importlib.util
import itertools
import random
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from torch.distributed.run import get_args_parser
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForPreTraining
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, PROCESSOR_MAPPING_NAMES

from llava_fast import cli
from llava_fast.demo import world
from llava_fast.train.recipe import Lora, Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RUN_ELSEWHERE = {
    "checkpoints.md": "tests/test_convert.py",
    "data.md": "tests/train/test_data_page.py",
    "training.md": "tests/train/test_training_page.py",
}
PAGES = [README, *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in RUN_ELSEWHERE)]
SHELL = ("sh", "bash", "")  # a block without a language has commands, too
NOT_RUN: dict[str, int] = {}  # blocks of text by page
AUTO_MODELS = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForPreTraining)
HUB_ID = "llava-hf/llava-1.5-7b-hf"


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def with_blocks(*languages: str) -> Any:
    found = [page for page in PAGES if any(language in languages for language, _ in blocks(page))]
    return pytest.mark.parametrize("page", found, ids=lambda page: page.stem)


def test_every_block_is_run_or_listed():
    for page in PAGES:
        languages = [language for language, _ in blocks(page)]
        assert {*languages} <= {"python", *SHELL, "text"}, page
        assert languages.count("text") == NOT_RUN.get(page.name, 0), page
    for name, test in RUN_ELSEWHERE.items():
        assert f"docs/{name}" in (ROOT / test).read_text(encoding="utf-8")


@pytest.fixture
def workplace(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a photograph, and a hub cache that has the model."""
    model = tmp_path / "cache" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(tiny_checkpoint, model / "snapshots" / "0")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def _auto_classes_are_restored() -> Iterator[None]:
    """What `llava_fast.register()` changes in transformers is undone after the test."""
    tables = [auto._model_mapping._extra_content for auto in AUTO_MODELS]
    tables += [PROCESSOR_MAPPING._extra_content, PROCESSOR_MAPPING_NAMES]
    before = [table.copy() for table in tables]
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


@pytest.mark.usefixtures("_auto_classes_are_restored")
@with_blocks("python")
def test_python_runs_as_pasted(page: Path, workplace: Path):
    namespace: dict[str, Any] = {}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), namespace)


# ---- commands


def parsed(command: Any, words: list[str]) -> list[str]:
    """Have the command line's own parser read the words; returns those that it leaves, such as key=value."""
    if hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, words
        return parsed(command.commands[words[0]], words[1:])
    try:
        return command.make_context("llava-fast", list(words)).args
    except typer.Exit:  # --version
        return []


def check(words: list[str]) -> None:
    """Check one command line."""
    program, *rest = itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)
    if Path(program).name == "llava-fast":
        overrides = parsed(typer.main.get_command(cli.app), rest)
        if rest[0] in ("train", "inspect"):
            load_recipe(ROOT / rest[1], [word for word in overrides if "=" in word])
    elif words[:3] == ["python", "-m", "llava_fast.train"]:
        check(["llava-fast", "train", *words[3:]])
    elif program == "accelerate":
        arguments = launch_command_parser().parse_args(rest[1:])
        assert rest[0] == "launch" and arguments.module and (ROOT / arguments.config_file).is_file()
        check(["python", "-m", arguments.training_script, *arguments.training_script_args])
    elif program == "torchrun":
        arguments = get_args_parser().parse_args(rest)
        assert arguments.module
        check(["python", "-m", arguments.training_script, *arguments.training_script_args])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            name, equals, _ = word.partition("=")
            assert f"$({name})" in makefile if equals else re.search(rf"^{name}:", makefile, re.MULTILINE), word
    elif program == "pytest":
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("path", type=lambda name: next(ROOT.glob(name)))
        for option in re.findall(r'addoption\("(--\w+)", (action|metavar)', (ROOT / "conftest.py").read_text()):
            parser.add_argument(option[0], **({"action": "store_true"} if option[1] == "action" else {}))
        parser.parse_args(rest)
    else:
        raise AssertionError(f"no test knows the program of: {shlex.join(words)}")


@with_blocks(*SHELL)
def test_commands_are_taken_by_their_programs(page: Path):
    commands = "".join(text for language, text in blocks(page) if language in SHELL).replace("\\\n", " ")
    for line in commands.splitlines():
        check(shlex.split(line.rpartition(" | ")[2], comments=True))  # of a pipe the program that reads it


# ---- what pages say about the code


def test_the_picture_in_the_readme_is_of_the_demo():
    """A scene of the exam; the answers in the README are the right ones."""
    scene = world.scenes(12, 120, held=True)[1]
    drawn = np.asarray(world.render(scene, seed=1).convert("RGB"), dtype=float)
    shown = np.asarray(Image.open(ROOT / "docs/images/demo.png").convert("RGB"), dtype=float)
    assert np.abs(drawn - shown).mean() < 2  # versions of PIL differ at edges
    text = README.read_text(encoding="utf-8")
    asked = re.findall(r"([A-Z][^|?>]+\?) \*\*([\w-]+)\*\*", text)
    rng = random.Random(0)
    known = {question.text: question.answer for _ in range(50) for question in world.ask(scene, rng, 8)}
    assert len(asked) == 4
    assert all(known[question] == answer for question, answer in asked)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") < 200
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_keys_and_flags_of_the_page_for_users_of_llava():
    page = (ROOT / "docs/from-llava.md").read_text(encoding="utf-8")
    table = page.partition("| flag | recipe key | |")[2].partition("\n\n")[0]
    cells = [row.split("|")[2] for row in table.splitlines()[2:]]
    keys = {name.partition(":")[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    known = {field.name for field in fields(Recipe)} | {f"lora.{field.name}" for field in fields(Lora)}
    assert keys and keys <= known
    assert "vision_learning_rate" in known & {*re.findall(r"`(\w+)`", page)}
    # Every field of the three dataclasses in llava/train/train.py has its place on the page.
    flags = """
        model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer
        pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_vision_select_feature
        data_path lazy_preprocess is_multimodal image_folder image_aspect_ratio image_grid_pinpoints
        cache_dir optim remove_unused_columns freeze_mm_mlp_adapter mpt_attn_impl model_max_length double_quant
        quant_type bits lora_enable lora_r lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr
        group_by_modality_length
    """.split()
    assert [flag for flag in flags if f"`--{flag}" not in page] == []


def generator(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_recipe_keys_is_what_the_code_gives():
    page = generator("recipe_keys").page()
    assert (ROOT / "docs/recipes.md").read_text(encoding="utf-8") == page, "out of date: make docs"
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert {field.name for field in fields(Recipe)} <= {row[0] for row in rows}
    assert all(meaning and kind for _, kind, _, meaning in rows)
    # A default on the page, read as YAML, is the default of the code.
    for field, (name, _, default, _) in zip(fields(Recipe), rows):
        assert field.name == name
        if default.startswith("`"):
            assert str(field.default).lower() == str(float(default[1:-1]) if "e-" in default else default[1:-1])


def test_the_evidence_is_what_is_stored_and_has_every_kernel():
    made = generator("evidence")
    page = made.page()
    assert (ROOT / "docs/evidence.md").read_text(encoding="utf-8") == page, "out of date: make docs"
    triton, cuda = made.triton_kernels(), made.cuda_kernels()
    assert len(triton) >= 18 and len(cuda) >= 5
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "llava_fast/ops").rglob("*.py")]
    launched = {name for text in sources for name in re.findall(r"^def _(\w+_kernel)\(", text, re.MULTILINE)}
    assert launched == triton.keys()
    rows = {row.split("|")[1].strip(" `"): row.split("|")[2].strip() for row in page.splitlines() if row[:3] == "| `"}
    assert all(rows[kernel] not in ("", made.NONE) for kernel in (*triton, *cuda)), "a kernel without a reference"
