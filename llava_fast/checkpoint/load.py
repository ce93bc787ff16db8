"""Every checkpoint layout, in and out: `from_pretrained`, `save_pretrained`, and putting a new model together.

Names and configs of the layouts are in `layouts.py`, weight files in `weights.py`, checkpoints in pieces in
`reader.py`, adapters in `adapter.py`; `convert.py` goes from layout to layout without a model.

Loading is strict: a missing, unexpected or mis-shaped key is an error that names it. Weights are safetensors, or `.bin`
read without running code.
"""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel, LlavaConfig, PreTrainedModel
from transformers import initialization as init

from llava_fast.checkpoint.adapter import apply_adapter, base_of, is_adapter, is_original_adapter, open_original_base
from llava_fast.checkpoint.layouts import (
    DERIVED,
    EMBEDDINGS,
    HEAD,
    KEY_MAPPING,
    check_layout,
    classic_name,
    is_original,
    original_config,
    original_name,
    readable_by_transformers_4,
)
from llava_fast.checkpoint.reader import PROJECTOR, TOWER, Source, hf_config, local_folder, open_checkpoint
from llava_fast.checkpoint.weights import find_weights, open_weights, read_json, write_bytes, write_text
from llava_fast.errors import blaming
from llava_fast.model.language import SUPPORTED
from llava_fast.model.pixels import keep_normalisation, read_normalisation
from llava_fast.model.projector import projector_layers
from llava_fast.model.vision import feature_layers

logger = logging.getLogger(__name__)

_HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")


