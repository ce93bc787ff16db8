"""Every checkpoint layout, in and out.

Read, with {none, `model.`} × {with, without `vision_model.`} mixed freely:

    on disk, all versions    language_model.model.*   language_model.lm_head.weight   multi_modal_projector.*
                             vision_tower.vision_model.*
    in memory, 4.57          model.language_model.*   lm_head.weight   model.multi_modal_projector.*
                             model.vision_tower.vision_model.*
    in memory, ≥ 5.6         the same without `vision_model`   (also the names of our parameters)

Written: the first, which every transformers version since 4.36 loads. Loading is strict: a missing, unexpected or
mis-shaped key is an error that names it. Weights are safetensors, or `.bin` read without unpickling code.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel, LlavaConfig, PreTrainedModel
from transformers import initialization as init

from llava_fast.model.language import SUPPORTED
from llava_fast.model.vision import feature_layers

logger = logging.getLogger(__name__)

# From any name on disk to ours. Applied in turn to each key; the patterns do not overlap.
KEY_MAPPING = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?multi_modal_projector\.": "model.multi_modal_projector.",
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": "model.vision_tower.",
}
# Buffers that old files carry and newer code derives.
DERIVED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def classic_name(name: str) -> str:
    """Name on disk of one of our parameters."""
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name!r} is not the name of a parameter of this model")


class CheckpointMixin:
    """`from_pretrained` and `save_pretrained` for `LlavaForConditionalGeneration`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs) -> Any:
        """Load a model as `transformers.PreTrainedModel.from_pretrained` does, in any LLaVA layout.

        A directory with an `adapter_config.json` (a LoRA checkpoint) gives its base model with the adapter merged.
        `attn_implementation` is accepted and ignored: attention always goes by key ranges.

        Raises:
            ValueError: when keys are missing, unexpected or mis-shaped; the message names them.
            OSError: when there is no checkpoint at the path.
        """
        implementation = kwargs.pop("attn_implementation", None)
        if implementation is not None:
            logger.info("attn_implementation=%r is ignored: attention goes by key ranges", implementation)
        path = pretrained_model_name_or_path
        if path is not None and (Path(path) / "adapter_config.json").is_file():
            return _load_adapter(cls, Path(path), *args, **kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        allow_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        # transformers' own error for a mis-shaped key does not name it, hence the switch.
        model, info = super().from_pretrained(
            path, *args, key_mapping=KEY_MAPPING, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        _require_complete("state_dict" if path is None else path, info, allow_mismatch)
        # What was renamed on the way in must not be renamed a second time on the way out.
        model._weight_conversions = None
        # Loading replaces the parameters, and with them what the constructor froze.
        model.model.vision_tower.freeze_unused(feature_layers(model.config))
        return (model, info) if with_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> None:
        """Write config and safetensors in the classic layout, which transformers 4.36 to 5.x load."""
        weights = self.state_dict() if state_dict is None else state_dict
        if self.config.tie_word_embeddings:
            weights = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
        weights = {classic_name(name): weight for name, weight in weights.items()}
        super().save_pretrained(save_directory, state_dict=weights, save_original_format=False, **kwargs)

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
        vision_config, text_config = (
            AutoConfig.from_pretrained(vision_tower),
            AutoConfig.from_pretrained(language_model),
        )
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


def _require_complete(path: str | os.PathLike, info: dict, allow_mismatch: bool) -> None:
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


def _load_adapter(cls: type, path: Path, *args, **kwargs) -> Any:
    """Base model with the LoRA adapter in `path` merged into it."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    settings = json.loads((path / "adapter_config.json").read_text())
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path / 'adapter_config.json'} names no base model (base_model_name_or_path)")
    if not os.path.isabs(base) and (path / base).is_dir():
        base = path / base
    model = cls.from_pretrained(base, *args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # keys that do not fit are an error, below
        wrapped = PeftModel.from_pretrained(model, path, ignore_mismatched_sizes=True)
    found = load_peft_weights(str(path), device="cpu")
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    _require_complete(
        path,
        {
            "missing_keys": wanted.keys() - found.keys(),
            # peft also saves a layer of the base model where its adapter is on the embeddings or the head.
            "unexpected_keys": found.keys() - wanted.keys() - wrapped.state_dict().keys(),
            "mismatched_keys": [
                (key, found[key].shape, wanted[key].shape)
                for key in found.keys() & wanted.keys()
                if found[key].shape != wanted[key].shape
            ],
        },
        allow_mismatch=False,
    )
    merged = wrapped.merge_and_unload().requires_grad_(True)
    merged.model.vision_tower.freeze_unused(feature_layers(merged.config))
    return merged


def _pretrained(auto_class: Any, path: str | os.PathLike, dtype: torch.dtype) -> PreTrainedModel:
    """A part of LLaVA as transformers loads it, complete."""
    model, info = auto_class.from_pretrained(path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    # A full CLIP checkpoint also has a text tower; what is not needed is no error here.
    _require_complete(path, {**info, "unexpected_keys": []}, allow_mismatch=False)
    return model
