"""What each stage trains: the parameters and their dtype.

stage       trained
projector   the projector
full        the projector and the language model
lora        the projector, and LoRA on the linear layers of the language model

With `vision_learning_rate` stages full and lora also train the vision tower, or its last `vision_layers` layers: those
that LLaVA reads, up to the feature layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.model.vision import feature_layers
from llava_fast.processor.processor import LlavaProcessor
from llava_fast.train.recipe import Lora, Recipe, RecipeError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROJECTOR, TOWER = "multi_modal_projector", "vision_tower"


def prepare_model(recipe: Recipe, processor: LlavaProcessor, checkpoint: Path | None = None) -> nn.Module:
    """The model of the recipe, or of the checkpoint it resumes from, set up for its stage.

    Trained parameters are fp32, frozen ones have the recipe's dtype. Stage lora returns a `PeftModel`.
    """
    folder = recipe.model if checkpoint is None or recipe.stage == "lora" else checkpoint
    if folder is None:
        vision_tower, language_model = recipe.assembled_from
        model = LlavaForConditionalGeneration.assemble(
            vision_tower=vision_tower, language_model=language_model, tokenizer=processor.tokenizer
        )
    else:  # absolute, because an adapter refers to its base by this path
        name = folder.absolute() if isinstance(folder, Path) else folder
        model = LlavaForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
    processor.check(model.config)
    model.requires_grad_(recipe.stage == "full")
    model.model.vision_tower.requires_grad_(False)
    for module in (model.model.multi_modal_projector, *trained_tower(recipe, model).values()):
        module.requires_grad_(True)
    for parameter in model.parameters():
        dtype = torch.float32 if parameter.requires_grad else DTYPES[recipe.dtype]
        parameter.data = parameter.data.to(dtype)
    if recipe.stage != "lora":
        return model
    if checkpoint is not None:
        return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    return get_peft_model(model, lora_config(recipe, model))


def lora_config(recipe: Recipe, model: LlavaForConditionalGeneration) -> LoraConfig:
    """LoRA on all linear layers of the language model; the projector, and modules of a trained tower, in full.

    The regular expression matches full module paths, since the tower has layers named `q_proj`, too; it fits the names
    of all transformers versions.
    """
    modules = model.model.language_model.named_modules()
    leaves = sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)})
    lora = recipe.lora or Lora()
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"(?:.*\.)?language_model\.(?:.*\.)?(?:{'|'.join(leaves)})",
        modules_to_save=[PROJECTOR, *(f"{TOWER}.{name}" for name in trained_tower(recipe, model))],
    )


def trained_tower(recipe: Recipe, model: LlavaForConditionalGeneration) -> dict[str, nn.Module]:
    """The modules of the vision tower that the recipe trains, by name; none without `vision_learning_rate`.

    Raises:
        RecipeError: if `vision_layers` is more than the layers that LLaVA reads.
    """
    tower = model.model.vision_tower
    if recipe.vision_learning_rate is None:
        return {}
    n_read = max(tower.resolve(layer) for layer in feature_layers(model.config))
    n_trained = n_read if recipe.vision_layers is None else recipe.vision_layers
    if n_trained > n_read:
        raise RecipeError(f"vision_layers: {n_trained} is more than the {n_read} layers of the tower that LLaVA reads")
    modules: dict[str, nn.Module] = {}
    if recipe.vision_layers is None:
        modules = {"embeddings": tower.embeddings, "pre_layrnorm": tower.pre_layrnorm}
    first = n_read - n_trained
    return modules | {f"encoder.layers.{i}": tower.encoder.layers[i] for i in range(first, n_read)}
