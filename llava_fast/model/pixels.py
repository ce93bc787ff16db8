"""Reads mean and deviation of uint8 pixels from the preprocessor file into the config (`image_mean`, `image_std`).

If neither the file nor the config has them, CLIP's are used.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import LlavaConfig
from transformers.utils import cached_file

from llava_fast.errors import blaming
from llava_fast.ops.patch_embed import Normalisation, check_same, folded

_QUIETLY = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}


def read_normalisation(name: str | os.PathLike, **hub: Any) -> tuple[Normalisation, Path] | None:
    """The normalisation in the preprocessor file of a directory (or hub name), and the file; None without one.

    Args:
        hub: transformers' hub arguments (revision, token, subfolder …).

    Raises:
        ValueError: naming file and key, for a damaged file or values of the wrong type.
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
        ValueError: if the config already has different numbers, or invalid ones.
    """
    own = {key: getattr(config, key, None) for key in ("image_mean", "image_std")}
    if own != {"image_mean": None, "image_std": None}:
        model = folded(own)
        config.image_mean, config.image_std = map(list, model)
        if found is not None:
            check_same(found[0], found[1], model)
    if found is not None:
        config.image_mean, config.image_std = map(list, found[0])
