"""`Recipe`: the settings of a training run, a dataclass read from YAML and overridden by `key=value` arguments.

A recipe is checked completely before anything is loaded or written: unknown keys, wrong types and contradicting values
when it is read (`RecipeError`, one line), files and folders by `check_files`.

Relative paths in a recipe file are relative to that file; on the command line and in Python to the working directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict

from llava_fast.hub import local_folder
from llava_fast.train.shipped import shipped
from llava_fast.train.values import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NOT_NEGATIVE,
    Flag,
    ModelName,
    Number,
    PathLike,
    PositiveNumber,
    PositiveWhole,
    RecipeError,
    Text,
    Whole,
    convert_fields,
    load,
    rule,
    show,
)

SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
_SHARE = rule("a share must be in (0, 1)", lambda value: 0 < value < 1)


def _no_share(value: Any) -> Any:
    """Text that is a number is a share, not a file."""
    try:
        share = float(value) if isinstance(value, str) else 0.5
    except ValueError:
        return value
    if not 0 < share < 1:
        raise ValueError(f"a share must be in (0, 1), got {share}")
    return value


_ShareOrFile = Annotated[Number, _SHARE] | Annotated[PathLike, BeforeValidator(_no_share)]
_ROWS = rule("must be positive", lambda value: 0 < value < 2**40)
_WEIGHT = rule("must be from 1e-6 to 1e6", lambda value: 1e-6 <= value <= 1e6)


@dataclass
class Lora:
    """LoRA on every linear layer of the language model except `lm_head`; defaults are LLaVA-1.5's."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    r: Annotated[Whole, AT_LEAST_ONE] = 128  # rank of the update
    alpha: Annotated[Whole, AT_LEAST_ONE] = 256  # the update is scaled by alpha / r
    dropout: Annotated[Number, BELOW_ONE] = 0.05  # of the adapter's input

    def __post_init__(self) -> None:
        convert_fields(self, "lora.")


