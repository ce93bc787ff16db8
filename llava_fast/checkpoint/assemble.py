"""`assemble`: makes a LLaVA from a pretrained vision tower and a pretrained language model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel, LlavaConfig, PreTrainedModel
from transformers import initialization as init

from llava_fast.checkpoint.layouts import image_tokens
from llava_fast.checkpoint.strict import require_complete
from llava_fast.errors import blaming
from llava_fast.hub import local_folder
from llava_fast.model.language import SUPPORTED
from llava_fast.model.llava import LlavaModel
from llava_fast.model.pixels import keep_normalisation, read_normalisation
from llava_fast.model.pretrained import LlavaPreTrainedModel
from llava_fast.model.vision import feature_layers


class AssembleMixin(LlavaPreTrainedModel):
    """Adds `assemble` to the model class."""

    model: LlavaModel
    lm_head: nn.Linear

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
        """Make a LLaVA from a pretrained tower and a pretrained language model, with a newly initialised projector.

        Args:
            vision_tower: directory or hub id of a CLIP model or CLIP vision model.
            language_model: directory or hub id of a Llama-family causal language model.
            tokenizer: has an `<image>` token, which becomes `image_token_index`. If it has more tokens than the
                embeddings have rows, these grow to a multiple of 64; new rows are the mean of the old.
            dtype: of the result.
            llava_config: further fields of `LlavaConfig` (vision_feature_layer, mm_projector_type, …).

        Raises:
            ValueError: for a directory with another kind of model, a tokenizer without `<image>`, or weights that do
                not fit their config; the message names them.
            OSError: if there is no such model here or on the hub, or the hub cannot be reached.
        """
        vision_tower, language_model = local_folder(vision_tower), local_folder(language_model)
        with blaming(vision_tower):
            vision_config = AutoConfig.from_pretrained(vision_tower, trust_remote_code=False)
        with blaming(language_model):
            text_config = AutoConfig.from_pretrained(language_model, trust_remote_code=False)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        for path, kind, known in (
            (vision_tower, vision_config.model_type, ("clip_vision_model",)),
            (language_model, text_config.model_type, SUPPORTED),
        ):
            if kind not in known:
                raise ValueError(f"{path} is a {kind!r} checkpoint; expected {' or '.join(known)}")
        if tokenizer is not None:
            token = getattr(tokenizer, "image_token", None) or "<image>"
            image_token = tokenizer.convert_tokens_to_ids(token)
            if image_token is None or image_token == tokenizer.unk_token_id:
                raise ValueError(f"the tokenizer of {language_model} has no {token!r} token; add it as a special token")
            llava_config.setdefault("image_token_index", image_token)
        strategy = llava_config.get("vision_feature_select_strategy", "default")
        config = LlavaConfig(
            vision_config=vision_config,
            text_config=text_config,
            image_seq_length=image_tokens(vision_config, strategy),
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


def _pretrained(auto_class: Any, path: str | os.PathLike, dtype: torch.dtype) -> PreTrainedModel:
    """Tower or language model, loaded by transformers; missing weights are an error."""
    model, info = auto_class.from_pretrained(
        path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
    )
    # A full CLIP checkpoint also has a text tower, so unexpected keys are no error here.
    require_complete(path, {**info, "unexpected_keys": []}, allow_mismatch=False)
    return model
