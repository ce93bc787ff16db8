"""Opens a checkpoint in any layout: gives a config in HF's format and tensors under our names, which are read later.

The original code may split a checkpoint: a language model without tower, the tower in a CLIP directory, the projector
of stage 1 in `mm_projector.bin`, other trained weights of a LoRA run in another file. Each is a path, or the hub id of
a repository that has it (see `llava_fast/hub.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import CLIPVisionConfig, LlavaConfig

from llava_fast.checkpoint.layouts import (
    DERIVED,
    EMBEDDINGS,
    HEAD,
    KNOWN_TOWERS,
    PROJECTOR,
    TOWER,
    TOWER_MODULES,
    dtype_of,
    is_original,
    llava_config,
    our_name,
    projector_type,
)
from llava_fast.checkpoint.weights import Stored, find_weights, open_weights, read_json
from llava_fast.errors import blaming
from llava_fast.hub import MODEL, is_id, local_folder
from llava_fast.hub import PROJECTOR as PROJECTOR_FILES
from llava_fast.model.language import SUPPORTED, text_config
from llava_fast.model.pixels import keep_normalisation, read_normalisation


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose tensors are not read yet; they go by our names."""

    path: Path
    layout: str  # "hf" or "original"
    config: LlavaConfig
    weights: dict[str, Stored]


class Pieces(TypedDict):
    """Paths of separate weights: the arguments of `from_pretrained` with these names."""

    vision_tower: str | os.PathLike | None
    mm_projector: str | os.PathLike | None


def open_checkpoint(
    path: Path,
    *,
    vision_tower: str | os.PathLike | None = None,
    mm_projector: str | os.PathLike | None = None,
    settings: Path | None = None,
    trained: dict[str, Stored] | None = None,
    hub: dict[str, Any] | None = None,
) -> OpenCheckpoint:
    """Open a checkpoint folder of either layout, or a bare language model together with `mm_projector`.

    Args:
        vision_tower: CLIP directory or hub id; its weights replace those of a tower in the checkpoint.
        mm_projector: `mm_projector.bin` or `.safetensors` (stage 1), or the directory or hub id that has it; replaces a
            projector in the checkpoint.
        settings: an original `config.json` to use instead of the folder's own (LoRA on a bare language model).
        trained: further tensors, by our names, which replace the checkpoint's.
        hub: arguments of `hub.local_folder` for tower and projector (token, cache_dir, local_files_only).

    Raises:
        OSError: if a file or directory is missing; the message names it, and the argument to pass.
        ValueError: for another kind of checkpoint, a damaged file, or sizes that do not fit.
    """
    file, hub = path / "config.json", hub or {}
    own = read_json(file)
    weights = _by_our_names(open_weights(path)) | (trained or {})
    if mm_projector is not None:
        projector = _projector_file(mm_projector, hub)
        weights = _instead(weights, PROJECTOR, open_projector(projector))
        beside = projector.parent / "config.json"
        bare = own.get("model_type") != "llava" and not is_original(own)
        if settings is None and bare and beside.is_file() and is_original(read_json(beside)):
            settings = beside
    hf = own.get("model_type") == "llava" and not is_original(own)
    if hf:
        config = hf_config(own, file)
        clip = tower = None if vision_tower is None else _named("vision_tower", vision_tower, MODEL, hub)
        if mm_projector is not None or trained:
            config.mm_projector_type = projector_type(weights)
    else:
        flat, where = _flat_config(own, file, settings, weights), settings or file
        if vision_tower is not None:
            clip = tower = _named("vision_tower", vision_tower, MODEL, hub)
            vision = clip_config(clip)
        elif any(name.startswith(TOWER) for name in weights):
            tower, (clip, vision) = None, _shape_of_tower_inside(flat, where, hub)
        else:
            clip = tower = _named_tower(flat, where, MODEL, hub)
            vision = clip_config(clip)
        config = llava_config(flat, vision, where)
        _fit_vocabulary(path, weights, flat["vocab_size"], text_config(config).vocab_size)
    if tower is not None:
        weights = _instead(weights, TOWER, open_tower(tower))
    if config.tie_word_embeddings and HEAD in weights and EMBEDDINGS in weights:
        if not torch.equal(weights[HEAD].read(), weights[EMBEDDINGS].read()):
            raise ValueError(f"{file}: tie_word_embeddings is true, but lm_head and embed_tokens differ")
        del weights[HEAD]
    for place in (path, clip):
        if place is not None:
            keep_normalisation(config, read_normalisation(place))
    return OpenCheckpoint(path, "hf" if hf else "original", config, weights)


def hf_config(own: dict[str, Any], file: Path) -> LlavaConfig:
    """The config in HF's `config.json`; a ValueError names the file."""
    with blaming(file):
        config = LlavaConfig.from_dict(own)
        dtype_of(config.dtype)
        keep_normalisation(config, None)
        return config


def _by_our_names(weights: dict[str, Stored]) -> dict[str, Stored]:
    """Tensors of any layout by our names, without buffers that newer code computes."""
    renamed: dict[str, Stored] = {}
    for key, stored in weights.items():
        if DERIVED.search(key):
            continue
        name = our_name(key)
        if name in renamed:
            raise ValueError(f"{stored.origin} is there twice: {renamed[name].origin}")
        renamed[name] = stored
    return renamed


