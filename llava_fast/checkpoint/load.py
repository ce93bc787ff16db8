"""`from_pretrained` for every checkpoint layout; with `save.py` and `assemble.py` it makes `CheckpointMixin`.

Loading is strict: a key that is missing, unexpected or has the wrong shape is an error that names it. Weights are
safetensors, or `.bin` files, which are read without running code from them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_fast.checkpoint.adapter import apply_adapter, base_of, is_adapter, is_original_adapter, open_original_base
from llava_fast.checkpoint.assemble import AssembleMixin
from llava_fast.checkpoint.layouts import HEAD, KEY_MAPPING, is_original, our_name
from llava_fast.checkpoint.reader import OpenCheckpoint, Pieces, hf_config, open_checkpoint
from llava_fast.checkpoint.save import SaveMixin
from llava_fast.checkpoint.strict import check_checkpoint, model_on_meta, require_complete
from llava_fast.checkpoint.weights import find_weights, open_weights, read_json
from llava_fast.hub import MODEL, local_folder
from llava_fast.model.pixels import keep_normalisation, read_normalisation
from llava_fast.model.pretrained import LlavaPreTrainedModel
from llava_fast.model.vision import feature_layers

_HUB = ("cache_dir", "force_download", "token", "revision", "local_files_only")
# With these arguments transformers chooses the weight files itself.
_ITS_OWN_FILES = {"gguf_file", "state_dict", "variant"}


class _FilesMixin(LlavaPreTrainedModel):
    """transformers' own `from_pretrained`, with strict checks."""

    @classmethod
    def _from_files(cls, label: str | os.PathLike, path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """Load files with HF names; messages begin with `label`."""
        with_info = kwargs.pop("output_loading_info", False)
        allow_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        # transformers' own error for a wrong shape does not name the key, so sizes are checked here instead.
        loaded: Any = super().from_pretrained(
            path, *args, key_mapping=KEY_MAPPING, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, info = loaded
        network = getattr(model, cls.base_model_prefix, model)
        unexpected = set(info["unexpected_keys"]) - ({HEAD} if network is model else set())
        require_complete(label, {**info, "unexpected_keys": unexpected}, allow_mismatch)
        # Keys were renamed at loading; transformers must not rename them again at saving.
        model._weight_conversions = None
        # Loading replaces the parameters, so those that the constructor froze must be frozen again.
        network.vision_tower.freeze_unused(feature_layers(model.config))
        return (model, info) if with_info else model

    @classmethod
    def _in_hf_layout(
        cls, name: str | os.PathLike, folder: Path, hub: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint in HF's layout from its folder; by its name, where transformers chooses the files."""
        source, hub = (name, hub) if kwargs.keys() & _ITS_OWN_FILES else (folder, {})
        found = read_normalisation(source, subfolder=kwargs.get("subfolder", ""), **hub)
        model = cls._from_files(source, source, *args, **hub, **kwargs)
        keep_normalisation((model[0] if isinstance(model, tuple) else model).config, found)
        return _named(name, model)


class BareCheckpointMixin(_FilesMixin):
    """Loading and saving of the network without its head, for `LlavaModel`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """Load the network from a checkpoint in HF's layout, a directory or hub id, with or without a head.

        Raises:
            ValueError: for keys that are missing or unexpected, or another layout; the message names them.
            OSError: if there is no such model here or on the hub, the hub cannot be reached, or a file is missing.
        """
        name, hub = pretrained_model_name_or_path, {key: kwargs.pop(key) for key in _HUB if key in kwargs}
        if name is None:
            return cls._from_files("state_dict", None, *args, **kwargs)
        folder = _folder(name, hub, kwargs)
        file = folder / kwargs.get("subfolder", "") / "config.json"
        if is_adapter(folder) or is_original(read_json(file)):
            raise ValueError(f"{file}: use LlavaForConditionalGeneration.from_pretrained(…).model for this layout")
        return cls._in_hf_layout(name, folder, hub, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        *args: Any,
        save_original_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """As transformers' `LlavaModel`: in the files the tower has names that every version of transformers loads;
        with `save_original_format=False` those that transformers ≥ 5.6 has in memory."""
        weights = self.state_dict() if state_dict is None else state_dict
        # Of a model with adapters (`add_adapter`), transformers writes these alone, in peft's format.
        if save_original_format and not getattr(self, "_hf_peft_config_loaded", False):
            weights = {
                name.replace("vision_tower.", "vision_tower.vision_model.", 1): weight
                for name, weight in weights.items()
            }
        kwargs["save_original_format"] = save_original_format
        super().save_pretrained(save_directory, is_main_process, weights, *args, **kwargs)


class CheckpointMixin(_FilesMixin, SaveMixin, AssembleMixin):
    """Loading, saving and assembling checkpoints, for `LlavaForConditionalGeneration`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        vision_tower: str | os.PathLike | None = None,
        mm_projector: str | os.PathLike | None = None,
        base_model: str | os.PathLike | None = None,
        merge_adapter: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a model as `transformers.PreTrainedModel.from_pretrained` does, in any LLaVA layout.

        Names of models are directories, or ids on the hub, of which only the needed files are downloaded. Also loads
        a checkpoint in the original layout (`model_type` llava_llama), one with an `adapter_config.json` (LoRA, of the
        original code or of peft), and a bare language model with `mm_projector`. `attn_implementation` is only noted in
        the config: attention always uses key ranges. Mean and deviation of uint8 pixels come from the preprocessor
        file beside the weights (see `model/pixels.py`).

        Args:
            vision_tower: CLIP model of the tower, if not the one that the checkpoint names or contains.
            mm_projector: `mm_projector.bin` or `.safetensors` of stage 1 (or the directory or id of a model that has
                it), which replaces the projector.
            base_model: an adapter's base model, if it differs from the one that the adapter names.
            merge_adapter: merge an adapter into its base; False returns a `peft.PeftModel` instead.

        Raises:
            ValueError: for keys that are missing, unexpected or have the wrong shape, or a config that contradicts the
                preprocessor file; the message names them.
            OSError: if there is no such model here or on the hub, the hub cannot be reached, or a file is missing.
        """
        if kwargs.get("weights_only") is False:
            raise ValueError("weights_only=False would run code from the checkpoint; .bin files are read without")
        pieces: Pieces = {"vision_tower": vision_tower, "mm_projector": mm_projector}
        given = [name for name, piece in pieces.items() if piece is not None]
        name, hub = pretrained_model_name_or_path, {key: kwargs.pop(key) for key in _HUB if key in kwargs}
        if given and (name is None or kwargs.keys() & {"config", "subfolder", *_ITS_OWN_FILES}):
            raise ValueError(f"{given[0]} goes with a checkpoint directory alone")
        folder = None if name is None else _folder(name, hub, kwargs)
        if folder is not None and is_adapter(folder):
            return _load_adapter(cls, folder, base_model, merge_adapter, pieces, hub, *args, **kwargs)
        if base_model is not None:
            raise ValueError(f"base_model is for adapters, and {name} has no adapter_config.json")
        if name is None or folder is None:
            return cls._from_files("state_dict", None, *args, **kwargs)
        if not kwargs.keys() & {"config", "subfolder", *_ITS_OWN_FILES}:
            opened = _opened(cls, folder, pieces, hub)
            if opened is not None:
                return _named(name, _read(cls, opened, *args, **kwargs))
        return cls._in_hf_layout(name, folder, hub, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `torch.nn.Module.load_state_dict`, with parameter names of any layout: transformers' Trainer resumes, and
        reloads its best model, from the files that `save_pretrained` wrote."""
        renamed = {our_name(name): weight for name, weight in state_dict.items()}
        return super().load_state_dict(state_dict if renamed.keys() == state_dict.keys() else renamed, strict, assign)


def _folder(name: str | os.PathLike, hub: dict[str, Any], kwargs: dict[str, Any]) -> Path:
    """The directory of a model; of one on the hub only the settings, where transformers chooses the weights."""
    weights = () if kwargs.keys() & _ITS_OWN_FILES else MODEL
    return local_folder(name, weights, subfolder=kwargs.get("subfolder", ""), **hub)


def _named(name: str | os.PathLike, model: Any) -> Any:
    """The loaded model (or model and loading info), named as the caller named it: adapters refer to it by this name."""
    loaded = model[0] if isinstance(model, tuple) else model
    loaded.name_or_path = loaded.config.name_or_path = os.fspath(name)
    return model


def _opened(cls: type[CheckpointMixin], folder: Path, pieces: Pieces, hub: dict[str, Any]) -> OpenCheckpoint | None:
    """Open a checkpoint in the original layout, or in several directories.

    None for HF's layout, which transformers loads itself; then config and weight headers have been checked here.
    """
    file = folder / "config.json"
    if not file.is_file():  # transformers would build a model of its default size
        raise FileNotFoundError(f"{file} is missing")
    config = read_json(file)
    if (
        any(piece is not None for piece in pieces.values())
        or is_original(config)
        or config.get("model_type") != "llava"
    ):
        return open_checkpoint(folder, hub=_of_others(hub), **pieces)
    if (weights := find_weights(folder)) is not None:
        # Rejects damaged and malicious files before transformers opens them.
        model_on_meta(cls, hf_config(config, file), file, len(open_weights(weights)))
    return None


def _of_others(hub: dict[str, Any]) -> dict[str, Any]:
    """The hub's arguments for the models that a checkpoint refers to: `revision` is that of the checkpoint alone."""
    return {key: value for key, value in hub.items() if key != "revision"}


def _read(cls: type[CheckpointMixin], opened: OpenCheckpoint, *args: Any, **kwargs: Any) -> Any:
    if not kwargs.get("ignore_mismatched_sizes"):
        check_checkpoint(cls, opened)
    weights = {name: stored.read() for name, stored in opened.weights.items()}
    if kwargs.get("device_map") is None:
        # Tensors that were read are memory-mapped; the file may be overwritten while the model is in use.
        weights = {name: weight.clone() for name, weight in weights.items()}
    return cls._from_files(opened.path, None, *args, config=opened.config, state_dict=weights, **kwargs)


def _load_adapter(
    cls: type[CheckpointMixin],
    folder: Path,
    base_model: str | os.PathLike | None,
    merge: bool,
    pieces: Pieces,
    hub: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The base model with the adapter in `folder`, merged, or as a PeftModel."""
    hub = _of_others(hub)
    if is_original_adapter(folder):
        opened = open_original_base(folder, base_model, pieces, hub)
        model = _named(opened.path, _read(cls, opened, *args, **kwargs))
    else:
        model = cls.from_pretrained(base_of(folder, base_model, hub), *args, **pieces, **hub, **kwargs)
    keep_normalisation(model.config, read_normalisation(folder))
    wrapped = apply_adapter(model, folder)
    if not merge:
        return wrapped
    merged = wrapped.merge_and_unload().requires_grad_(True)
    merged.model.vision_tower.freeze_unused(feature_layers(merged.config))
    return merged
