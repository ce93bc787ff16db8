"""Loads LoRA adapters of the original code and of peft, with the key names of any transformers version.

    original        adapter_config.json, adapter_model.*, config.json (llava_llama), non_lora_trainables.bin; keys
                    base_model.model.model.layers.N.*; the base is a bare language model or an original LLaVA
    HF before 4.52  base_model.model.language_model.model.layers.N.*
    HF since        base_model.model.model.language_model.layers.N.*      (ours, too)

peft is imported only in this file, and only if there is an adapter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llava_fast.checkpoint.layouts import LANGUAGE, hf_names, is_original, original_name, our_name
from llava_fast.checkpoint.reader import OpenCheckpoint, Pieces, beside, open_checkpoint
from llava_fast.checkpoint.strict import require_fit
from llava_fast.checkpoint.weights import Stored, open_weights, read_json
from llava_fast.errors import blaming
from llava_fast.hub import local_folder

SETTINGS, TRAINED = "adapter_config.json", "non_lora_trainables.bin"
PREFIX = "base_model.model."


def is_adapter(path: str | os.PathLike) -> bool:
    return (Path(path) / SETTINGS).is_file()


def is_original_adapter(folder: Path) -> bool:
    config = folder / "config.json"
    return (folder / TRAINED).is_file() or (config.is_file() and is_original(read_json(config)))


def base_of(folder: Path, base_model: str | os.PathLike | None, hub: dict[str, Any]) -> str:
    """The base model's directory or hub id; its files are on this machine then.

    Raises:
        ValueError: if the adapter does not name a base model.
        FileNotFoundError: if there is no such model.
    """
    if base_model is not None:
        try:
            local_folder(base_model, **hub)
        except OSError as error:
            raise FileNotFoundError(f"base_model: {error}") from error
        return os.fspath(base_model)
    file = folder / SETTINGS
    name = read_json(file).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ValueError(f"{file} names no base model (base_model_name_or_path); pass base_model=DIRECTORY")
    if found := beside(name, folder):
        return str(found)
    try:
        local_folder(name, **hub)
    except OSError as error:
        raise FileNotFoundError(f"{file}: base_model_name_or_path: {error}; or pass base_model=DIRECTORY") from error
    return name


def open_original_base(
    folder: Path, base_model: str | os.PathLike | None, pieces: Pieces, hub: dict[str, Any]
) -> OpenCheckpoint:
    """One checkpoint of base model, tower, and the projector that the original LoRA run in `folder` trained in full."""
    settings = folder / "config.json"
    if not settings.is_file():
        raise FileNotFoundError(f"{settings} is missing: it is the config of the model that was trained")
    base = local_folder(base_of(folder, base_model, hub), **hub)
    trained = _non_lora_trainables(folder / TRAINED) if (folder / TRAINED).is_file() else {}
    return open_checkpoint(base, settings=settings, trained=trained, hub=hub, **pieces)


def _non_lora_trainables(file: Path) -> dict[str, Stored]:
    found = open_weights(file)
    keys = {key: key.removeprefix("base_model.") for key in found}
    if any(key.startswith("model.model.") for key in keys.values()):
        keys = {key: name.removeprefix("model.") for key, name in keys.items()}
    return {our_name(name): found[key] for key, name in keys.items()}


def apply_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """`model` wrapped by peft, with the adapter in `folder` in place; a `PeftModel`.

    Raises:
        ValueError: if keys do not fit the model; the message names them.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    weights, foreign = _adapter_weights(folder)
    with blaming(folder / SETTINGS):
        settings = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True
        if foreign:
            _translate(settings, model, language_only=is_original_adapter(folder))
            if not settings.target_modules:
                raise ValueError(f"target_modules fit no layer of {model.name_or_path}")
        base = settings.base_model_name_or_path
        settings.base_model_name_or_path = model.name_or_path  # otherwise peft sets it with a warning
        wrapped = get_peft_model(model, settings)
        settings.base_model_name_or_path = base
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # If the adapter covers embeddings or head, peft also saves that layer of the base model.
    require_fit(folder, weights, wanted, extra=wrapped.state_dict().keys())
    set_peft_model_state_dict(wrapped, weights)
    return wrapped.eval()


def _adapter_weights(folder: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The adapter's tensors under our names, and whether names in the file were different."""
    weights, foreign = {}, False
    for key, stored in open_weights(folder, "adapter_model").items():
        name = PREFIX + our_name(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else key
        foreign |= name != key
        weights[name] = stored.read()
    return weights, foreign


def _translate(settings: Any, model: nn.Module, language_only: bool) -> None:
    """Translate module names in peft's settings from another version's to ours."""
    from peft.tuners.tuners_utils import check_target_module_exists

    def aliases(name: str) -> list[str]:
        dotted = f"{name}."  # prefixes in the table end with a dot
        if language_only:
            return [original_name(dotted)[:-1]] if dotted.startswith((LANGUAGE, "lm_head.")) else []
        return [alias[:-1] for alias in hf_names(dotted)]

    settings.target_modules = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)
        # For an excluded module peft returns a falsy object.
        and any(check_target_module_exists(settings, alias) for alias in aliases(name))
    }

    def renamed(names: Mapping[str, Any]) -> dict[str, Any]:
        return {our_name(f"{name}.").removesuffix("."): value for name, value in names.items()}

    if settings.modules_to_save:
        settings.modules_to_save = list(renamed(dict.fromkeys(settings.modules_to_save)))
    for patterns in ("rank_pattern", "alpha_pattern"):
        if getattr(settings, patterns, None):
            setattr(settings, patterns, renamed(getattr(settings, patterns)))
