"""Reads a recipe's values from YAML and the command line; pydantic checks and converts them.

pydantic uses the types of the dataclass's fields. Its errors are reworded to one line with the full key, the expected
type and the value.
"""

from __future__ import annotations

import difflib
import math
import reprlib
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Strict,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)

from llava_fast.hub import is_id

T = TypeVar("T")
_HINTS: dict[type, dict[str, Any]] = {}
_ADAPTERS: dict[tuple[type, str], TypeAdapter[Any]] = {}


class RecipeError(ValueError):
    """A recipe is invalid; the message is one line that names the key."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # file names may contain line breaks


# Types of values


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    try:
        return float(value)  # also for text: YAML 1.1 reads 1e-3 as text
    except OverflowError:
        raise ValueError(f"{show(value)} is too large") from None
    except ValueError:
        return value


def _path(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str) or not value or "\0" in value:
        return value
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:  # a home directory of an unknown user, such as ~nobody
        raise ValueError(f"{error} ({show(value)})") from error
    return info.context / path if isinstance(info.context, Path) else path


def _model(value: Any, info: ValidationInfo) -> Any:
    """A path; or the text itself, if nothing is at that path and it has the form of a hub id."""
    path = _path(value, info)
    return value if isinstance(path, Path) and isinstance(value, str) and not path.exists() and is_id(value) else path


def rule(words: str, holds: Callable[[Any], bool]) -> AfterValidator:
    """A validator: `holds` must be true for a value; `words` describe the rule in the error message."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"{words}, got {show(value) if isinstance(value, int) else value}")
        return value

    return AfterValidator(check)


AT_LEAST_ONE = rule("must be at least 1", lambda value: value >= 1)
POSITIVE = rule("must be positive", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = rule("must not be negative", lambda value: 0 <= value < math.inf)
BELOW_ONE = rule("must be in [0, 1)", lambda value: 0 <= value < 1)

Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), BeforeValidator(_number)]
PathLike = Annotated[Path, Strict(), BeforeValidator(_path)]
# Text that `_model` leaves is a hub id, or no path at all: empty, or with a null character.
_HubId = Annotated[str, StringConstraints(strict=True, pattern=r"^[^\x00]+$")]
ModelName = Annotated[Annotated[Path, Strict()] | _HubId, BeforeValidator(_model)]
PositiveWhole = Annotated[Whole, POSITIVE]
PositiveNumber = Annotated[Number, POSITIVE]


# Reading


def load(cls: type[T], path: Path, overrides: Iterable[str]) -> T:
    """A dataclass from a YAML file, overridden by `key=value`, or `key.key=value` for a nested dataclass.

    Raises:
        RecipeError: one line that names the file and the key.
    """
    with _blaming(path):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(error.strerror or str(error)) from error
        except ValueError as error:  # not text, or not a path
            raise RecipeError(f"not YAML: {error}") from error
        read = _read_yaml(text)
        if not isinstance(read, dict):
            raise RecipeError("a recipe is a mapping of keys to values")
        values = {key: _convert(cls, key, value, base=path.parent) for key, value in read.items()}
    nested: dict[str, Any] = {
        key: member for key, hint in _hints(cls).items() for member in _members(hint) if is_dataclass(member)
    }
    with _blaming("command line"):
        for override in overrides:
            key, equals, text = override.partition("=")
            outer, dot, inner = key.partition(".")
            if not equals:
                raise RecipeError(f"{override!r} is not key=value")
            if not dot or outer not in _hints(cls):
                values[outer] = _convert(cls, outer, _typed_in(cls, outer, text), base=Path.cwd())
            elif outer in nested:
                value = _convert(nested[outer], inner, _typed_in(nested[outer], inner, text), f"{outer}.")
                values[outer] = replace(values.get(outer) or nested[outer](), **{inner: value})
            else:
                only = f"only {', '.join(nested)} has keys of its own"
                raise RecipeError(f"{key}: {outer} is set as a whole, {outer}=…; {only}")
    with _blaming(path):
        missing = [
            name for name in _hints(cls) if not hasattr(cls, name) and name not in values
        ]  # fields without a default
        if missing:
            raise RecipeError(f"missing key {missing[0]!r}")
        return cls(**values)


@contextmanager
def _blaming(where: str | Path) -> Iterator[None]:
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _read_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise RecipeError("not YAML: nested too deeply") from error
    except Exception as error:  # PyYAML's constructors raise ValueError, KeyError, AttributeError ...
        raise RecipeError(f"not YAML: {error}") from error


