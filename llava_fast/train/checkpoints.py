"""Atomic training checkpoints, and the checks before a run resumes from one.

Files are written in `output_dir/.unfinished`, fsynced, and then renamed; to delete a folder, it is first renamed into
`.unfinished`. So a `checkpoint-N` is always complete, even if the process is killed, the disk is full or the power
fails, and the previous checkpoint is kept until the next one is complete. `complete.json`, written last, lists a
checkpoint's files with their sizes, and the settings and data of the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerState

from llava_fast.checkpoint.weights import sync_entry
from llava_fast.train.recipe import DataSource, Recipe, RecipeError, checkpoints_by_step, is_finished

UNFINISHED = ".unfinished"
MANIFEST = "complete.json"
MADE_FROM = {"settings", "files", "samples", "base"}
PROGRESS = {"processes", "sharding", "logged_step", "loss_since"}
# Recipe keys that may change at a resume: paths, logging and saving, and the number of forward passes of a step.
FREE = frozenset(
    "output_dir data validation model vision_tower language_model processor image_folder resume report_to workers "
    "cache max_errors logging_steps save_steps save_total_limit eval_steps gradient_checkpointing "
    "per_device_batch_size".split()
)
LENGTH = ("epochs", "max_steps")


class CheckpointError(RuntimeError):
    """A checkpoint or model could not be written; the message is one line that names its path."""


class AlreadyFinished(RuntimeError):
    """The run that should be resumed has finished; the message is one line that says how to train further."""


# Writing


@contextmanager
def writing(target: Path, unfinished: Path) -> Iterator[None]:
    """Turn a write error into one line that names `target`, and remove the files written in `unfinished`.

    Raises:
        CheckpointError: if writing fails; existing checkpoints are unchanged.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors raise the last two
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{target}: could not be written: {reason}; earlier checkpoints are untouched") from error


def clean(output_dir: Path) -> None:
    """Check that `output_dir` is writable, and remove the unfinished files of a killed run."""
    output_dir.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(output_dir / UNFINISHED):
        shutil.rmtree(output_dir / UNFINISHED)
    (output_dir / UNFINISHED).mkdir()


def seal(folder: Path, made_from: dict[str, Any], progress: dict[str, Any]) -> None:
    """Write `complete.json` for the checkpoint in `folder`, and fsync all files."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    manifest = {"files": files, "made_from": made_from, "progress": progress}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync(folder)


def publish(source: Path, target: Path) -> None:
    """Rename a complete, fsynced file or folder to `target`; replaces an existing file, moves a folder away first."""
    if target.is_dir():
        _discard(target)
    os.replace(source, target)
    sync_entry(target.parent)


def publish_model(source: Path, target: Path) -> None:
    """Move a model's files and folders into `target`, `config.json` last: without it a partial model cannot load."""
    sync(source)
    (target / "config.json").unlink(missing_ok=True)
    sync_entry(target)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        publish(path, target / path.name)
    shutil.rmtree(target / UNFINISHED)


def rotate(output_dir: Path, step: int, limit: int | None) -> None:
    """Keep `limit` checkpoints, including that of `step`; deletes later ones (of an earlier run), then the oldest."""
    found = sorted(checkpoints_by_step(output_dir).items(), key=lambda item: (item[0] <= step, item[0]))
    for _, folder in found[: -limit if limit else 0]:
        _discard(folder)


