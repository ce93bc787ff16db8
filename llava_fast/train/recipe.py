"""A training recipe: one dataclass, read from YAML, changed from the command line by `key=value`.

A recipe is checked completely before anything is loaded or written: unknown keys, wrong types and
contradicting values when it is read (`RecipeError`, one line), files and folders by `check_files`.

Relative paths in a recipe file are relative to that file; on the command line and in Python to the
working directory.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

_FOLDERS = ("model", "vision_tower", "language_model", "processor", "image_folder", "resume")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line that names the key."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # names of files may hold line breaks


@dataclass
class Lora:
    """LoRA on every linear layer of the language model except `lm_head`; defaults are LLaVA-1.5's."""

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05

    def __post_init__(self) -> None:
        _convert_fields(self, "lora.")
        _require("lora.r", self.r > 0, "must be at least 1", self.r)
        _require("lora.alpha", self.alpha > 0, "must be at least 1", self.alpha)
        _require("lora.dropout", 0 <= self.dropout < 1, "must be in [0, 1)", self.dropout)


@dataclass
class DataSource:
    """One data file of a mixture; see `mixture.py` for what sampling and weights mean."""

    path: Path  # LLaVA's conversations, JSON list or JSONL
    image_folder: Path | None = None  # default: the recipe's image_folder, or else the folder of `path`
    sampling: Literal["first", "last", "random", "repeat"] = "first"
    count: int | str | None = None  # rows, or a percentage of the file such as 10%; default: all of them
    weight: float | None = None  # instead of count: the share of the mixture, beside the other sources' weights

    def __post_init__(self) -> None:
        _convert_fields(self)
        if isinstance(self.count, str) and not re.fullmatch(r"\d{1,9}(\.\d{1,9})?%", self.count):
            raise RecipeError(f"count: expected a number of rows or a percentage such as 10%, got {_show(self.count)}")
        rows = self.count if isinstance(self.count, int) else self.rows(10**9)
        _require("count", 0 < rows < 2**40, "must be positive", self.count)
        in_range = self.weight is None or 1e-6 <= self.weight <= 1e6
        _require("weight", in_range, "must be from 1e-6 to 1e6", self.weight)
        if self.count is not None and self.weight is not None:
            raise RecipeError("weight: give either count or weight, not both")
        if self.sampling == "repeat" and self.count is None and self.weight is None:
            raise RecipeError("sampling: repeat needs a count, such as 300%, or a weight")

    def rows(self, size: int) -> int:
        """The rows to take of a file of `size` rows; a percentage is rounded up."""
        if self.count is None:
            return size
        if isinstance(self.count, int):
            return self.count
        return math.ceil(size * Fraction(self.count[:-1]) / 100)


