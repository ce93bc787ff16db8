"""LLaVA: a CLIP vision tower, a projector, and a Llama-family language model.

A drop-in for transformers' model of that name: the same config, parameter names, arguments and outputs. The internals
differ: one key range per query instead of an attention mask; tower layers after the last feature layer are not run;
uint8 pixels are normalised on the device; image rows are written to their slots without a boolean mask.

Shapes: B batch rows, T tokens, D width of the language model, N images, M image tokens in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import nn
from transformers import LlavaConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from llava_fast.backend import is_plain
from llava_fast.model.graph import VisionGraphs
from llava_fast.model.language import LanguageModel, Rows, text_config
from llava_fast.model.pixels import keep_normalisation
from llava_fast.model.pretrained import LlavaPreTrainedModel
from llava_fast.model.vision import Projector, VisionTower, feature_layers, pixel_normalisation, tower_config
from llava_fast.ops.attention import KeyRanges
from llava_fast.ops.merge import embed_merge, merge
from llava_fast.ops.patch_embed import Normalisation
from llava_fast.sequence import key_ranges

Encoded = Mapping[str, BaseModelOutputWithPooling]
Encoding = tuple[torch.Tensor, dict[int, torch.Tensor], list[torch.Tensor]]


class Images(NamedTuple):
    """Projected features of all images, one after the other, and how many tokens each image takes."""

    rows_MD: torch.Tensor
    per_image: int


class FeatureSettings(NamedTuple):
    """What image features depend on besides pixels and parameters."""

    layers: tuple[int, ...]  # indices, from 0, of the tower's hidden states that they are made of
    drop_cls: bool
    interpolate: bool
    normalisation: Normalisation


class LlavaModel(LlavaPreTrainedModel):
    """Vision tower, projector and decoder, without the language-model head."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        image_attention = getattr(config, "image_attention", "causal")
        if image_attention not in ("causal", "bidirectional"):
            raise ValueError(f"image_attention is {image_attention!r}; expected 'causal' or 'bidirectional'")
        keep_normalisation(config, None)
        self.bidirectional_images = image_attention == "bidirectional"
        self.vision_tower = VisionTower(tower_config(config))
        self.vision_tower.freeze_unused(feature_layers(config))
        self.multi_modal_projector = Projector(config)
        self.language_model = LanguageModel(text_config(config))
        self._vision_graphs = VisionGraphs()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = cast(nn.Embedding, value)

    def train(self, mode: bool = True) -> LlavaModel:
        if mode:
            self._vision_graphs.replays.clear()
        return super().train(mode)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        use_cache: bool | None = None,
        key_start: torch.Tensor | None = None,
        key_end: torch.Tensor | None = None,
        sample_lengths: Sequence[int] | None = None,
        image_slots: torch.Tensor | None = None,
        mm_encoder_outputs: Encoded | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        rows: Rows | None = None,
        **_: Any,
    ) -> LlavaModelOutputWithPast:
        """Last hidden state (with `rows`: of these rows); arguments as `LlavaForConditionalGeneration.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        given = _given(key_start, key_end, sample_lengths)
        how = vision_feature_layer, vision_feature_select_strategy, interpolate_pos_encoding
        images = self._images(pixel_values, mm_encoder_outputs, *how)
        is_image_BT = self._image_tokens(input_ids, inputs_embeds, images, image_slots, given)
        embeds_BTD = self._embed(input_ids, inputs_embeds, images, image_slots, is_image_BT)

        cache = self._cache(past_key_values, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        ranges = given or self._ranges(embeds_BTD, cache, past, attention_mask, position_ids, is_image_BT, images)
        if position_ids is None:
            position_ids = (torch.arange(embeds_BTD.shape[1], device=embeds_BTD.device) + past)[None]

        want = self._outputs(output_hidden_states, output_attentions)
        last, states, weights = self.language_model(embeds_BTD, position_ids, ranges, cache, **want, rows=rows)
        return LlavaModelOutputWithPast(last, cache, states, weights, None if images is None else images.rows_MD)

    # Embed: image features, then one sequence of text and image embeddings

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Features of each image, projected into the language model's embedding space.

        Args:
            pixel_values: uint8 [N, H, W, 3] as decoded, or floating [N, 3, H, W] normalised.
            vision_feature_layer: hidden state(s) of the tower; several are concatenated. Default: the config's.
            vision_feature_select_strategy: "default" drops the CLS token, "full" keeps it.
            interpolate_pos_encoding: accept images of another size than the tower's.

            kwargs: `output_hidden_states` and `output_attentions` (default: the vision config's): return those of the
                whole tower. They are not named in the signature, because `generate` does not pass arguments named
                there on to the language model.

        Returns:
            `pooler_output`: one [tokens, D] tensor per image. `hidden_states`: the tower's, None for those that are
            neither features nor asked for. `last_hidden_state`: the last one computed. The tower runs up to the last
            feature layer, and to its end only if hidden states or attentions are asked for.
        """
        attentions = bool(kwargs.get("output_attentions", tower_config(self.config).output_attentions))
        every_state = bool(kwargs.get("output_hidden_states"))
        how = vision_feature_layer, vision_feature_select_strategy, interpolate_pos_encoding
        settings = self._settings(pixel_values, *how)
        if every_state or attentions:
            features_NMD, found, weights = self._encode(pixel_values, settings, every_state, attentions)
        else:
            features_NMD, found, weights = self._encoded(pixel_values, settings)
        layers = range(len(self.vision_tower.encoder.layers) + 1)
        kept = layers if every_state else settings.layers
        return BaseModelOutputWithPooling(
            last_hidden_state=found[max(found)],
            pooler_output=list(features_NMD),  # type: ignore[arg-type]  # a list in transformers' LLaVA, too
            hidden_states=tuple(found[i] if i in kept else None for i in layers),  # type: ignore[misc]
            attentions=tuple(weights) if attentions else None,
        )

    def _settings(
        self, pixels: torch.Tensor, layer: int | list[int] | None, strategy: str | None, interpolate: bool
    ) -> FeatureSettings:
        strategy = strategy or self.config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy is {strategy!r}; expected 'default' or 'full'")
        layers = tuple(self.vision_tower.resolve(i) for i in feature_layers(self.config, layer))
        return FeatureSettings(layers, strategy == "default", interpolate, pixel_normalisation(self.config, pixels))

    def _encoded(self, pixels: torch.Tensor, settings: FeatureSettings) -> Encoding:
        """As `_encode`, by a CUDA graph where possible."""
        if torch.is_grad_enabled():  # a graph would have no gradients
            return self._encode(pixels, settings)
        return self._vision_graphs(self._encode, pixels, (self.vision_tower, self.multi_modal_projector), settings)

    def _encode(
        self, pixels: torch.Tensor, settings: FeatureSettings, every_state: bool = False, weights: bool = False
    ) -> Encoding:
        """Projected features [N, tokens, D]; the tower's hidden states (some, or all), by index; attention weights."""
        mean, std = settings.normalisation
        states, attentions = self.vision_tower(
            pixels,
            len(self.vision_tower.encoder.layers) if every_state or weights else max(settings.layers),
            mean=mean,
            std=std,
            keep=None if every_state else settings.layers,
            interpolate_pos_encoding=settings.interpolate,
            output_attentions=weights,
        )
        found = {i: state for i, state in enumerate(states) if state is not None}
        chosen = [found[i] for i in settings.layers]
        features = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
        return self.multi_modal_projector(features[:, 1:] if settings.drop_cls else features), found, attentions

    def _images(self, pixels: torch.Tensor | None, encoded: Encoded | None, *how: Any) -> Images | None:
        """The images' features: computed from pixels, or taken from `encoded`."""
        if pixels is None:
            if encoded is None or encoded.get("image") is None:
                return None
            features = list(cast("Sequence[torch.Tensor]", encoded["image"].pooler_output))
            return Images(torch.cat(features), features[0].shape[0])
        if encoded is not None:
            raise ValueError("pass at most one of pixel_values and mm_encoder_outputs")
        features_NMD = self._encoded(pixels, self._settings(pixels, *how))[0]
        return Images(features_NMD.flatten(0, 1), features_NMD.shape[1])

    def _image_tokens(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        images: Images | None,
        image_slots: torch.Tensor | None,
        given: KeyRanges | None,
    ) -> torch.Tensor | None:
        """[B, T] bool, True at image tokens; None if nothing needs it. Without ids, embeddings are compared instead."""
        ranges_need_it = self.bidirectional_images and given is None
        if ranges_need_it and input_ids is None and images is None:
            raise ValueError("image_attention='bidirectional' cannot find the images in inputs_embeds; pass key ranges")
        if not ranges_need_it and (images is None or image_slots is not None):
            return None
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        assert inputs_embeds is not None
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        images: Images | None,
        image_slots: torch.Tensor | None,
        is_image_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        """Text and image embeddings [B, T, D]; one fused operation if the embedding module is a plain look-up."""
        table = self.get_input_embeddings()
        if images is not None and input_ids is not None and is_plain_lookup(table):
            rows_MD = images.rows_MD.to(table.weight.device)
            return embed_merge(
                input_ids, table.weight, rows_MD, padding_id=table.padding_idx, slots_M=image_slots, mask_BT=is_image_BT
            )
        unused = None
        if images is None and self.training and torch.is_grad_enabled():
            unused = self._unused_feature(
                cast(torch.Tensor, input_ids if inputs_embeds is None else inputs_embeds).device
            )
        embeds_BTD: torch.Tensor = table(input_ids) if inputs_embeds is None else inputs_embeds
        if images is not None:
            return merge(embeds_BTD, images.rows_MD.to(embeds_BTD.device), slots_M=image_slots, mask_BT=is_image_BT)
        return embeds_BTD if unused is None else embeds_BTD + 0 * unused.to(embeds_BTD.dtype)

    def _unused_feature(self, device: torch.device) -> torch.Tensor | None:
        """An image feature [1, D] to be added zero times: it gives the projector zero gradients for text-only batches.

        Otherwise the loss of a text-only batch in stage 1 would not require grad. In distributed training, or if the
        tower is trained, the feature comes from a black image through the whole tower, before the text is embedded: all
        ranks must all-gather the same sharded parameters in the same order.
        """
        vision = tower_config(self.config)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        if trained or (distributed and torch.distributed.get_world_size() > 1):
            side = cast(int, vision.image_size)
            black = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device)
            return cast("list[torch.Tensor]", self.get_image_features(black).pooler_output)[0][:1]
        if not any(parameter.requires_grad for parameter in self.multi_modal_projector.parameters()):
            return None
        width = vision.hidden_size * len(feature_layers(self.config))
        return self.multi_modal_projector(torch.zeros(1, width, device=device, dtype=self.dtype))

    # Ranges

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        if use_cache is None:
            use_cache = self.language_model.config.use_cache and not self.training
        # Layers whose activations are recomputed get no cache from transformers' base class.
        recomputes = self.training and any(layer.gradient_checkpointing for layer in self.language_model.layers)
        if recomputes and given is not None and given.get_seq_length():
            raise ValueError("past_key_values cannot be used in training with gradient checkpointing")
        return DynamicCache() if use_cache and given is None and not recomputes else given

    def _ranges(
        self,
        embeds_BTD: torch.Tensor,
        cache: Cache | None,
        past: int | torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        is_image_BT: torch.Tensor | None,
        images: Images | None,
    ) -> KeyRanges:
        """The key range of each token; key 0 is the first key that the cache still holds."""
        window: int | None = getattr(self.language_model.config, "sliding_window", None)
        batch, tokens, _ = embeds_BTD.shape
        ranges = key_ranges(
            batch,
            tokens,
            embeds_BTD.device,
            past=past,
            attention_mask=attention_mask,
            position_ids=position_ids,
            image_mask=is_image_BT if self.bidirectional_images else None,
            image_tokens=1 if images is None else images.per_image,
            sliding_window=window,
        )
        if cache is None or window is None or not any(cache.is_sliding):
            return ranges
        if isinstance(past, torch.Tensor):
            raise ValueError("a static cache cannot be combined with sliding_window; use the dynamic cache")
        return ranges.shifted(max(past - window + 1, 0))

    def _outputs(self, hidden_states: bool | None, attentions: bool | None) -> dict[str, bool]:
        """Which optional outputs the decoder returns: the arguments if given, else the text config's values."""
        config = self.language_model.config
        return {
            "output_hidden_states": bool(config.output_hidden_states if hidden_states is None else hidden_states),
            "output_attentions": bool(config.output_attentions if attentions is None else attentions),
        }


def _given(start: torch.Tensor | None, end: torch.Tensor | None, lengths: Sequence[int] | None) -> KeyRanges | None:
    if (start is None) != (end is None):
        raise ValueError("pass both of key_start and key_end, or neither")
    if start is None or end is None:
        if lengths is not None:
            raise ValueError("sample_lengths describes key_start and key_end; pass them too")
        return None
    if torch.compiler.is_compiling() or lengths is None:  # a guard on them would compile again and again
        return KeyRanges(start, end)
    return KeyRanges(start, end, "causal", lengths=tuple(map(int, lengths)))


def is_plain_lookup(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether `module` is an embedding that only looks rows up."""
    if not is_plain(module, nn.Embedding):
        return False
    return not (module.max_norm is not None or module.scale_grad_by_freq or module.sparse)
