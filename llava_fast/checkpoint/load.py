"""`from_pretrained` for every checkpoint layout; with `save.py` and `assemble.py` it makes `CheckpointMixin`.

Loading is strict: a key that is missing, unexpected or has the wrong shape is an error that names it. Weights are
safetensors, or `.bin` files, which are read without running code from them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from llava_fast.checkpoint.adapter import apply_adapter, base_of, is_adapter, is_original_adapter, open_original_base
from llava_fast.checkpoint.assemble import AssembleMixin
from llava_fast.checkpoint.layouts import KEY_MAPPING, is_original, our_name
from llava_fast.checkpoint.reader import OpenCheckpoint, Pieces, hf_config, local_folder, open_checkpoint
from llava_fast.checkpoint.save import SaveMixin
from llava_fast.checkpoint.strict import check_checkpoint, model_on_meta, require_complete
from llava_fast.checkpoint.weights import find_weights, open_weights, read_json
from llava_fast.model.pixels import keep_normalisation, read_normalisation
from llava_fast.model.vision import feature_layers

logger = logging.getLogger(__name__)

_HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")


class CheckpointMixin(SaveMixin, AssembleMixin):
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

        Also loads a directory in the original layout (`model_type` llava_llama), one with an `adapter_config.json`
        (LoRA, of the original code or of peft), and a bare language model with `mm_projector`.
        `attn_implementation` is accepted and ignored: attention always uses key ranges. Mean and deviation of uint8
        pixels come from the preprocessor file beside the weights (see `model/pixels.py`).

        Args:
            vision_tower: CLIP directory of the tower, if the checkpoint has none, or to replace its tower.
            mm_projector: `mm_projector.bin` or `.safetensors` of stage 1, which replaces the projector.
            base_model: directory of an adapter's base model, if it differs from the one that the adapter names.
            merge_adapter: merge an adapter into its base; False returns a `peft.PeftModel` instead.

        Raises:
            ValueError: for keys that are missing, unexpected or have the wrong shape, or a config that contradicts the
                preprocessor file; the message names them.
            OSError: if there is no checkpoint at the path, or one of its files is missing.
        """
        implementation = kwargs.pop("attn_implementation", None)
        if implementation is not None:
            logger.info("attn_implementation=%r is ignored: attention goes by key ranges", implementation)
        if kwargs.get("weights_only") is False:
            raise ValueError("weights_only=False would run code from the checkpoint; .bin files are read without")
        path = pretrained_model_name_or_path
        pieces: Pieces = {"vision_tower": vision_tower, "mm_projector": mm_projector}
        if path is not None and is_adapter(path):
            return _load_adapter(cls, Path(path), base_model, merge_adapter, pieces, *args, **kwargs)
        if base_model is not None:
            raise ValueError(f"base_model is for adapters, and {path} has no adapter_config.json")
        hub = {key: kwargs[key] for key in _HUB if key in kwargs}
        if path is not None and not kwargs.keys() & {"config", "gguf_file", "subfolder", "variant", "state_dict"}:
            opened = _opened(cls, path, pieces, hub)
            if opened is not None:
                return _read(cls, opened, *args, **kwargs)
        elif given := [name for name, piece in pieces.items() if piece is not None]:
            raise ValueError(f"{given[0]} goes with a checkpoint directory alone")
        if path is None:
            return cls._from_files("state_dict", None, *args, **kwargs)
        found = read_normalisation(path, subfolder=kwargs.get("subfolder", ""), **hub)
        model = cls._from_files(path, path, *args, **kwargs)
        keep_normalisation((model[0] if isinstance(model, tuple) else model).config, found)
        return model

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `torch.nn.Module.load_state_dict`, with parameter names of any layout: transformers' Trainer resumes, and
        reloads its best model, from the files that `save_pretrained` wrote."""
        renamed = {our_name(name): weight for name, weight in state_dict.items()}
        return super().load_state_dict(state_dict if renamed.keys() == state_dict.keys() else renamed, strict, assign)

    @classmethod
    def _from_files(cls, label: str | os.PathLike, path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own `from_pretrained`, for HF names, with strict checks; messages begin with `label`."""
        with_info = kwargs.pop("output_loading_info", False)
        allow_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        # transformers' own error for a wrong shape does not name the key, so sizes are checked here instead.
        loaded: Any = super().from_pretrained(
            path, *args, key_mapping=KEY_MAPPING, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, info = loaded
        require_complete(label, info, allow_mismatch)
        # Keys were renamed at loading; transformers must not rename them again at saving.
        model._weight_conversions = None
        # Loading replaces the parameters, so those that the constructor froze must be frozen again.
        model.model.vision_tower.freeze_unused(feature_layers(model.config))
        return (model, info) if with_info else model


def _opened(
    cls: type[CheckpointMixin], name: str | os.PathLike, pieces: Pieces, hub: dict[str, Any]
) -> OpenCheckpoint | None:
    """Open a checkpoint in the original layout, or in several directories; local files or the hub's local copy.

    None for HF's layout, which transformers loads itself; then config and weight headers have been checked here.
    """
    given, folder = any(piece is not None for piece in pieces.values()), Path(name)
    if not folder.is_dir():
        config, _ = LlavaConfig.get_config_dict(name, **hub)
        if not is_original(config):
            if given:
                raise FileNotFoundError(
                    f"vision_tower and mm_projector go with a checkpoint directory, and there is no {folder}"
                )
            return None
        copy = local_folder(name)
        if copy is None or find_weights(copy) is None:
            raise FileNotFoundError(
                f"{name} is in the original layout: download it (hf download {name}), weights included"
            )
        folder = copy
    file = folder / "config.json"
    if not file.is_file():  # transformers would build a model of its default size
        raise FileNotFoundError(f"{file} is missing")
    config = read_json(file)
    if given or is_original(config) or config.get("model_type") != "llava":
        return open_checkpoint(folder, **pieces)
    if (weights := find_weights(folder)) is not None:
        # Rejects damaged and malicious files before transformers opens them.
        model_on_meta(cls, hf_config(config, file), file, len(open_weights(weights)))
    return None


def _read(cls: type[CheckpointMixin], opened: OpenCheckpoint, *args: Any, **kwargs: Any) -> Any:
    if not kwargs.get("ignore_mismatched_sizes"):
        check_checkpoint(cls, opened)
    weights = {name: stored.read() for name, stored in opened.weights.items()}
    if kwargs.get("device_map") is None:
        # Tensors that were read are memory-mapped; the file may be overwritten while the model is in use.
        weights = {name: weight.clone() for name, weight in weights.items()}
    model = cls._from_files(opened.path, None, *args, config=opened.config, state_dict=weights, **kwargs)
    (model[0] if isinstance(model, tuple) else model).name_or_path = str(opened.path)
    return model


def _load_adapter(
    cls: type[CheckpointMixin],
    folder: Path,
    base_model: str | os.PathLike | None,
    merge: bool,
    pieces: Pieces,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The base model with the adapter in `folder`, merged, or as a PeftModel."""
    if is_original_adapter(folder):
        model = _read(cls, open_original_base(folder, base_model, pieces), *args, **kwargs)
    else:
        model = cls.from_pretrained(base_of(folder, base_model), *args, **pieces, **kwargs)
    keep_normalisation(model.config, read_normalisation(folder))
    wrapped = apply_adapter(model, folder)
    if not merge:
        return wrapped
    merged = wrapped.merge_and_unload().requires_grad_(True)
    merged.model.vision_tower.freeze_unused(feature_layers(merged.config))
    return merged