@dataclass
class Recipe:
    """Everything a training run depends on; `None` means off, or the default named beside it.

    Raises:
        RecipeError: a value of the wrong type, out of range, or in contradiction with another one.
    """

    stage: Literal["projector", "full", "lora"]  # what trains: LLaVA's stage 1, stage 2, stage 2 with LoRA
    data: Path | list[DataSource]  # LLaVA's conversations, JSON list or JSONL; or a mixture of several files
    output_dir: Path  # the trained model and its processor; checkpoint-N folders below it
    model: Path | None = None  # a LLaVA checkpoint folder, or else the next two
    vision_tower: Path | None = None  # a CLIP folder
    language_model: Path | None = None  # a Llama folder with its tokenizer
    processor: Path | None = None  # a processor folder; default: the model's own
    image_folder: Path | None = None  # what image paths are relative to; default: the folder of the data file
    template: str = "v1"  # conversation style: v1, plain (stage 1), llava_llama_2 ...
    image_aspect: Literal["crop", "pad"] = "pad"  # centre crop (stage 1) or pad to a square (stage 2)
    max_length: int = 2048  # tokens of a sample, image tokens included
    on_error: Literal["raise", "skip"] | None = None  # broken rows; default: raise at a bad format, skip bad images
    max_errors: int | None = None  # broken rows to skip, in each process, before the run stops
    validation: float | Path | None = None  # a share of `data` held out by `seed`, or another data file
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"  # of the computation; trained weights stay fp32
    gradient_checkpointing: bool = False
    global_batch_size: int = 128  # samples per optimiser step, over all devices
    per_device_batch_size: int = 16  # samples per forward pass; accumulation follows from the two
    epochs: float = 1.0
    max_steps: int | None = None  # optimiser steps, instead of epochs
    learning_rate: float = 2e-5
    projector_learning_rate: float | None = None  # default: learning_rate
    scheduler: str = "cosine"
    warmup_ratio: float = 0.03  # share of all steps
    weight_decay: float = 0.0  # not on biases and norms
    max_grad_norm: float = 1.0
    lora: Lora | None = None  # default with stage lora: r 128, alpha 256, dropout 0.05
    group_by: Literal["none", "length", "modality"] = "none"  # modality: length within pictures / text only
    seed: int = 42
    workers: int = 4  # processes that load images; 0: in the training process
    cache: bool = False  # keep finished samples in memory, for small data
    logging_steps: int = 1
    save_steps: int | None = None  # a checkpoint every so many steps
    save_total_limit: int | None = None  # keep only the newest checkpoints
    eval_steps: int | None = None  # default with validation: at the end only
    resume: bool | Path = False  # true: from the newest checkpoint in output_dir; or a checkpoint folder
    report_to: str = "none"  # a tracker that transformers knows: tensorboard, wandb ...

    def __post_init__(self) -> None:
        _convert_fields(self)
        if self.stage == "lora":
            self.lora = self.lora or Lora()
        self._check_values()

    def _check_values(self) -> None:
        parts = [self.vision_tower, self.language_model]
        if self.model is None and None in parts:
            raise RecipeError("model: give a LLaVA checkpoint folder, or vision_tower and language_model")
        if self.model is not None and parts != [None, None]:
            raise RecipeError("model: give either model or vision_tower and language_model, not both")
        if self.stage == "lora" and self.model is None:
            # An adapter refers to its base by path, so the base must be on disk.
            raise RecipeError(
                "model: stage lora adapts a checkpoint on disk; train stage projector first, use its output"
            )
        if self.stage != "lora" and self.lora is not None:
            raise RecipeError(f"lora: only with stage: lora, not {self.stage}")
        if self.stage == "projector" and self.projector_learning_rate is not None:
            raise RecipeError("projector_learning_rate: in stage projector, set learning_rate")
        if self.scheduler not in SCHEDULERS:
            raise RecipeError(f"scheduler: {self.scheduler!r} is not one of {', '.join(SCHEDULERS)}")
        for key in (
            "max_length global_batch_size per_device_batch_size max_steps logging_steps save_steps "
            "save_total_limit eval_steps epochs learning_rate projector_learning_rate max_grad_norm"
        ).split():
            value = getattr(self, key)
            _require(key, value is None or 0 < value < math.inf, "must be positive", value)
        for key in ("weight_decay", "workers", "seed"):
            value = getattr(self, key)
            _require(key, 0 <= value < math.inf, "must not be negative", value)
        _require("warmup_ratio", 0 <= self.warmup_ratio < 1, "must be in [0, 1)", self.warmup_ratio)
        if isinstance(self.validation, float):
            _require("validation", 0 < self.validation < 1, "a share must be in (0, 1)", self.validation)
        if isinstance(self.data, list):
            self._check_mixture(self.data)
        _require("seed", self.seed < 2**32, "must be below 2**32", self.seed)
        if self.max_errors is not None:
            _require("max_errors", self.max_errors >= 0, "must not be negative", self.max_errors)
            if self.on_error == "raise":
                raise RecipeError("max_errors: nothing is skipped with on_error: raise")
        if self.eval_steps is not None and self.validation is None:
            raise RecipeError("eval_steps: there is nothing to evaluate on, set validation")
        self.accumulation(1)

    @staticmethod
    def _check_mixture(sources: list[DataSource]) -> None:
        if not sources:
            raise RecipeError("data: a mixture needs at least one file")
        weighted = [source.weight is not None for source in sources]
        if any(weighted) and not all(weighted):
            raise RecipeError(f"data[{weighted.index(False)}].weight: give every source a weight, or none")

    def sources(self) -> list[DataSource]:
        """The data files, each with the image folder that is meant."""
        sources = self.data if isinstance(self.data, list) else [DataSource(self.data)]
        return [
            replace(source, image_folder=source.image_folder or self.image_folder or source.path.parent)
            for source in sources
        ]

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
        """Check that every file and folder to be read exists.

        Raises:
            RecipeError: naming the key and the path.
        """
        folders = {key: getattr(self, key) for key in _FOLDERS}
        files = {"data": self.data, "validation": self.validation}
        if isinstance(self.data, list):
            for i, source in enumerate(self.data):
                files[f"data[{i}].path"] = source.path
                folders[f"data[{i}].image_folder"] = source.image_folder
        for key, path in folders.items():
            if isinstance(path, Path) and not path.is_dir():
                raise RecipeError(f"{key}: no folder {path}")
        for key, path in files.items():
            if isinstance(path, Path) and not path.is_file():
                raise RecipeError(f"{key}: no file {path}")

    def check_files(self) -> None:
        """`check_inputs`, and that `output_dir` can be written without loss.

        Raises:
            RecipeError: naming the key and the path.
        """
        self.check_inputs()
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise RecipeError(f"output_dir: {self.output_dir} is a file")
        if self.model is not None and self.output_dir.resolve() == self.model.resolve():
            raise RecipeError(f"output_dir: {self.output_dir} is the model that training starts from")
        checkpoint = self.checkpoint()
        if self.resume is True and checkpoint is None:
            raise RecipeError(f"resume: no checkpoint-N folder in {self.output_dir}")
        if self.resume is False and newest_checkpoint(self.output_dir) is not None:
            raise RecipeError(
                f"output_dir: {self.output_dir} holds checkpoints of an earlier run; "
                "set resume=true or another output_dir"
            )
        if checkpoint is not None and not (checkpoint / "trainer_state.json").is_file():
            raise RecipeError(f"resume: {checkpoint} is not a training checkpoint (no trainer_state.json)")

    def checkpoint(self) -> Path | None:
        """The checkpoint folder that the run continues from, or None."""
        if isinstance(self.resume, Path):
            return self.resume
        return newest_checkpoint(self.output_dir) if self.resume else None

    def to_yaml(self) -> str:
        """The recipe as YAML with absolute paths; `load_recipe` reads it back."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value.absolute()) if isinstance(value, Path) else value


def newest_checkpoint(folder: Path) -> Path | None:
    """The `checkpoint-N` folder with the largest N, or None."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe and apply overrides such as `learning_rate=1e-4` or `lora.r=64`.

    Raises:
        RecipeError: one line that names the file and the key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # no text, or no path
        raise RecipeError(f"{path}: not YAML: {error}") from error
    try:
        values = _read_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    values = _typed(Recipe, values, str(path), base=path.parent)
    for override in overrides:
        _override(values, override)
    missing = [f.name for f in fields(Recipe) if f.default is MISSING and f.name not in values]
    if missing:
        raise RecipeError(f"{path}: missing key {missing[0]!r}")
    try:
        return Recipe(**values)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _read_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise RecipeError("not YAML: nested too deeply") from error
    except Exception as error:  # PyYAML's constructors raise all sorts: ValueError, KeyError, AttributeError ...
        raise RecipeError(f"not YAML: {error}") from error


