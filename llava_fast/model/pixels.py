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

_NOTE = "normalisation"  # attribute of a tensor of pixels
_QUIETLY = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}


class Normalisation(NamedTuple):
    """Mean and deviation of each channel, for pixels scaled to 0–1."""

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __str__(self) -> str:
        return " and ".join(f"({', '.join(f'{x:.4g}' for x in values)})" for values in self)

    def check_same(self, config: LlavaConfig, whose: object) -> None:
        """ValueError, in one line, when the model of `config` normalises otherwise; `whose` these numbers are."""
        model = pixel_normalisation(config)
        pairs = zip(self.mean + self.std, model.mean + model.std)
        if not all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in pairs):
            raise ValueError(
                f"{whose} normalises pixels with mean and deviation {self}, but the model's config (image_mean, "
                f"image_std) with {model}"
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

    def value(key: str, default: Any) -> Any:
        return default if settings.get(key) is None else settings[key]

    def numbers(key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        given = value(key, default)
        found = given if isinstance(given, (list, tuple)) else [given] * len(default)
        if len(found) != len(default) or not all(type(x) in (int, float) and math.isfinite(x) for x in found):
            raise ValueError(f"{key} is {given!r}, expected {'a number' if len(default) == 1 else 'three numbers'}")
        if 0 in found and key != "image_mean":
            raise ValueError(f"{key} is {given!r}, which cannot be 0")
        return tuple(map(float, found))

    for key in ("do_rescale", "do_normalize"):
        if not isinstance(value(key, True), bool):
            raise ValueError(f"{key} is {settings[key]!r}, expected true or false")
    scale = 255 * numbers("rescale_factor", (1 / 255,))[0] if value("do_rescale", True) else 255.0
    mean, std = numbers("image_mean", CLIP_MEAN), numbers("image_std", CLIP_STD)
    if not value("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
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
    for file_name in ("processor_config.json", "preprocessor_config.json"):  # the first counts, as in transformers
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


def keep_normalisation(config: LlavaConfig, found: tuple[Normalisation, Path] | None) -> None:
    """Put what `read_normalisation` found into a model's config.

    Raises:
        ValueError: when the config has other numbers of its own, or no usable ones.
    """
    own = {key: getattr(config, key, None) for key in ("image_mean", "image_std")}
    if own != {"image_mean": None, "image_std": None}:
        config.image_mean, config.image_std = map(list, folded(own))
        if found is not None:
            found[0].check_same(config, found[1])
    if found is not None:
        config.image_mean, config.image_std = map(list, found[0])


def note_normalisation(pixels: Any, normalisation: Normalisation | None) -> None:
    """Say on a tensor of uint8 pixels what they want to be normalised with; a copy of the tensor has lost it."""
    if isinstance(pixels, torch.Tensor) and normalisation is not None:
        setattr(pixels, _NOTE, normalisation)


def check_noted(pixels: Any, config: LlavaConfig) -> None:
    """ValueError when a processor has noted other numbers on its pixels than those of the model of `config`."""
    if (noted := noted_normalisation(pixels)) is not None:
        noted.check_same(config, "the processor")


def noted_normalisation(pixels: Any) -> Normalisation | None:
    return getattr(pixels, _NOTE, None)