@dataclass
class DataSource:
    """One data file or folder of a mixture; see `sampler.py` for what sampling and weights mean."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: PathLike  # a JSON, JSONL, Parquet or Arrow file, or a folder of them
    image_folder: PathLike | None = None  # default: the recipe's image_folder, or else the folder of the file
    split: Text | None = None  # of a folder; default: train
    sampling: Literal["first", "last", "random", "repeat"] = "first"  # which rows make up `count`
    count: Annotated[Whole, _ROWS] | Text | None = None  # rows, or a share of the file as in 10%; default: all
    weight: Annotated[Number, _WEIGHT] | None = None  # instead of count: this source's proportion in the mixture

    def __post_init__(self) -> None:
        convert_fields(self)
        if isinstance(self.count, str) and not re.fullmatch(r"\d{1,9}(\.\d{1,9})?%", self.count):
            raise RecipeError(f"count: expected a number of rows or a percentage such as 10%, got {show(self.count)}")
        if isinstance(self.count, str) and not 0 < Fraction(self.count[:-1]) < 2**20:
            raise RecipeError(f"count: must be positive, got {self.count}")
        if self.count is not None and self.weight is not None:
            raise RecipeError("weight: give either count or weight, not both")
        if self.sampling == "repeat" and self.count is None and self.weight is None:
            raise RecipeError("sampling: repeat needs a count, such as 300%, or a weight")


@dataclass
class Recipe:
    """All settings of a training run; `None` means off, or the default named in the comment.

    Raises:
        RecipeError: for a value of the wrong type, out of range, or in contradiction with another one.
    """

    stage: Literal["projector", "full", "lora"]  # what is trained: LLaVA's stage 1, stage 2, stage 2 with LoRA
    data: PathLike | list[DataSource]  # a JSON, JSONL, Parquet or Arrow file, or a folder of them; or a mixture
    output_dir: PathLike  # the trained model and its processor; checkpoint-N folders below it
    model: ModelName | None = None  # a LLaVA checkpoint, a folder or hub id; or set the next two keys
    vision_tower: ModelName | None = None  # a CLIP folder or hub id
    language_model: ModelName | None = None  # a Llama folder with its tokenizer, or its hub id
    processor: ModelName | None = None  # a processor's folder or hub id; default: the model's own
    image_folder: PathLike | None = None  # image paths are relative to it; default: the folder of the data file
    template: Text = "v1"  # conversation style: v1, plain (stage 1), llava_llama_2 ...
    image_aspect: Literal["crop", "pad"] = "pad"  # centre crop (stage 1) or pad to a square (stage 2)
    max_length: PositiveWhole = 2048  # tokens of a sample, image tokens included
    on_error: Literal["raise", "skip"] | None = None  # broken rows; default: raise at a bad format, skip bad images
    max_errors: Annotated[Whole, NOT_NEGATIVE] | None = (
        None  # broken rows that a process skips; the next one stops the run
    )
    validation: _ShareOrFile | None = None  # a share of `data`, drawn by `seed`, or a file or folder
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"  # of the computation; trained weights stay fp32
    gradient_checkpointing: Flag = False  # recompute each layer in backward: less memory, more time
    global_batch_size: PositiveWhole = 128  # samples per optimiser step, over all devices
    per_device_batch_size: PositiveWhole = 16  # samples per forward pass; accumulation follows from the two
    epochs: PositiveNumber = 1.0  # passes over the data
    max_steps: PositiveWhole | None = None  # optimiser steps, instead of epochs
    learning_rate: PositiveNumber = 2e-5  # at the end of the warm-up
    projector_learning_rate: PositiveNumber | None = None  # default: learning_rate
    vision_learning_rate: PositiveNumber | None = None  # trains the vision tower, too; default: it is frozen
    vision_layers: PositiveWhole | None = None  # train only this many layers: the last that LLaVA reads
    scheduler: Text = "cosine"  # or linear, constant, constant_with_warmup
    warmup_ratio: Annotated[Number, BELOW_ONE] = 0.03  # share of all steps
    weight_decay: Annotated[Number, NOT_NEGATIVE] = 0.0  # not on biases and norms
    max_grad_norm: PositiveNumber = 1.0  # gradients are clipped to this norm
    lora: Lora | None = None  # default with stage lora: r 128, alpha 256, dropout 0.05
    group_by: Literal["none", "length", "modality"] = (
        "none"  # modality: by length, samples with images apart from text-only ones
    )
    # of the order of samples, new weights and dropout
    seed: Annotated[Whole, NOT_NEGATIVE, rule("must be below 2**32", lambda value: value < 2**32)] = 42
    workers: Annotated[Whole, NOT_NEGATIVE] = 4  # processes that load images; 0: in the training process
    cache: Flag = False  # keep finished samples in memory, for small data
    logging_steps: PositiveWhole = 1  # steps from one line of loss and rates to the next
    save_steps: PositiveWhole | None = None  # steps from one checkpoint to the next; default: none are written
    save_total_limit: PositiveWhole | None = None  # keep only the newest checkpoints
    eval_steps: PositiveWhole | None = None  # default with validation: at the end only
    resume: Flag | PathLike = False  # true: from the newest checkpoint in output_dir; or a checkpoint folder
    report_to: Text | list[Text] = "none"  # trackers that transformers knows: tensorboard, [tensorboard, wandb] ...

    def __post_init__(self) -> None:
        convert_fields(self)
        if self.stage == "lora":
            self.lora = self.lora or Lora()
        tower_and_language = [self.vision_tower, self.language_model]
        if self.model is None and None in tower_and_language:
            raise RecipeError("model: give a LLaVA checkpoint folder, or vision_tower and language_model")
        if self.model is not None and tower_and_language != [None, None]:
            raise RecipeError("model: give either model or vision_tower and language_model, not both")
        if self.stage == "lora" and self.model is None:  # an adapter refers to its base by path
            raise RecipeError(
                "model: stage lora adapts a checkpoint on disk; train stage projector first, use its output"
            )
        if self.stage != "lora" and self.lora is not None:
            raise RecipeError(f"lora: only with stage: lora, not {self.stage}; remove it, or set lora=null")
        if self.stage == "projector" and self.projector_learning_rate is not None:
            raise RecipeError(
                "projector_learning_rate: in stage projector, set learning_rate, and projector_learning_rate=null"
            )
        if self.stage == "projector" and self.vision_learning_rate is not None:
            raise RecipeError(
                "vision_learning_rate: stage projector trains the projector alone; use stage full or lora"
            )
        if self.vision_layers is not None and self.vision_learning_rate is None:
            raise RecipeError("vision_layers: the vision tower is frozen; set vision_learning_rate to train it")
        if self.scheduler not in SCHEDULERS:
            raise RecipeError(f"scheduler: {self.scheduler!r} is not one of {', '.join(SCHEDULERS)}")
        weighted = [source.weight is not None for source in self.data] if isinstance(self.data, list) else [False]
        if not weighted:
            raise RecipeError("data: a mixture needs at least one file")
        if any(weighted) and not all(weighted):
            raise RecipeError(f"data[{weighted.index(False)}].weight: give every source a weight, or none")
        if self.max_errors is not None and self.on_error == "raise":
            raise RecipeError("max_errors: nothing is skipped with on_error: raise")
        if self.eval_steps is not None and self.validation is None:
            raise RecipeError("eval_steps: there is nothing to evaluate on, set validation")
        self.accumulation(1)

    def sources(self) -> list[DataSource]:
        """The data files, each with its image folder filled in."""
        sources = self.data if isinstance(self.data, list) else [DataSource(self.data)]
        return [
            replace(source, image_folder=source.image_folder or self.image_folder or _folder_of(source.path))
            for source in sources
        ]

    def validation_source(self) -> DataSource:
        """The validation data, if it is a file or a folder; of a folder with several splits, `validation`."""
        assert isinstance(self.validation, Path)
        split = None
        if self.validation.is_dir():
            from llava_fast.train.tables import splits  # pyarrow is imported only where it is needed

            split = "validation" if len(splits(self.validation)) > 1 else None
        return DataSource(self.validation, split=split, image_folder=self.sources()[0].image_folder)

    @property
    def assembled_from(self) -> tuple[Path | str, Path | str]:
        """The folders or hub ids of the vision tower and the language model, in a recipe without `model`."""
        assert self.vision_tower is not None and self.language_model is not None  # checked in __post_init__
        return self.vision_tower, self.language_model

    def accumulation(self, world_size: int) -> int:
        """Forward passes per optimiser step: global_batch_size / (per_device_batch_size · world_size)."""
        per_pass = self.per_device_batch_size * world_size
        if self.global_batch_size % per_pass:
            raise RecipeError(
                f"global_batch_size: {self.global_batch_size} is not a multiple of per_device_batch_size "
                f"{self.per_device_batch_size} x {world_size} process{'es' if world_size > 1 else ''}"
            )
        return self.global_batch_size // per_pass

    def check_inputs(self) -> None:
        """Check that every file and folder to be read exists, and every model on the hub.

        Raises:
            RecipeError: naming the key and the path.
        """
        names = "model vision_tower language_model processor image_folder resume".split()
        paths: list[tuple[str, Any, bool]] = [(key, getattr(self, key), True) for key in names]
        for i, source in enumerate(self.data if isinstance(self.data, list) else ()):
            paths += [(f"data[{i}].image_folder", source.image_folder, True), (f"data[{i}].path", source.path, False)]
        for key, path, is_folder in [*paths, ("data", self.data, False), ("validation", self.validation, False)]:
            if isinstance(path, Path) and not (path.is_dir() or (path.is_file() and not is_folder)):
                raise RecipeError(f"{key}: no {'folder' if is_folder else 'file'} {path}")
            if is_folder and isinstance(path, str):
                try:
                    local_folder(path, ())
                except OSError as error:
                    raise RecipeError(f"{key}: {error}") from error

    def check_files(self) -> None:
        """`check_inputs`, and a check that writing to `output_dir` destroys nothing.

        Raises:
            RecipeError: naming the key and the path.
        """
        self.check_inputs()
        out, checkpoint = self.output_dir, self.checkpoint()
        if out.exists() and not out.is_dir():
            raise RecipeError(f"output_dir: {out} is a file")
        if isinstance(self.model, Path) and out.resolve() == self.model.resolve():
            raise RecipeError(f"output_dir: {out} is the model that training starts from")
        if self.resume is True and checkpoint is None:
            finished = f", only a finished model; to train it further, set model={out}" if is_finished(out) else ""
            raise RecipeError(f"resume: no checkpoint-N folder in {out}{finished}")
        if self.resume is False and checkpoints_by_step(out):
            raise RecipeError(
                f"output_dir: {out} holds checkpoints of an earlier run; set resume=true or another output_dir"
            )
        if checkpoint is not None and not (checkpoint / "trainer_state.json").is_file():
            raise RecipeError(f"resume: {checkpoint} is not a training checkpoint (no trainer_state.json)")

    def checkpoint(self) -> Path | None:
        """The checkpoint folder that the run continues from, or None."""
        if isinstance(self.resume, Path):
            return self.resume
        found = checkpoints_by_step(self.output_dir) if self.resume else {}
        return found[max(found)] if found else None

    def how_to_resume(self) -> str:
        """One line for a run that was interrupted: what `resume` would continue from."""
        found = checkpoints_by_step(self.output_dir)
        if found:
            return f"resume=true continues from {found[max(found)]}"
        advice = "" if self.save_steps else "; set save_steps to have checkpoints"
        return f"there is no checkpoint in {self.output_dir} yet, so nothing to resume: start again{advice}"

    def to_yaml(self) -> str:
        """The recipe as YAML with absolute paths; `load_recipe` reads it back."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


def _folder_of(data: Path) -> Path:
    return data if data.is_dir() else data.parent


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value.absolute()) if isinstance(value, Path) else value


def checkpoints_by_step(output_dir: Path) -> dict[int, Path]:
    """The `checkpoint-N` folders, by N."""
    names = {path: path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*") if path.is_dir()}
    return {int(step): path for path, step in names.items() if step.isdigit()}


def is_finished(output_dir: Path) -> bool:
    """Whether a run has written its model to `output_dir`; `config.json` is written last."""
    return (output_dir / "config.json").is_file() and (output_dir / "trainer_state.json").is_file()


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe and apply overrides such as `learning_rate=1e-4` or `lora.r=64`.

    Raises:
        RecipeError: one line that names the file and the key.
    """
    name = Path(path).name.removesuffix(".yaml")
    if not Path(path).exists() and name in shipped():
        raise RecipeError(
            f"{path}: No such file; `llava-fast recipes copy {name}` writes this recipe to train/{name}.yaml"
        )
    return load(Recipe, Path(path), overrides)
