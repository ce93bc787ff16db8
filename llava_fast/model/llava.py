"""LLaVA: a CLIP vision tower, a projector, and a Llama-family language model.

A drop-in for transformers' `LlavaForConditionalGeneration`: the same config, parameter names, arguments and outputs.
What differs is underneath: no attention masks but one key range per query, only the tower layers that are read, uint8
pixels normalised on the device, and image rows written to their slots without a boolean mask.

Shapes: B batch rows, T tokens, D width of the language model, M image tokens in all.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlavaConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from llava_fast.model.graph import VisionGraphs
from llava_fast.model.language import LanguageModel, Rows
from llava_fast.model.pixels import CLIP_MEAN as CLIP_MEAN  # also imported from here
from llava_fast.model.pixels import CLIP_STD as CLIP_STD
from llava_fast.model.pixels import Normalisation, check_noted, pixel_normalisation
from llava_fast.model.plain import is_plain_lookup
from llava_fast.model.pretrained import LlavaPreTrainedModel
from llava_fast.model.projector import Projector
from llava_fast.model.vision import VisionTower, feature_layers
from llava_fast.ops.merge import embed_merge, merge
from llava_fast.sequence import key_ranges


class LlavaModel(LlavaPreTrainedModel):
    """Vision tower, projector and decoder, without the language-model head."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        image_attention = getattr(config, "image_attention", "causal")
        if image_attention not in ("causal", "bidirectional"):
            raise ValueError(f"image_attention is {image_attention!r}; expected 'causal' or 'bidirectional'")
        self.vision_tower = VisionTower(config.vision_config)
        self.vision_tower.freeze_unused(feature_layers(config))
        self.multi_modal_projector = Projector(config)
        self.language_model = LanguageModel(config.text_config)
        self._vision_graphs = VisionGraphs()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutputWithPooling:
        """Features of each image, projected into the language model's embedding space.

        Args:
            pixel_values: uint8 [N, H, W, 3] as decoded, or floating [N, 3, H, W] normalised.
            vision_feature_layer: hidden state(s) of the tower; several are concatenated. Default: the config's.
            vision_feature_select_strategy: "default" drops the CLS token, "full" keeps it.
            interpolate_pos_encoding: accept images of another size than the tower's.

        Returns:
            `pooler_output`: one [tokens, D] tensor per image. `last_hidden_state` and `hidden_states` are the
            tower's as far as it was computed, that is up to the last feature layer.
        """
        features_BND, states, attentions = self._encode_images(
            pixel_values,
            vision_feature_layer,
            vision_feature_select_strategy,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=list(features_BND),
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _encode_images(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None,
        vision_feature_select_strategy: str | None,
        *,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, list[torch.Tensor | None], list[torch.Tensor]]:
        """Projected features [images, tokens, D], and the tower's hidden states (the last, or all) and attentions."""
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy is {strategy!r}; expected 'default' or 'full'")
        layers = [self.vision_tower.resolve(i) for i in feature_layers(self.config, vision_feature_layer)]
        mean, std = self._normalisation(pixel_values)
        states, attentions = self.vision_tower(
            pixel_values,
            max(layers),
            mean=mean,
            std=std,
            keep=None if output_hidden_states else layers,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_attentions=output_attentions,
        )
        features = states[layers[0]] if len(layers) == 1 else torch.cat([states[i] for i in layers], dim=-1)
        if strategy == "default":
            features = features[:, 1:]
        return self.multi_modal_projector(features), states, attentions

    def _image_rows(
        self, pixel_values: torch.Tensor, layer: int | list[int] | None, strategy: str | None, interpolate: bool
    ) -> torch.Tensor:
        """Projected features [images, tokens, D], as a CUDA graph where that may be."""

        def rows(pixels: torch.Tensor) -> torch.Tensor:
            return self._encode_images(pixels, layer, strategy, interpolate_pos_encoding=interpolate)[0]

        layers = tuple(feature_layers(self.config, layer))
        strategy = strategy or self.config.vision_feature_select_strategy
        normalisation = self._normalisation(pixel_values)
        modules = (self.vision_tower, self.multi_modal_projector)
        return self._vision_graphs(rows, pixel_values, modules, layers, strategy, interpolate, normalisation)

    def _normalisation(self, pixels: torch.Tensor) -> Normalisation:
        """Mean and deviation of uint8 pixels; a ValueError where a processor has noted others on them."""
        check_noted(pixels, self.config)
        return pixel_normalisation(self.config)

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
        use_cache: bool | None = None,
        key_start: torch.Tensor | None = None,
        key_end: torch.Tensor | None = None,
        image_slots: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        rows: Rows | None = None,
    ) -> LlavaModelOutputWithPast:
        """Last hidden state of a mixed image-text sequence; see `LlavaForConditionalGeneration.forward`.

        With `rows` (see `LanguageModel.forward`) only those of its rows.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("pass at most one of pixel_values and mm_encoder_outputs")
        text_config = self.config.text_config
        image_mask = None
        bidirectional = getattr(self.config, "image_attention", "causal") == "bidirectional"
        has_images = pixel_values is not None or (mm_encoder_outputs or {}).get("image") is not None
        if bidirectional and key_start is None and input_ids is None and not has_images:
            raise ValueError("image_attention='bidirectional' cannot find the images in inputs_embeds; pass key ranges")
        if (has_images and image_slots is None) or (bidirectional and key_start is None):
            image_mask = self._image_mask(input_ids, inputs_embeds)
        embed = self.get_input_embeddings()
        # Image rows and the look-up in one pass; an embedding that somebody has wrapped or hooked is called.
        in_one = has_images and input_ids is not None and is_plain_lookup(embed)
        if inputs_embeds is None and not in_one:
            inputs_embeds = embed(input_ids)

        features_MD, image_tokens = None, 1
        if has_images:
            if pixel_values is not None:
                features_BND = self._image_rows(
                    pixel_values, vision_feature_layer, vision_feature_select_strategy, interpolate_pos_encoding
                )
                image_tokens, features_MD = features_BND.shape[1], features_BND.flatten(0, 1)
            else:
                features = list(mm_encoder_outputs["image"].pooler_output)
                image_tokens, features_MD = features[0].shape[0], torch.cat(features)
            places = {"slots_M": image_slots, "mask_BT": image_mask}
            if in_one:
                features_MD = features_MD.to(embed.weight.device)
                inputs_embeds = embed_merge(
                    input_ids, embed.weight, features_MD, padding_id=embed.padding_idx, **places
                )
            else:
                features_MD = features_MD.to(inputs_embeds.device)
                inputs_embeds = merge(inputs_embeds, features_MD, **places)
        elif self.training and torch.is_grad_enabled():
            inputs_embeds = self._keep_projector_in_graph(inputs_embeds)

        batch, tokens, _ = inputs_embeds.shape
        if use_cache is None:
            use_cache = text_config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if (key_start is None) != (key_end is None):
            raise ValueError("pass both of key_start and key_end, or neither")
        if key_start is None:
            key_start, key_end = key_ranges(
                batch,
                tokens,
                inputs_embeds.device,
                past=past,
                attention_mask=attention_mask,
                position_ids=position_ids,
                image_mask=image_mask if bidirectional else None,
                image_tokens=image_tokens,
                sliding_window=getattr(text_config, "sliding_window", None),
            )
            key_start, key_end = self._count_from_first_cached(key_start, key_end, past_key_values, past)
        if position_ids is None:
            position_ids = (torch.arange(tokens, device=inputs_embeds.device) + past)[None]

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        last, hidden_states, attentions = self.language_model(
            inputs_embeds,
            position_ids,
            key_start,
            key_end,
            past_key_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            rows=rows,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=hidden_states,
            attentions=attentions,
            image_hidden_states=features_MD,
        )

    def _image_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """[B, T] bool, True at image tokens; recognised by their embedding where there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _keep_projector_in_graph(self, embeds_BTD: torch.Tensor) -> torch.Tensor:
        """Add zero times an image feature, so that a batch of text alone gives the projector (zero) gradients.

        Without it stage 1 would have nothing to differentiate there. Beside other processes the feature comes from a
        black image through the whole tower: where parameters are sharded, all must gather the same ones.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            side = self.config.vision_config.image_size
            black = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=embeds_BTD.device)
            feature = self.get_image_features(black).pooler_output[0][:1]
        elif any(parameter.requires_grad for parameter in self.multi_modal_projector.parameters()):
            width = self.config.vision_config.hidden_size * len(feature_layers(self.config))
            zero = torch.zeros(1, width, device=embeds_BTD.device, dtype=embeds_BTD.dtype)
            feature = self.multi_modal_projector(zero)
        else:
            return embeds_BTD
        return embeds_BTD + 0 * feature.to(embeds_BTD.dtype)

    def _count_from_first_cached(
        self, key_start: torch.Tensor, key_end: torch.Tensor, cache: Cache | None, past: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift the ranges where the cache has dropped keys that left the sliding window."""
        if cache is None or not any(cache.is_sliding):
            return key_start, key_end
        if isinstance(past, torch.Tensor):
            raise ValueError("a static cache cannot be combined with sliding_window; use the dynamic cache")
        dropped = max(past - self.config.text_config.sliding_window + 1, 0)
        return (key_start - dropped).clamp(min=0), (key_end - dropped).clamp(min=0)
