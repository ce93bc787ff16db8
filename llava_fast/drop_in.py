"""`LlavaForConditionalGeneration`, with the arguments, outputs and checkpoints of transformers' class of that name.

Shapes: B batch rows, T tokens, D width of the language model, M image tokens in all, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationMixin, LlavaConfig
from transformers.cache_utils import Cache, StaticLayer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from llava_fast.backend import is_plain
from llava_fast.checkpoint.load import BareCheckpointMixin, CheckpointMixin
from llava_fast.model import llava
from llava_fast.model.language import Rows, text_config
from llava_fast.model.pretrained import LlavaPreTrainedModel
from llava_fast.ops.loss import linear_cross_entropy

IGNORE_INDEX = -100


class LlavaModel(BareCheckpointMixin, llava.LlavaModel):
    """LLaVA without its language-model head: hidden states."""


class LlavaForConditionalGeneration(CheckpointMixin, LlavaPreTrainedModel, GenerationMixin):
    """LLaVA with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.model = LlavaModel(config)
        text = text_config(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and getattr(value, "__module__", "").startswith("liger_kernel."):
            return  # transformers' forward with a fused loss, as ours has; see LanguageModel.replaced_by_liger
        super().__setattr__(name, value)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = cast(nn.Linear, value)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """See `LlavaModel.get_image_features`."""
        return self.model.get_image_features(
            pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        key_start: torch.Tensor | None = None,
        key_end: torch.Tensor | None = None,
        sample_lengths: Sequence[int] | None = None,
        image_slots: torch.Tensor | None = None,
        target_rows: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Logits, and the loss if labels are given.

        In training with labels no logits are returned: the fused loss computes them for labelled rows only, in chunks.
        The last decoder layer also computes only the rows that the loss or the logits need.

        Args:
            input_ids: [B, T] with `config.image_token_id` once for every image token; or
            inputs_embeds: [B, T, D].
            pixel_values: uint8 [N, H, W, 3] as decoded, or floating [N, 3, H, W] normalised; all images of the
                batch in reading order. None for text alone.
            attention_mask: [B, cached + T], 1 for real tokens; padding on the left or on the right. A padding token
                sees no keys, and its output is meaningless.
            position_ids: [B, T]; counted from 0 by default. If there is no attention mask and the cache is empty, a
                position that restarts begins a new packed sample; samples never see each other.
            past_key_values: a transformers cache.
            labels: [B, T], −100 where there is nothing to predict; shifted here, not by the caller.
            logits_to_keep: compute logits for the last n tokens only (0: all), or for these indices.
            use_cache: default: the text config's when evaluating, False when training.
            key_start, key_end: int32 [B, T] key ranges (see `llava_fast.sequence`), instead of a mask.
            sample_lengths: tokens of each sample, if these ranges are one row of causal samples laid end to end and the
                caller knows it. Must be right: only their sum is checked.
            image_slots: int64 [M], flat positions of the image tokens in `input_ids`, if the caller knows them.
            target_rows: int64, ascending flat positions of the tokens whose next token has a label, if the caller
                knows them: avoids a device synchronisation.
            mm_encoder_outputs: {"image": result of `get_image_features`} instead of pixels.
            return_logits: whether to return `logits` beside a loss; default: True in evaluation, False in training.
            kwargs: for the loss: its sum is divided by `num_items_in_batch` instead of the number of labelled tokens;
                `shift_labels` [B, T] are already shifted; `ignore_index` instead of −100. The last two, a
                `loss_function` of the user's own, and a head that is not an `nn.Linear` need all logits, which are then
                computed and returned in any case. As in transformers, other arguments are ignored.

        Raises:
            ValueError: for inputs that contradict each other, such as a number of image tokens that is not the
                number of image features.
        """
        if return_logits is None:
            return_logits = labels is None or not self.training
        return_logits = return_logits or not self._loss_can_be_fused(kwargs)
        rows: Rows | None = None
        targets = None
        if labels is not None and not return_logits:
            rows, targets = _labelled(labels, target_rows)
        elif labels is None and isinstance(logits_to_keep, int) and logits_to_keep:
            rows = logits_to_keep
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            use_cache=use_cache,
            key_start=key_start,
            key_end=key_end,
            sample_lengths=sample_lengths,
            image_slots=image_slots,
            mm_encoder_outputs=mm_encoder_outputs,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            rows=rows,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        logits = loss = None
        if targets is None:
            logits = self.lm_head(_rows_to_keep(hidden, logits_to_keep) if rows is None else hidden)
            if labels is not None:
                vocab_size = text_config(self.config).vocab_size
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        else:
            num_items, num_labelled = kwargs.get("num_items_in_batch"), None if rows is None else targets.numel()
            loss = linear_cross_entropy(
                hidden.flatten(0, 1), self.lm_head.weight, targets, num_items=num_items, num_labelled=num_labelled
            )
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _loss_can_be_fused(self, arguments: dict[str, Any]) -> bool:
        """Whether the fused loss computes what `loss_function` would with these arguments.

        It reads the head's weight directly, which would bypass a head wrapped by PEFT or a quantiser.
        """
        plain = self.loss_function is ForCausalLMLoss and is_plain(self.lm_head, nn.Linear)
        return plain and not any(arguments.get(name) is not None for name in ("shift_labels", "ignore_index"))

    def generate(self, *args, **kwargs):
        """transformers' `generate`, refusing right-padded prompts: the first new token would follow padding."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not bool((mask[:, -1] != 0).all()):
            row = int((mask[:, -1] == 0).nonzero()[0])
            raise ValueError(
                f"generate needs left-padded prompts, but attention_mask row {row} ends in padding; "
                "set processor.tokenizer.padding_side = 'left'"
            )
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # transformers annotates `self` with a protocol

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> torch.Tensor | None:
        """The mask [B, slots] for a static cache, whether the prompts are padded or not; else the one that was given.

        `generate` compiles the decoding step of a static cache: so all steps have inputs of the same shapes. Slots
        that are not filled count as real, since key ranges end before them.

        Raises:
            ValueError: if the mask is longer than the cache; kernels would leave the last tokens out.
        """
        layers = [] if past_key_values is None else past_key_values.layers
        if not layers or not isinstance(layers[0], StaticLayer) or layers[0].is_sliding:
            return attention_mask
        slots = layers[0].max_cache_len
        if attention_mask is not None:
            if attention_mask.shape[1] > slots:
                raise ValueError(
                    f"{attention_mask.shape[1]} tokens for a static cache of {slots} slots (max_cache_len)"
                )
            return nn.functional.pad(attention_mask, (0, slots - attention_mask.shape[1]), value=1)
        batch, tokens = inputs_embeds.shape[:2]
        if tokens > 1:
            return None  # a prompt: not compiled
        return inputs_embeds.new_ones((batch, slots), dtype=torch.int64)


def _labelled(labels_BT: torch.Tensor, rows: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Flat indices of the tokens whose next token has a label, and these labels.

    If finding the indices would synchronise with the device, they are None, and the labels are those of all tokens.
    """
    targets = torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    if rows is None and labels_BT.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = (targets != IGNORE_INDEX).nonzero().flatten()
    return rows, targets if rows is None else targets[rows]


def _rows_to_keep(hidden_BTD: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The rows to compute logits for, by transformers' rules for `logits_to_keep`."""
    if isinstance(keep, int):
        return hidden_BTD[:, -keep:] if keep else hidden_BTD
    if keep.dim() == 1:
        return hidden_BTD[:, keep]
    return hidden_BTD[keep] if keep.dtype == torch.bool else torch.take_along_dim(hidden_BTD, keep[..., None], dim=1)