def _override(values: dict[str, Any], override: str) -> None:
    """Set one command-line `key=value` (`lora.key=value` for a nested one) in `values`."""
    where = "command line"
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"{where}: {override!r} is not key=value")
    outer, dot, inner = key.partition(".")
    if not dot:
        values.update(_typed(Recipe, {key: _scalar(Recipe, key, text)}, where, Path.cwd()))
    elif outer == "lora":
        nested = _typed(Lora, {inner: _scalar(Lora, inner, text)}, where, prefix="lora.")
        values["lora"] = {**(values.get("lora") or {}), **nested}
    elif outer in get_type_hints(Recipe):
        raise RecipeError(f"{where}: {key}: {outer} is set as a whole, {outer}=…; only lora has keys of its own")
    else:
        raise RecipeError(f"{where}: {_unknown(outer, Recipe)}")


def _scalar(cls: type, key: str, text: str) -> Any:
    """Command-line text as a YAML value, or as it was typed where `key` holds text or a path."""
    hint = get_type_hints(cls).get(key, str)
    try:
        value = _read_yaml(text)
    except RecipeError:
        return text
    if isinstance(value, list) and list in map(get_origin, _members(hint)):
        return value
    return text if {str, Path} & set(_members(hint)) and not _fits(value, hint) else value