def _flat_config(own: dict[str, Any], file: Path, settings: Path | None, weights: dict[str, Stored]) -> dict[str, Any]:
    """The original-layout config to use; the config of a bare language model is completed to one."""
    if settings is not None:
        own, file = read_json(settings), settings
    if is_original(own):
        return own
    kind = own.get("model_type")
    if kind not in SUPPORTED:
        raise ValueError(
            f"{file}: model_type is {kind!r}; expected 'llava' (HF), 'llava_llama' or 'llava_mistral' (original)"
        )
    if not any(name.startswith(PROJECTOR) for name in weights):
        raise ValueError(f"{file}: model_type is {kind!r}, a language model alone; pass mm_projector=FILE beside it")
    return {**own, "model_type": f"llava_{kind}", "mm_projector_type": projector_type(weights)}


def _instead(weights: dict[str, Stored], beginning: str, others: dict[str, Stored]) -> dict[str, Stored]:
    """`weights`, with all names that start with `beginning` replaced by `others`."""
    return {name: stored for name, stored in weights.items() if not name.startswith(beginning)} | others


def _fit_vocabulary(path: Path, weights: dict[str, Stored], said: int, wanted: int) -> None:
    """Check that embeddings and head have `said` rows, as in the config, and grow them to `wanted` rows."""
    for name in (EMBEDDINGS, HEAD):
        if name in weights:
            rows = weights[name].shape[0] if weights[name].shape else 0
            if rows != said:
                raise ValueError(f"{path}: {name} has {rows} rows, but config.json says vocab_size {said}")
            weights[name] = weights[name].rows(wanted)


# Projector and tower


def open_projector(file: Path) -> dict[str, Stored]:
    """The projector in `mm_projector.bin` or `.safetensors`, with any prefix before `mm_projector.` in its keys.

    Raises:
        OSError, ValueError: for a file that is missing or damaged, or contains no projector.
    """
    if not file.is_file():
        raise FileNotFoundError(f"mm_projector: no file {file}")
    projector = {name: stored for name, stored in _by_our_names(open_weights(file)).items() if PROJECTOR in name}
    projector = {PROJECTOR + name.partition(PROJECTOR)[2]: stored for name, stored in projector.items()}
    if not projector:
        raise ValueError(f"{file} has no key with 'mm_projector.' in it")
    return projector


def open_tower(folder: Path) -> dict[str, Stored]:
    """The vision tower in a CLIP directory (of the whole model or of its vision model)."""
    # Both `vision_model.encoder…` and `encoder…` are names after `vision_tower.`
    tower = {our_name(f"vision_tower.{key}"): stored for key, stored in open_weights(folder).items()}
    return {
        name: stored for name, stored in tower.items() if name.startswith(TOWER_MODULES) and not DERIVED.search(name)
    }


def clip_config(folder: Path) -> CLIPVisionConfig:
    """The vision config of a CLIP directory."""
    file = folder / "config.json"
    config = read_json(file)
    kind = config.get("model_type")
    if kind == "clip":
        with blaming(file):
            config = {key: value for key, value in config.get("vision_config", {}).items() if key != "model_type"}
    elif kind != "clip_vision_model":
        raise ValueError(f"{file}: model_type is {kind!r}; expected 'clip' or 'clip_vision_model'")
    with blaming(file):
        return CLIPVisionConfig.from_dict(config)


def _named(argument: str, name: str | os.PathLike, weights: tuple[str, ...], hub: dict[str, Any]) -> Path:
    """`hub.local_folder`; an error begins with the argument's name."""
    try:
        return local_folder(name, weights, **hub)
    except OSError as error:
        raise FileNotFoundError(f"{argument}: {error}") from error


def _projector_file(name: str | os.PathLike, hub: dict[str, Any]) -> Path:
    """The file of a projector: the file itself, or the one in a directory or in a repository of the hub."""
    file = Path(name)
    if file.is_file() or not (file.is_dir() or is_id(os.fspath(name))):
        return file
    folder = _named("mm_projector", name, PROJECTOR_FILES, hub)
    return find_weights(folder, "mm_projector") or folder / "mm_projector.bin"


def _named_tower(flat: dict[str, Any], file: Path, weights: tuple[str, ...], hub: dict[str, Any]) -> Path:
    """The CLIP directory that a config names: beside the config, as it is, or as a hub id."""
    name = flat.get("mm_vision_tower")
    try:
        if not isinstance(name, str):
            raise FileNotFoundError(f"expected the directory or hub id of a CLIP model, got {name!r}")
        return beside(name, file.parent) or local_folder(name, weights, **hub)
    except OSError as error:
        raise FileNotFoundError(
            f"{file}: mm_vision_tower: {error}; or pass vision_tower=DIRECTORY of that CLIP model"
        ) from error


def beside(name: str, folder: Path) -> Path | None:
    """The directory of a relative path that a file in `folder` refers to; None if there is none."""
    return folder / name if (folder / name).is_dir() else None


def _shape_of_tower_inside(
    flat: dict[str, Any], file: Path, hub: dict[str, Any]
) -> tuple[Path | None, CLIPVisionConfig]:
    """The directory, if it is here, and the config of a tower whose weights are in the checkpoint."""
    shape = flat.get("mm_vision_config")
    if not isinstance(shape, dict):
        name = flat.get("mm_vision_tower")
        shape = KNOWN_TOWERS.get(name) if isinstance(name, str) else None
    if shape is None:
        clip = _named_tower(flat, file, (), hub)
        return clip, clip_config(clip)
    with blaming(file):
        vision = CLIPVisionConfig.from_dict(shape)
    try:
        return _named_tower(flat, file, (), {**hub, "local_files_only": True}), vision
    except FileNotFoundError:
        return None, vision
