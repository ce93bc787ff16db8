"""Loading and saving a processor in transformers' files, and assembling one for a vision tower and a language model."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers
from transformers import AutoConfig, AutoTokenizer, CLIPVisionConfig, LlavaConfig, LlavaImageProcessorPil

from llava_fast.errors import blaming
from llava_fast.hub import local_folder
from llava_fast.model.language import text_config
from llava_fast.model.pixels import read_normalisation
from llava_fast.model.vision import pixel_normalisation, tower_config
from llava_fast.ops.patch_embed import Normalisation
from llava_fast.processor.templates import get_template

if TYPE_CHECKING:
    from typing_extensions import Self


SETTINGS = ("processor_config.json", "preprocessor_config.json")


class FilesMixin(transformers.LlavaProcessor):
    """Loading, saving and assembling, for `LlavaProcessor`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        cache_dir: str | PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        **kwargs: Any,
    ) -> Self:
        """Load a processor as `transformers.ProcessorMixin.from_pretrained` does, from a directory or a hub id.

        Raises:
            OSError: if there is no such model here or on the hub, the hub cannot be reached, or a file is missing.
            ValueError: naming the model, if one of its files is damaged.
        """
        name = pretrained_model_name_or_path
        folder = local_folder(
            name,
            (),
            subfolder=kwargs.get("subfolder", ""),
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
        )
        inside = folder / kwargs.get("subfolder", "")
        if inside.is_dir() and not any((inside / file).is_file() for file in SETTINGS):
            raise FileNotFoundError(
                f"{name} has no processor ({' or '.join(SETTINGS)}); for a checkpoint of the original LLaVA code "
                "llava-fast convert makes one"
            )
        # Without trust_remote_code=False transformers asks on stdin whether to run code of the checkpoint.
        with blaming(name):
            processor = super().from_pretrained(folder, **{"trust_remote_code": False, **kwargs})
        processor.tokenizer.name_or_path = str(name)
        return processor

    @classmethod
    def assemble(
        cls,
        vision_tower: str | PathLike,
        language_model: str | PathLike,
        *,
        template: str = "v1",
        pad_to_square: bool = False,
        vision_feature_select_strategy: str = "default",
    ) -> Self:
        """Make the processor of a new LLaVA from a CLIP model and a language model, directories or hub ids.

        The tokenizer gets an `<image>` token if it has none, so the model's embeddings may need resizing.
        """
        vision_tower, language_model = local_folder(vision_tower, ()), local_folder(language_model, ())
        with blaming(language_model):
            tokenizer = AutoTokenizer.from_pretrained(language_model, trust_remote_code=False)
        if "<image>" not in tokenizer.get_vocab():
            tokenizer.add_tokens(["<image>"], special_tokens=True)
        with blaming(vision_tower):
            config = AutoConfig.from_pretrained(vision_tower, trust_remote_code=False)
        found = read_normalisation(vision_tower)
        return cls.for_tower(
            getattr(config, "vision_config", config),
            tokenizer,
            Normalisation() if found is None else found[0],
            template=template,
            pad_to_square=pad_to_square,
            vision_feature_select_strategy=vision_feature_select_strategy,
        )

    @classmethod
    def for_original(cls, folder: Path, config: LlavaConfig) -> Self:
        """The processor of a checkpoint in the original layout, which has only a tokenizer.

        Image and padding token follow the tokenizer's vocabulary, and `config` is given their ids.

        Raises:
            ValueError: naming the folder, if it has no tokenizer, or one with more tokens than `config` has embeddings.
        """
        # With the text config: by the original model_type transformers finds no tokenizer class.
        with blaming(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, config=config.text_config, trust_remote_code=False)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        # If the embeddings did not grow, there is no row for a padding token; <unk> is used, as in the original code.
        if hasattr(config, "original_vocab_size") and tokenizer.pad_token in (None, tokenizer.unk_token):
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        rows = text_config(config).vocab_size
        if len(tokenizer) > rows:
            raise ValueError(
                f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model only {rows} embeddings"
            )
        config.image_token_index = cast(int, tokenizer.convert_tokens_to_ids("<image>"))
        config.pad_token_id = tokenizer.pad_token_id
        return cls.for_tower(
            tower_config(config),
            tokenizer,
            pixel_normalisation(config),
            pad_to_square=getattr(config, "image_aspect_ratio", None) == "pad",
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )

    @classmethod
    def for_tower(
        cls,
        vision: CLIPVisionConfig,
        tokenizer: Any,
        normalisation: Normalisation,
        *,
        template: str = "v1",
        pad_to_square: bool,
        vision_feature_select_strategy: str,
    ) -> Self:
        """The processor for a vision tower: square images of the tower's size, with the right number of tokens.

        The tokenizer is set to pad on the left, as llava-hf's do: generation needs it.
        """
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # init_kwargs are what is saved
        side = vision.image_size
        image_processor = LlavaImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            do_pad=pad_to_square,
            image_mean=list(normalisation.mean),
            image_std=list(normalisation.std),
        )
        return cls(
            image_processor,
            tokenizer,
            patch_size=cast(int, vision.patch_size),
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=get_template(template).chat_template,
        )

    def _with_image_settings(self, settings: Mapping[str, Any]) -> Self:
        """A copy of this processor whose image processor differs in these settings of its constructor.

        For a flag (`do_…`) None is off; for any other setting None is no change.
        """
        given = {
            key: bool(value) if key.startswith("do_") else value
            for key, value in settings.items()
            if key.startswith("do_") or value is not None
        }
        changed = copy(self)
        changed.image_processor = type(self.image_processor).from_dict({**self.image_processor.to_dict(), **given})
        changed.image_size  # type: ignore[attr-defined]  # noqa: B018  an error for settings that we do not support
        return changed

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        # transformers 5 does not save `legacy` of a Llama tokenizer; without it the loaded tokenizer differs.
        if hasattr(self.tokenizer, "legacy"):
            self.tokenizer.init_kwargs["legacy"] = self.tokenizer.legacy
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
