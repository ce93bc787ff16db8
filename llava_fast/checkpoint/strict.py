"""Checks that tensors fit a model: a key that is missing, unexpected or has the wrong shape is a ValueError."""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, PreTrainedModel
from transformers import initialization as init

from llava_fast.checkpoint.layouts import DERIVED, HEAD
from llava_fast.checkpoint.reader import OpenCheckpoint
from llava_fast.errors import blaming
from llava_fast.model.language import text_config
from llava_fast.model.vision import projector_layers, tower_config


def require_complete(path: str | os.PathLike, info: dict[str, Any], allow_mismatch: bool = False) -> None:
    """Raise ValueError, in one line that names the keys, if any is missing, unexpected or has the wrong shape."""
    problems = []
    for what in ("missing", "unexpected"):
        keys = sorted(key for key in info[f"{what}_keys"] if not DERIVED.search(key))
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            problems.append(f"{what} {', '.join(keys[:4])}{more}")
    if not allow_mismatch:
        for key, found, wanted in sorted(info["mismatched_keys"]):
            problems.append(f"{key} has shape {list(found)}, expected {list(wanted)}")
    if problems:
        raise ValueError(f"{path}: the checkpoint does not fit the model: {'; '.join(problems)}")


def require_fit(
    path: str | os.PathLike, found: Mapping[str, Any], wanted: Mapping[str, Any], extra: Set[str] = frozenset()
) -> None:
    """`require_complete` for a dict of tensors; names in `extra` are allowed in addition."""
    misshaped = [(k, found[k].shape, wanted[k].shape) for k in found.keys() & wanted.keys()]
    info = {
        "missing_keys": wanted.keys() - found.keys(),
        "unexpected_keys": found.keys() - wanted.keys() - extra,
        "mismatched_keys": [entry for entry in misshaped if tuple(entry[1]) != tuple(entry[2])],
    }
    require_complete(path, info)


def check_checkpoint(cls: type[PreTrainedModel], opened: OpenCheckpoint) -> None:
    """Raise, before any tensor is read, if the tensors do not fit a model with this config."""
    wanted = model_on_meta(cls, opened.config, opened.path / "config.json", len(opened.weights)).state_dict()
    if opened.config.tie_word_embeddings:
        wanted.pop(HEAD, None)
    require_fit(opened.path, opened.weights, wanted)


def model_on_meta(cls: type[PreTrainedModel], config: LlavaConfig, file: Path, n_tensors: int) -> PreTrainedModel:
    """Build the model on "meta", without memory for parameters; ValueError naming `file` if the config is invalid."""
    with blaming(file), torch.device("meta"), init.no_init_weights():
        layers = (text_config(config).num_hidden_layers, tower_config(config).num_hidden_layers)
        depth = max(projector_layers(config), *layers)
        if depth > n_tensors:  # building so many layers would take too long
            raise ValueError(f"it is of {depth} layers, but there are {n_tensors} tensors")
        return cls(config)
