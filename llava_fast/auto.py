"""`register`: transformers' Auto classes and pipelines make this library's LLaVA."""

from __future__ import annotations

from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoProcessor,
    LlavaConfig,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from llava_fast.drop_in import LlavaForConditionalGeneration, LlavaModel
from llava_fast.processor.processor import LlavaProcessor


def register() -> None:
    """Let transformers' Auto classes return this library's classes for models of type llava, in this process.

    From then on `AutoModelForImageTextToText`, `AutoModelForMultimodalLM`, `AutoModelForPreTraining`, `AutoModel`,
    `AutoProcessor` and `pipeline("image-text-to-text", model=…)` make `LlavaForConditionalGeneration`, `LlavaModel` and
    `LlavaProcessor` of this library. transformers' own classes stay as they are. A second call changes nothing.

    A checkpoint in the original layout (`model_type` llava_llama) is not found by these classes: its config lacks the
    shape of the vision tower. The processor is found by the class name in its files, which VipLlava's have in common:
    load theirs with `transformers.LlavaProcessor`.
    """
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForPreTraining):
        auto.register(LlavaConfig, LlavaForConditionalGeneration, exist_ok=True)
    AutoModel.register(LlavaConfig, LlavaModel, exist_ok=True)
    AutoProcessor.register(LlavaConfig, LlavaProcessor, exist_ok=True)
    # AutoProcessor looks a class up by its name in the files, first in this table of transformers' own classes.
    PROCESSOR_MAPPING_NAMES.pop("llava", None)