def _typed(
    cls: type, values: Mapping[str, Any], where: str, base: Path | None = None, prefix: str = ""
) -> dict[str, Any]:
    """`values` with every key known to dataclass `cls` and every value of its type."""
    hints = get_type_hints(cls)
    typed = {}
    for key, value in values.items():
        if key not in hints:
            raise RecipeError(f"{where}: {_unknown(f'{prefix}{key}', cls)}")
        nested = next((member for member in _members(hints[key]) if is_dataclass(member)), None)
        if nested is not None and isinstance(value, Mapping):
            typed[key] = _typed(nested, value, where, base, f"{key}.")
        else:
            try:
                typed[key] = _convert(f"{prefix}{key}", value, hints[key], base)
            except RecipeError as error:
                raise RecipeError(f"{where}: {error}") from error
    return typed


def _unknown(key: str, cls: type) -> str:
    prefix, dot, name = key.rpartition(".")
    nearest = difflib.get_close_matches(name[:100], [f.name for f in fields(cls)], n=1, cutoff=0)
    return f"unknown key {_show(key)}; the nearest known key is {prefix + dot + nearest[0]!r}"


def _build(cls: type, values: Mapping[str, Any], key: str, base: Path | None) -> Any:
    """An item of a list: dataclass `cls`, with errors that name `key`, such as `data[1]`, and the key in it."""
    hints = get_type_hints(cls)
    typed = {}
    for name, value in values.items():
        if name not in hints:
            raise RecipeError(_unknown(f"{key}.{name}", cls))
        typed[name] = _convert(f"{key}.{name}", value, hints[name], base)
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in typed]
    if missing:
        raise RecipeError(f"{key}: missing key {missing[0]!r}")
    try:
        return cls(**typed)
    except RecipeError as error:
        raise RecipeError(f"{key}.{error}") from error


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _convert_fields(instance: Any, prefix: str = "") -> None:
    hints = get_type_hints(type(instance))
    for field in fields(instance):
        key = field.name
        setattr(instance, key, _convert(f"{prefix}{key}", getattr(instance, key), hints[key]))


def _convert(key: str, value: Any, hint: Any, base: Path | None = None) -> Any:
    """`value` as a member of `hint`: text may become a number or a path, a mapping a dataclass."""
    for member in _members(hint):
        if _fits(value, member):
            return _float(key, value) if member is float else value
    for member in _members(hint):
        if is_dataclass(member) and isinstance(value, Mapping):
            return member(**_typed(member, value, key, base, f"{key}."))
        if get_origin(member) is list and isinstance(value, Sequence) and not isinstance(value, str):
            (inner,) = get_args(member)
            return [_convert_item(f"{key}[{i}]", item, inner, base) for i, item in enumerate(value)]
        if member is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                return float(value)
            except ValueError:
                continue
        if member is Path and isinstance(value, str) and value and "\0" not in value:
            try:
                path = Path(value).expanduser()
            except RuntimeError as error:  # ~nobody
                raise RecipeError(f"{key}: {error} ({_show(value)})") from error
            return base / path if base is not None else path
    raise RecipeError(f"{key}: expected {_describe(hint)}, got {_show(value)}")


def _convert_item(key: str, value: Any, cls: type, base: Path | None) -> Any:
    if isinstance(value, cls):
        return value
    if isinstance(value, Mapping):
        return _build(cls, value, key, base)
    raise RecipeError(f"{key}: expected {_describe(cls)}, got {_show(value)}")


def _float(key: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise RecipeError(f"{key}: {_show(value)} is too large") from None


def _show(value: Any) -> str:
    """`repr`, cut short: aliases make a few bytes of YAML a list of billions."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxstring, shown.maxother, shown.maxlong = 2, 80, 80, 40
    return shown.repr(value)


def _fits(value: Any, hint: Any) -> bool:
    if hint is None or hint is type(None):
        return value is None
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, member) for member in get_args(hint))
    if get_origin(hint) is list:
        return False  # its items are to be looked at, by `_convert`
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    words = []
    for member in _members(hint):
        if member is type(None):
            words.append("null")
        elif get_origin(member) is Literal:
            words.extend(get_args(member))
        elif get_origin(member) is list:
            words.append("a list of mappings with " + ", ".join(f.name for f in fields(get_args(member)[0])))
        else:
            words.append(names.get(member) or f"a mapping with {', '.join(f.name for f in fields(member))}")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _require(key: str, holds: bool, rule: str, value: Any) -> None:
    if not holds:
        raise RecipeError(f"{key}: {rule}, got {_show(value) if isinstance(value, int) else value}")
