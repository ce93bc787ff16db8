"""How uint8 pixels are normalised: (pixel / 255 − mean) / deviation, per channel.

The numbers live in the model's config (`image_mean`, `image_std`), read from the preprocessor file beside the weights;
CLIP's where there is none. An image processor's `rescale_factor`, `do_rescale` and `do_normalize` are folded into them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlavaConfig
from transformers.utils import cached_file

from llava_fast.errors import blaming

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Where transformers keeps an image processor's settings; the first file that has them counts, as in transformers.
FILES = ("processor_config.json", "preprocessor_config.json")
_NOTE = "normalisation"  # attribute of a tensor of pixels


class Normalisation(NamedTuple):
    """Mean and deviation of each channel, for pixels scaled to 0–1."""

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def check_same(self, config: LlavaConfig, whose: object) -> None:
        """ValueError, in one line, when the model of `config` normalises otherwise; `whose` these numbers are."""
        model = pixel_normalisation(config)
        if not all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in zip(sum(self, ()), sum(model, ()))):
            raise ValueError(
                f"{whose} normalises pixels with mean {_short(self.mean)} and deviation {_short(self.std)}, but the "
                f"model's config (image_mean, image_std) with {_short(model.mean)} and {_short(model.std)}"
            )


def pixel_normalisation(config: LlavaConfig) -> Normalisation:
    """What a model with this config does to uint8 pixels."""
    mean, std = getattr(config, "image_mean", None), getattr(config, "image_std", None)
    return Normalisation(tuple(mean or CLIP_MEAN), tuple(std or CLIP_STD))


def folded(settings: Mapping[str, Any]) -> Normalisation:
    """The normalisation that does what an image processor with these settings does; CLIP's where they say nothing.

    (pixel · factor − mean) / deviation is (pixel / 255 − mean / s) / (deviation / s) with s = 255 · factor.

    Raises:
        ValueError: naming the key, for values that no pixel can be normalised with.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    rescale, normalise = (_switch(given, key) for key in ("do_rescale", "do_normalize"))
    scale = 255 * _numbers(given, "rescale_factor", (1 / 255,))[0] if rescale else 255.0
    mean = _numbers(given, "image_mean", CLIP_MEAN) if normalise else (0.0,) * 3
    std = _numbers(given, "image_std", CLIP_STD) if normalise else (1.0,) * 3
    for key, values in (("rescale_factor", (scale,)), ("image_std", std)):
        if 0 in values:
            raise ValueError(f"{key} is {given[key]!r}, which cannot be 0")
    if math.isclose(scale, 1):
        return Normalisation(mean, std)
    return Normalisation(tuple(m / scale for m in mean), tuple(s / scale for s in std))


def read_normalisation(name: str | os.PathLike, **hub: Any) -> tuple[Normalisation, Path] | None:
    """The normalisation in the preprocessor file of a directory (or hub name), and the file; None without one.

    Args:
        hub: as transformers takes them (revision, token, subfolder …).

    Raises:
        ValueError: naming file and key, for a damaged file or values of another kind.
    """
    for file_name in FILES:
        file = Path(name) / file_name
        with blaming(file):
            found = cached_file(os.fspath(name), file_name, **_QUIETLY, **hub)
            settings = None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
            if isinstance(settings, dict) and file_name == "processor_config.json":
                settings = settings.get("image_processor")
            if settings is not None:
                if not isinstance(settings, dict):
                    raise ValueError(f"the settings of its image processor are a JSON {type(settings).__name__}")
                return folded(settings), file
    return None


# A repository without such a file, and a network that is not there, are no errors here.
_QUIETLY = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def keep_normalisation(config: LlavaConfig, found: tuple[Normalisation, Path] | None) -> None:
    """Put what `read_normalisation` found into a model's config.

    Raises:
        ValueError: when the config has other numbers of its own, or no usable ones.
    """
    own = {key: getattr(config, key, None) for key in ("image_mean", "image_std")}
    normalisation = folded(own) if any(value is not None for value in own.values()) else None
    if found is not None:
        if normalisation is not None:
            found[0].check_same(config, found[1])
        normalisation = found[0]
    if normalisation is not None:
        config.image_mean, config.image_std = list(normalisation.mean), list(normalisation.std)


def note_normalisation(pixels: torch.Tensor, normalisation: Normalisation) -> None:
    """Say on a tensor of uint8 pixels what they want to be normalised with; copies of it know nothing of that."""
    setattr(pixels, _NOTE, normalisation)


def noted_normalisation(pixels: Any) -> Normalisation | None:
    return getattr(pixels, _NOTE, None)


def _switch(settings: Mapping[str, Any], key: str) -> bool:
    value = settings.get(key, True)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}, expected true or false")
    return value


def _numbers(settings: Mapping[str, Any], key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """Numbers by channel; a single one stands for all channels."""
    value = settings.get(key, default)
    values = list(value) if isinstance(value, (list, tuple)) else [value] * len(default)
    if len(values) != len(default) or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    ):
        raise ValueError(f"{key} is {value!r}, expected {'a number' if len(default) == 1 else 'three numbers'}")
    return tuple(map(float, values))


def _short(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"