class CheckpointMixin:
    """`from_pretrained` and `save_pretrained` for `LlavaForConditionalGeneration`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        vision_tower: str | os.PathLike | None = None,
        mm_projector: str | os.PathLike | None = None,
        base_model: str | os.PathLike | None = None,
        merge_adapter: bool = True,
        **kwargs,
    ) -> Any:
        """Load a model as `transformers.PreTrainedModel.from_pretrained` does, in any LLaVA layout.

        A directory in the original layout (`model_type` llava_llama), one with an `adapter_config.json` (LoRA, of the
        original code or of peft), and a bare language model with `mm_projector` are put together from their pieces.
        `attn_implementation` is accepted and ignored: attention always goes by key ranges.

        Args:
            vision_tower: CLIP directory to take the tower from, where the checkpoint has none, or another is wanted.
            mm_projector: `mm_projector.bin` or `.safetensors` of stage 1, to take the projector from.
            base_model: directory of an adapter's base model, where that is not what the adapter names.
            merge_adapter: merge an adapter into its base; False returns a `peft.PeftModel` instead.

        Raises:
            ValueError: when keys are missing, unexpected or mis-shaped; the message names them.
            OSError: when there is no checkpoint at the path, or a piece of it is missing.
        """
        implementation = kwargs.pop("attn_implementation", None)
        if implementation is not None:
            logger.info("attn_implementation=%r is ignored: attention goes by key ranges", implementation)
        if kwargs.get("weights_only") is False:
            raise ValueError("weights_only=False would run code from the checkpoint; .bin files are read without")
        path = pretrained_model_name_or_path
        pieces = {"vision_tower": vision_tower, "mm_projector": mm_projector}
        if path is not None and is_adapter(path):
            return _load_adapter(cls, Path(path), base_model, merge_adapter, *args, **pieces, **kwargs)
        if base_model is not None:
            raise ValueError(f"base_model is for adapters, and {path} has no adapter_config.json")
        if path is not None and not kwargs.keys() & {"config", "gguf_file", "subfolder", "variant", "state_dict"}:
            folder = _original_on_hub(path, kwargs) or Path(path)
            if _in_pieces(cls, folder, pieces):
                return _from_source(cls, open_checkpoint(folder, **pieces), *args, **kwargs)
        elif given := [name for name, piece in pieces.items() if piece is not None]:
            raise ValueError(f"{given[0]} goes with a checkpoint directory alone")
        if path is None:
            return cls._from_files("state_dict", None, *args, **kwargs)
        hub = {key: kwargs[key] for key in (*_HUB, "subfolder") if key in kwargs}
        found = read_normalisation(path, **hub)
        model = cls._from_files(path, path, *args, **kwargs)
        keep_normalisation((model[0] if isinstance(model, tuple) else model).config, found)
        return model

    @classmethod
    def _from_files(cls, label: str | os.PathLike, path: str | os.PathLike | None, *args, **kwargs) -> Any:
        """transformers' own `from_pretrained` for HF names, made strict; `label` stands for the source in messages."""
        with_info = kwargs.pop("output_loading_info", False)
        allow_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        # transformers' own error for a mis-shaped key does not name it, hence the switch.
        model, info = super().from_pretrained(
            path, *args, key_mapping=KEY_MAPPING, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        require_complete(label, info, allow_mismatch)
        # What was renamed on the way in must not be renamed a second time on the way out.
        model._weight_conversions = None
        # Loading replaces the parameters, and with them what the constructor froze.
        model.model.vision_tower.freeze_unused(feature_layers(model.config))
        return (model, info) if with_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        layout: str = "hf",
        with_tower: bool = True,
        mm_vision_tower: str | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> None:
        """Write config and safetensors.

        Args:
            layout: "hf", which transformers 4.36 to 5.x load, or "original", which the original LLaVA code loads.
            with_tower: for "original": put the vision tower among the weights; the released files have none.
            mm_vision_tower: for "original": CLIP directory or hub name that its code shall read; by default the one
                that the model came with.
            kwargs: as transformers takes them (max_shard_size, is_main_process, push_to_hub …).

        Raises:
            ValueError: for another layout, or a model that the original code has no config for; nothing is written.
        """
        check_layout(layout, with_tower, mm_vision_tower)
        weights = self.state_dict() if state_dict is None else state_dict
        if self.config.tie_word_embeddings:
            weights = {name: weight for name, weight in weights.items() if name != HEAD}
        if layout == "hf":
            weights = {classic_name(name): weight for name, weight in weights.items()}
            with readable_by_transformers_4(self.config, self.dtype):
                super().save_pretrained(save_directory, state_dict=weights, save_original_format=False, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub goes with layout='hf'; write the original layout to a directory")
        flat = original_config(self.config, mm_vision_tower=mm_vision_tower, tower_inside=with_tower)
        flat["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        rows = flat["vocab_size"]
        weights = {
            original_name(name, flat["mm_projector_type"]): weight[:rows] if name in (EMBEDDINGS, HEAD) else weight
            for name, weight in weights.items()
            if with_tower or not name.startswith(TOWER)
        }
        weights = {name: weight.contiguous() for name, weight in weights.items()}
        super().save_pretrained(save_directory, state_dict=weights, save_original_format=False, **kwargs)
        if kwargs.get("is_main_process", True):
            write_text(Path(save_directory) / "config.json", json.dumps(flat, indent=2, sort_keys=True) + "\n")

    def save_projector(self, file: str | os.PathLike) -> None:
        """Write the projector alone, as the original code's stage 1 does: `mm_projector.bin`, or `.safetensors`.

        Raises:
            ValueError: for another ending.
            OSError: when it cannot be written; what was there before stays.
        """
        file = Path(file)
        kind = getattr(self.config, "mm_projector_type", "mlp2x_gelu")
        weights = {
            original_name(name, kind): weight.detach().cpu().clone()
            for name, weight in self.state_dict().items()
            if name.startswith(PROJECTOR)
        }
        if file.suffix == ".safetensors":
            data = safetensors.torch.save(weights)
        elif file.suffix == ".bin":
            buffer = io.BytesIO()
            torch.save(weights, buffer)
            data = buffer.getvalue()
        else:
            raise ValueError(f"{file} ends in {file.suffix!r}; expected .bin or .safetensors")
        partial = file.with_name(f".{file.name}.partial")
        try:
            write_bytes(partial, [data])
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def assemble(
        cls,
        *,
        vision_tower: str | os.PathLike,
        language_model: str | os.PathLike,
        tokenizer: Any = None,
        dtype: torch.dtype = torch.float32,
        **llava_config: Any,
    ) -> Any:
        """Put a LLaVA together from a pretrained tower and a pretrained language model; the projector is fresh.

        Args:
            vision_tower: directory (or hub name) of a CLIP model or CLIP vision model.
            language_model: directory (or hub name) of a Llama-family causal language model.
            tokenizer: with `<image>` among its tokens. Sets `image_token_index`; where it is longer than the language
                model's vocabulary, the embeddings grow (to a multiple of 64, new rows the mean of the old).
            dtype: of the result.
            llava_config: further fields of `LlavaConfig` (vision_feature_layer, mm_projector_type, …).

        Raises:
            ValueError: when a directory holds another kind of model, the tokenizer has no `<image>`, or weights do not
                fit their config; the message names them.
        """
        with blaming(vision_tower):
            vision_config = AutoConfig.from_pretrained(vision_tower, trust_remote_code=False)
        with blaming(language_model):
            text_config = AutoConfig.from_pretrained(language_model, trust_remote_code=False)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        for path, part, known in (
            (vision_tower, vision_config, ("clip_vision_model",)),
            (language_model, text_config, SUPPORTED),
        ):
            if part.model_type not in known:
                raise ValueError(f"{path} is a {part.model_type!r} checkpoint; expected {' or '.join(known)}")
        if tokenizer is not None:
            token = getattr(tokenizer, "image_token", None) or "<image>"
            image_token = tokenizer.convert_tokens_to_ids(token)
            if image_token is None or image_token == tokenizer.unk_token_id:
                raise ValueError(f"the tokenizer of {language_model} has no {token!r} token; add it as a special token")
            llava_config.setdefault("image_token_index", image_token)
        patches = (vision_config.image_size // vision_config.patch_size) ** 2
        full = llava_config.get("vision_feature_select_strategy") == "full"
        config = LlavaConfig(
            vision_config=vision_config,
            text_config=text_config,
            image_seq_length=patches + full,
            **{"tie_word_embeddings": text_config.tie_word_embeddings, **llava_config},
        )
        keep_normalisation(config, read_normalisation(vision_tower))
        tower = _pretrained(CLIPVisionModel, vision_tower, dtype)
        text = _pretrained(AutoModelForCausalLM, language_model, dtype)
        with init.no_init_weights():
            # Not `.to(dtype)`, which would round the rotary frequencies as well.
            model = cls._from_config(config, dtype=dtype)
        tower_weights = {name.removeprefix("vision_model."): weight for name, weight in tower.state_dict().items()}
        model.model.vision_tower.load_state_dict(tower_weights, assign=True)
        model.model.language_model.load_state_dict(text.get_decoder().state_dict(), assign=True)
        model.lm_head.load_state_dict(text.get_output_embeddings().state_dict(), assign=True)
        model.tie_weights()
        model.model.vision_tower.freeze_unused(feature_layers(config))
        for module in model.model.multi_modal_projector.modules():
            model._init_weights(module)
        model.eval()
        if tokenizer is not None and len(tokenizer) > text_config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
        return model


def require_complete(path: str | os.PathLike, info: dict, allow_mismatch: bool = False) -> None:
    """Raise ValueError, in one line that names them, when keys are missing, unexpected or mis-shaped."""
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


def check_source(cls: type, source: Source) -> None:
    """Raise, before anything is read, when the tensors are not those of a model with this config."""
    model = _on_meta(cls, source.config, source.path / "config.json", len(source.weights))
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if source.config.tie_word_embeddings:
        wanted.pop(HEAD, None)
    found = {name: stored.shape for name, stored in source.weights.items()}
    misshaped = [
        (name, found[name], wanted[name]) for name in found.keys() & wanted.keys() if found[name] != wanted[name]
    ]
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    info = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": misshaped}
    require_complete(source.path, info)


def _on_meta(cls: type, config: LlavaConfig, file: Path, n_tensors: int) -> PreTrainedModel:
    """The model of a config, without storage; ValueError for a config, from `file`, that there is no model of."""
    with blaming(file), torch.device("meta"), init.no_init_weights():
        parts = (config.text_config, config.vision_config)
        depth = max(projector_layers(config), *(part.num_hidden_layers for part in parts))
        if depth > n_tensors:  # to build them would take for ever
            raise ValueError(f"it is of {depth} layers, but there are {n_tensors} tensors")
        return cls(config)


def _original_on_hub(name: str | os.PathLike, kwargs: dict[str, Any]) -> Path | None:
    """The local copy of a hub's checkpoint in the original layout; None for a directory, and for HF's layout."""
    if Path(name).is_dir():
        return None
    config, _ = LlavaConfig.get_config_dict(name, **{key: kwargs[key] for key in _HUB if key in kwargs})
    if not is_original(config):
        return None
    folder = local_folder(name)
    if folder is None or find_weights(folder) is None:
        raise FileNotFoundError(f"{name} is in the original layout: download it (hf download {name}), weights included")
    return folder


def _in_pieces(cls: type, folder: Path, pieces: dict[str, Any]) -> bool:
    """Whether transformers cannot read this checkpoint by itself; what it will read is looked through first."""
    given = any(piece is not None for piece in pieces.values())
    file = folder / "config.json"
    if not file.is_file():
        if folder.is_dir():  # transformers would make a model of its default size, and fill it
            raise FileNotFoundError(f"{file} is missing")
        if given:
            raise FileNotFoundError(
                f"vision_tower and mm_projector go with a checkpoint directory, and there is no {folder}"
            )
        return False
    config = read_json(file)
    if given or is_original(config):
        return True
    if config.get("model_type") != "llava":
        open_checkpoint(folder)  # which says what is wrong with it
    if (weights := find_weights(folder)) is not None:
        # Damaged and malicious files are found here, before transformers opens them.
        _on_meta(cls, hf_config(config, file), file, len(open_weights(weights)))
    return False


def _from_source(cls: type, source: Source, *args, **kwargs) -> Any:
    if not kwargs.get("ignore_mismatched_sizes"):
        check_source(cls, source)
    weights = {name: stored.read() for name, stored in source.weights.items()}
    if kwargs.get("device_map") is None:
        # What is read is a view of the file, which may be written over while the model lives.
        weights = {name: weight.clone() for name, weight in weights.items()}
    model = cls._from_files(source.path, None, *args, config=source.config, state_dict=weights, **kwargs)
    (model[0] if isinstance(model, tuple) else model).name_or_path = str(source.path)
    return model


def _load_adapter(cls: type, folder: Path, base_model: str | os.PathLike | None, merge: bool, *args, **kwargs) -> Any:
    """Base model with the adapter in `folder`, merged into it or around it."""
    if is_original_adapter(folder):
        pieces = {name: kwargs.pop(name) for name in ("vision_tower", "mm_projector")}
        model = _from_source(cls, open_original_base(folder, base_model, **pieces), *args, **kwargs)
    else:
        model = cls.from_pretrained(base_of(folder, base_model), *args, **kwargs)
    keep_normalisation(model.config, read_normalisation(folder))
    wrapped = apply_adapter(model, folder, require_complete)
    if not merge:
        return wrapped
    merged = wrapped.merge_and_unload().requires_grad_(True)
    merged.model.vision_tower.freeze_unused(feature_layers(merged.config))
    return merged


def _pretrained(auto_class: Any, path: str | os.PathLike, dtype: torch.dtype) -> PreTrainedModel:
    """A part of LLaVA as transformers loads it, complete."""
    model, info = auto_class.from_pretrained(
        path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
    )
    # A full CLIP checkpoint also has a text tower; what is not needed is no error here.
    require_complete(path, {**info, "unexpected_keys": []}, allow_mismatch=False)
    return model