def _discard(folder: Path) -> None:
    doomed = folder.parent / UNFINISHED / f"old-{folder.name}"
    doomed.parent.mkdir(exist_ok=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync(folder: Path) -> None:
    """fsync everything below `folder`, and `folder` itself."""
    for path in [*folder.rglob("*"), folder]:
        sync_entry(path)


# Reading


@contextmanager
def reading(folder: str | Path | None) -> Iterator[None]:
    """Turn any error while reading the checkpoint in `folder` into one line; does nothing if `folder` is None.

    Raises:
        RecipeError: naming the checkpoint.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(f"resume: {folder} cannot be read: {type(error).__name__}: {reason}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest (`complete.json`) of a checkpoint, after a check of all its files.

    Raises:
        RecipeError: naming the file that is missing or has another size.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"].items()
        for section, keys in (("made_from", MADE_FROM), ("progress", PROGRESS)):
            if manifest[section].keys() != keys:
                raise ValueError(f"{section} has not {', '.join(sorted(keys))}")
    except FileNotFoundError:
        raise RecipeError(f"resume: {folder} is not a complete checkpoint (no {MANIFEST})") from None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"resume: {path} cannot be read: {error!r}") from error
    for name, size in files:
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found is None:
            raise RecipeError(f"resume: {folder / name} is missing{_instead(folder)}")
        if found != size:
            raise RecipeError(f"resume: {folder / name} has {found} of {size} bytes{_instead(folder)}")
    return manifest


def _instead(folder: Path) -> str:
    """Advice for an error message: resume from the checkpoint before `folder`."""
    earlier = [path for _, path in sorted(checkpoints_by_step(folder.parent).items()) if path != folder]
    return f"; to go on from another one, set resume={earlier[-1]}" if earlier else ""


def made_from(recipe: Recipe, lengths: list[int], model: nn.Module) -> dict[str, Any]:
    """Everything that decides a run's results: settings, hashes of the data files, sample lengths, LoRA's base model.

    Files are compared by hash, so they may be moved. A checkpoint with all weights does not record its base model.
    """
    return {
        "settings": settings_of(recipe),
        "files": {key: _hash_data(source) for key, source in _data_sources(recipe).items()},
        "samples": hashlib.sha256(json.dumps(lengths).encode()).hexdigest(),
        "base": _hash_weights(model) if recipe.stage == "lora" else None,
    }


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide a run's results, by their keys."""
    settings = {key: value for key, value in asdict(recipe).items() if key not in FREE and key != "lora"}
    settings |= {f"lora.{key}": value for key, value in (asdict(recipe.lora) if recipe.lora else {}).items()}
    if isinstance(recipe.validation, float):
        settings["validation"] = recipe.validation
    if isinstance(recipe.data, list):
        for i, source in enumerate(recipe.data):
            settings |= {f"data[{i}].{key}": getattr(source, key) for key in ("split", "sampling", "count", "weight")}
    return settings


def check_settings(recipe: Recipe, folder: Path, then: dict[str, Any]) -> None:
    """Check that the settings `then`, recorded in the checkpoint in `folder`, are the recipe's. Nothing is loaded.

    Raises:
        RecipeError: naming the key that has changed.
    """
    now = settings_of(recipe)
    for key in sorted(now.keys() | then.keys(), key=lambda key: (key != "stage", key)):
        new, old = now.get(key), then.get(key)
        if new == old or (key in LENGTH and _extends(recipe, new, old)):
            continue
        advice = _instead_of_extending(recipe) if key in LENGTH else ""
        raise RecipeError(f"resume: {key} is {new}, but {folder} was made with {old}{advice}")


def check_same(recipe: Recipe, folder: Path, now: dict[str, Any], then: dict[str, Any]) -> None:
    """Check that data and weights of `then`, recorded in the checkpoint in `folder`, are those of `now`, the new run.

    Raises:
        RecipeError: naming the key or the file that has changed.
    """
    sources = _data_sources(recipe)
    for key in sorted(now["files"].keys() | then["files"].keys()):
        if now["files"].get(key) != then["files"].get(key):
            path = sources[key].path if key in sources else None
            raise RecipeError(f"resume: {key}: {path} is not the data that {folder} was made with")
    if now["base"] != then["base"]:
        raise RecipeError(f"resume: model: {recipe.model} has not the weights that {folder} was made with")
    if now["samples"] != then["samples"]:
        raise RecipeError(f"resume: data: samples are not those that {folder} was made with; see tokenizer and images")


def _extends(recipe: Recipe, new: float | None, old: float | None) -> bool:
    """Whether a run may train longer than planned: its learning rates so far must not depend on its length."""
    return recipe.scheduler == "constant" and new is not None and old is not None and new > old


def _instead_of_extending(recipe: Recipe) -> str:
    return (
        f"; with scheduler {recipe.scheduler} the learning rate of every step depends on it: finish this run as it was "
        f"planned, then train its result in a new run, with model={recipe.output_dir} and another output_dir"
        if recipe.scheduler != "constant"
        else "; a run can be made longer, by the key that it was made with, not shorter"
    )


def check_unfinished(recipe: Recipe, now: dict[str, Any], then: dict[str, Any], state: TrainerState) -> None:
    """Check that a run that resumes from its newest checkpoint, with trainer state `state`, has something left to do.

    Raises:
        AlreadyFinished: if it has written its model, and is not to be made longer.
    """
    out = recipe.output_dir
    if recipe.resume is not True or not is_finished(out):
        return
    with reading(out):
        done = TrainerState.load_from_json(str(out / "trainer_state.json"))
    histories = (done.log_history[: len(state.log_history)], state.log_history)
    same_run = len(set(map(json.dumps, histories))) == 1  # as text, in which a loss of NaN equals itself
    length = "epochs" if recipe.max_steps is None else "max_steps"
    same_length = now["settings"][length] == then["settings"][length]
    if same_run and same_length and done.global_step >= state.max_steps:
        raise AlreadyFinished(
            f"{out} holds the finished model of this run, nothing is left to do; to train further, start a new run "
            f"with model={out} and another output_dir (or, with scheduler: constant, raise max_steps or epochs)"
        )


def _data_sources(recipe: Recipe) -> dict[str, DataSource]:
    if isinstance(recipe.data, list):
        sources = {f"data[{i}].path": source for i, source in enumerate(recipe.data)}
    else:
        sources = {"data": DataSource(recipe.data)}
    return sources | ({"validation": recipe.validation_source()} if isinstance(recipe.validation, Path) else {})


def _hash_data(source: DataSource) -> str:
    """A hash of a data file, or of all files of a folder's split with their names."""
    if not source.path.is_dir():
        return _hash_file(source.path)
    from llava_fast.train.tables import data_files

    hashes = {str(file.relative_to(source.path)): _hash_file(file) for file in data_files(source.path, source.split)}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    """A hash of a file; of a table, which can have all images in it, of its size, its beginning and its end."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while chunk := file.read(2**20):
            digest.update(chunk)
            if path.suffix in (".parquet", ".arrow") and file.tell() < size - 2**20:
                digest.update(str(size).encode())
                file.seek(size - 2**20)
    return digest.hexdigest()


def _hash_weights(model: nn.Module) -> str:
    """A fast checksum of all frozen weights: one integer sum per tensor, limited by memory bandwidth."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {
        name: int(weight.detach().contiguous().view(integers[weight.element_size()]).sum(dtype=torch.int64))
        for name, weight in model.named_parameters()
        if not weight.requires_grad
    }
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