def _typed_in(cls: type, key: str, text: str) -> Any:
    """Command-line text parsed as YAML; if `key` does not accept that value but takes text or a path, the raw text."""
    try:
        value = _read_yaml(text)
        if key in _hints(cls):
            _ADAPTERS[cls, key].validate_python(value)
    except RecipeError:
        return text
    except ValidationError as error:
        wrong_in_itself = any(found["type"] == "value_error" or 0 in found["loc"] for found in error.errors())
        takes_text = {str, Path} & set(_members(_hints(cls)[key]))
        return text if takes_text and not wrong_in_itself else value
    return value


# Converting


def convert_fields(instance: Any, prefix: str = "") -> None:
    """Convert all fields of a dataclass by their types, in place."""
    for key in _hints(type(instance)):
        setattr(instance, key, _convert(type(instance), key, getattr(instance, key), prefix))


def _convert(cls: type, key: Any, value: Any, prefix: str = "", base: Path | None = None) -> Any:
    """`value` converted to the type of a key of `cls`; paths are relative to `base`."""
    if key not in _hints(cls):
        raise RecipeError(_unknown(f"{prefix}{key}", cls))
    try:
        return _ADAPTERS[cls, key].validate_python(value, context=base)
    except ValidationError as error:
        raise _in_our_words(f"{prefix}{key}", _hints(cls)[key], error) from None


def _hints(cls: type) -> dict[str, Any]:
    """The fields' types; the first call builds their pydantic validators."""
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls)
        for key, hint in get_type_hints(cls, include_extras=True).items():
            _ADAPTERS[cls, key] = TypeAdapter(hint)
    return _HINTS[cls]


def _in_our_words(key: str, hint: Any, error: ValidationError) -> RecipeError:
    """Reword one of pydantic's errors: an unknown key first, then a broken rule, then the most nested wrong type."""
    rank = {"unexpected_keyword_argument": 0, "invalid_key": 0, "value_error": 1}
    found = min(error.errors(), key=lambda error: (rank.get(error["type"], 2), -len(error["loc"])))
    is_unknown = rank.get(found["type"]) == 0
    for step in found["loc"][: -1 if is_unknown else None]:
        nested = _nested(hint)
        if isinstance(step, int):
            key, hint = f"{key}[{step}]", nested
        elif nested is not None and step in _hints(nested):  # not pydantic's name of a union member
            key, hint = f"{key}.{step}", _hints(nested)[step]
    if is_unknown:
        return RecipeError(_unknown(f"{key}.{found['loc'][-1]}", _nested(hint)))
    if found["type"] == "missing":
        outer, _, name = key.rpartition(".")
        return RecipeError(f"{outer}: missing key {name!r}")
    if found["type"] == "value_error":  # from our own validators; those of a nested dataclass name its key themselves
        return RecipeError(f"{key}{'.' if is_dataclass(hint) else ': '}{found['ctx']['error']}")
    return RecipeError(f"{key}: expected {_describe(hint)}, got {show(found['input'])}")


def _unknown(key: str, cls: type) -> str:
    prefix, dot, name = key.rpartition(".")
    nearest = difflib.get_close_matches(name[:100], _hints(cls), n=1, cutoff=0)
    return f"unknown key {show(key)}; the nearest known key is {prefix + dot + nearest[0]!r}"


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _nested(hint: Any) -> Any:
    """The dataclass in a type, which may be optional or a list of it; else None."""
    inner = (get_args(member)[0] if get_origin(member) is list else member for member in _members(hint))
    return next((member for member in inner if is_dataclass(member)), None)


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    if Path in _members(hint):
        names[str] = "a hub id"
    words: list[str] = []
    for member in _members(hint):
        if member is type(None):
            words.append("null")
        elif get_origin(member) is Literal:
            words += get_args(member)
        else:
            nested = _nested(member)
            if nested is None:
                words.append(names.get(member) or "a list of text")
            else:
                mapping = "a list of mappings" if get_origin(member) is list else "a mapping"
                words.append(f"{mapping} with {', '.join(_hints(nested))}")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def show(value: Any) -> str:
    """A shortened `repr`: YAML aliases can expand a few bytes to a list of billions of items."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxstring, shown.maxother, shown.maxlong = 2, 80, 80, 40
    return shown.repr(value)
