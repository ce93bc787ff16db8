"""Names and configs of every LLaVA checkpoint layout, from and to ours.

    original    model.layers.*  model.embed_tokens.*  lm_head.*  model.mm_projector.{0,2}.*
                model.vision_tower.vision_tower.vision_model.*   (only in some: released files have no tower)
    hf, on disk, all versions    language_model.model.*  language_model.lm_head.*  multi_modal_projector.*
                                 vision_tower.vision_model.*
    hf, in memory, 4.57          model.language_model.*  lm_head.*  model.multi_modal_projector.*
                                 model.vision_tower.vision_model.*
    hf, in memory, ≥ 5.6         the same without `vision_model`   (also the names of our parameters)

The original config is flat (a Llama config with `mm_…` keys), HF's nests a text and a vision config.
Sources: haotian-liu/LLaVA (llava_arch.py, builder.py), transformers' convert_llava_weights_to_hf.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

from llava_fast.errors import blaming

LAYOUTS = ("hf", "original")

# From any HF name to ours. Applied in turn to each key; the patterns do not overlap.
KEY_MAPPING = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?multi_modal_projector\.": "model.multi_modal_projector.",
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": "model.vision_tower.",
}
# Ours and the classic HF names, which all versions of transformers read.
CLASSIC = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower.vision_model."),
)
# Ours and the original's, the projector apart.
ORIGINAL = (
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
)
EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
# Buffers that old files carry and newer code derives.
DERIVED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")

TEXT_CONFIGS = {"llava": LlamaConfig, "llava_llama": LlamaConfig, "llava_mistral": MistralConfig}
_SELECT = {"patch": "default", "cls_patch": "full"}
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
# What the released models name as their tower, so that its shape is known where its files are not.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}


def is_original(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is one of the original code; "llava" was its model_type before it was HF's."""
    kind = config.get("model_type")
    flat = "mm_vision_tower" in config and "text_config" not in config
    return kind in ("llava_llama", "llava_mistral") or (kind == "llava" and flat)


def classic_name(name: str) -> str:
    """HF's name on disk of one of our parameters."""
    for ours, theirs in CLASSIC:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name!r} is not the name of a parameter of this model")


def original_name(name: str, projector_type: str = "mlp2x_gelu") -> str:
    """The original's name of one of our parameters."""
    if match := re.fullmatch(r"model\.multi_modal_projector\.linear_(\d+)\.(weight|bias)", name):
        place = "" if projector_type == "linear" else f"{2 * int(match[1]) - 2}."
        return f"model.mm_projector.{place}{match[2]}"
    for ours, theirs in ORIGINAL:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name!r} is not the name of a parameter of this model")


def our_name(key: str) -> str:
    """Our name for a key of any layout; a key of none comes back as it is."""
    if match := re.fullmatch(r"(?:.*\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)", key):
        place = int(match[1] or 0)
        # In the original's nn.Sequential the odd places are the activations.
        return key if place % 2 else f"model.multi_modal_projector.linear_{place // 2 + 1}.{match[2]}"
    if key.startswith("model.vision_tower.vision_tower."):
        key = key.removeprefix("model.vision_tower.")
    elif re.match(r"model\.(layers|embed_tokens|norm)\.", key):
        return "model.language_model." + key.removeprefix("model.")
    for pattern, ours in KEY_MAPPING.items():
        key, found = re.subn(pattern, ours, key)
        if found:
            break
    return key


def projector_type(names: set[str] | Any) -> str:
    """`mm_projector_type` of a projector with these parameters (our names)."""
    count = sum(name.endswith(".weight") and ".multi_modal_projector." in name for name in names)
    return {0: "identity", 1: "linear"}.get(count, f"mlp{count}x_gelu")


# Configs


def llava_config(flat: dict[str, Any], vision: CLIPVisionConfig, file: Path) -> LlavaConfig:
    """HF's config of a model whose original config is `flat`.

    Like HF's own converter, the image gets a token of its own after the vocabulary and padding the one after that, and
    the embeddings grow to a multiple of 64; `original_vocab_size` keeps how many there were. A config that names its
    image token (as written by `original_config`) grows nothing.

    Args:
        flat: the original `config.json`.
        vision: of the tower.
        file: where `flat` is from, for messages.

    Raises:
        ValueError: naming file and key, for what neither this library nor the original code knows.
    """
    cls = TEXT_CONFIGS[flat["model_type"]]
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if type(flat.get(key)) is not int or flat[key] < 1:
            raise ValueError(f"{file}: {key} is {flat.get(key)!r}, expected a number")
    layer, select = flat.get("mm_vision_select_layer", -2), flat.get("mm_vision_select_feature", "patch")
    if type(layer) is not int:
        raise ValueError(f"{file}: mm_vision_select_layer is {layer!r}, expected a number")
    if select not in list(_SELECT):  # which, unlike the dict, takes any value
        raise ValueError(f"{file}: mm_vision_select_feature is {select!r}, expected 'patch' or 'cls_patch'")
    if flat.get("s2") or "unpad" in str(flat.get("mm_patch_merge_type")):
        raise ValueError(f"{file}: s2 and mm_patch_merge_type 'unpad' (LLaVA-NeXT) are not supported")
    kind = flat.get("mm_projector_type") or "linear"
    if not isinstance(kind, str) or not re.fullmatch(r"linear|identity|mlp[1-9]\d*x_gelu", kind):
        raise ValueError(f"{file}: mm_projector_type is {kind!r}; expected 'linear', 'mlpNx_gelu' or 'identity'")
    known = {*cls().to_dict(), "rope_theta", "rope_scaling", "torch_dtype", "sliding_window"} - {
        "architectures",
        "model_type",
        "transformers_version",
    }
    with blaming(file):
        text = cls.from_dict({key: value for key, value in flat.items() if key in known})
    extra = {}
    if isinstance(flat.get("image_token_index"), int):
        extra["image_token_index"] = flat["image_token_index"]
    else:
        vocabulary = text.vocab_size
        extra |= {"image_token_index": vocabulary, "original_vocab_size": vocabulary, "pad_token_id": vocabulary + 1}
        text.vocab_size = grown_vocabulary(vocabulary)
    with blaming(file):
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            vision_feature_layer=layer,
            vision_feature_select_strategy=_SELECT[select],
            image_seq_length=(vision.image_size // vision.patch_size) ** 2 + (select == "cls_patch"),
            mm_projector_type=kind,
            tie_word_embeddings=bool(flat.get("tie_word_embeddings", False)),
            **extra,
        )
    for key in ("mm_vision_tower", "image_aspect_ratio", "image_mean", "image_std", "tokenizer_model_max_length"):
        if flat.get(key) is not None:
            setattr(config, key, flat[key])
    config.dtype = text.dtype
    return config


def grown_vocabulary(size: int) -> int:
    """Rows of embeddings for a vocabulary and the image and padding tokens, a multiple of 64 as in HF's converter."""
    return -(-(size + 2) // 64) * 64


def kept_vocabulary(config: LlavaConfig) -> int:
    """Rows of embeddings that the original layout gets: those it came with, where nothing else was added since."""
    original, rows = getattr(config, "original_vocab_size", None), config.text_config.vocab_size
    return original if original is not None and rows == grown_vocabulary(original) else rows


def original_config(config: LlavaConfig, *, mm_vision_tower: str | None, tower_inside: bool) -> dict[str, Any]:
    """The original code's `config.json` of a model.

    Args:
        config: of the model.
        mm_vision_tower: CLIP directory or hub name that the original code reads its image processor from (and, without
            a tower inside, its tower). Default: the one this model came with, or OpenAI's where it has that shape.
        tower_inside: the tower is among the weights.

    Raises:
        ValueError: for what the original code cannot express, naming the key.
    """
    vision, text = config.vision_config, config.text_config
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"vision_feature_layer is {config.vision_feature_layer}; the original layout takes one layer, not a list"
        )
    for key, only in (
        ("projector_hidden_act", "gelu"),
        ("multimodal_projector_bias", True),
        ("image_attention", "causal"),
    ):
        if (value := getattr(config, key, only)) != only:
            raise ValueError(f"{key} is {value!r}; the original layout knows only {only!r}")
    tower = mm_vision_tower or getattr(config, "mm_vision_tower", None)
    if tower is None:
        same = (name for name, shape in KNOWN_TOWERS.items() if all(getattr(vision, k) == v for k, v in shape.items()))
        tower = next(same, None)
    if tower is None:
        raise ValueError(
            "the original layout names its CLIP directory, and this model does not say which: pass mm_vision_tower"
        )
    kind = "llava_mistral" if text.model_type == "mistral" else "llava_llama"
    left_out = ("_name_or_path", "head_dim", "transformers_version")
    flat = {key: value for key, value in text.to_diff_dict().items() if key not in left_out}
    if text.head_dim * text.num_attention_heads != text.hidden_size:
        flat["head_dim"] = text.head_dim
    # transformers 4.37, which the original code pins, wants exactly `type` and `factor`.
    flat |= legacy_rope(flat.pop("rope_parameters"), "type")
    flat |= {
        "architectures": ["LlavaMistralForCausalLM" if kind == "llava_mistral" else "LlavaLlamaForCausalLM"],
        "model_type": kind,
        "vocab_size": kept_vocabulary(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_mm_proj": True,
        "mm_projector_type": getattr(config, "mm_projector_type", "mlp2x_gelu"),
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_tower": str(tower),
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch" if config.vision_feature_select_strategy == "default" else "cls_patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": getattr(config, "image_aspect_ratio", "pad"),
        # The original code reads a tower that is among the weights only when it is told that it was trained.
        "unfreeze_mm_vision_tower": tower_inside,
        # Not of the original: the shape of the tower for readers that do not have its directory.
        "mm_vision_config": {key: v for key, v in vision.to_diff_dict().items() if key not in left_out},
    }
    if flat["vocab_size"] == text.vocab_size:
        flat["image_token_index"] = config.image_token_index
    for key in ("image_mean", "image_std", "tokenizer_model_max_length"):
        if getattr(config, key, None) is not None:
            flat[key] = list(value) if isinstance(value := getattr(config, key), tuple) else value
    dtype = flat.pop("dtype", None) or config.dtype
    if dtype is not None:
        flat["torch_dtype"] = str(dtype).removeprefix("torch.")
    return flat


def legacy_rope(parameters: dict[str, Any], kind_key: str = "rope_type") -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, as transformers 4 reads them, from the `rope_parameters` of transformers 5."""
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "rope_type", "type")}
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return {"rope_theta": parameters["rope_theta"], "rope_scaling": None}
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": {kind_key: kind, **scaling}}


@contextmanager
def readable_by_transformers_4(config: LlavaConfig, dtype: torch.dtype) -> Iterator[None]:
    """While this lasts, `config` is written so that transformers 4 reads it as transformers 5 does.

    The rotary settings get their old names, too: without them 4.45 and 4.57 take a base of 10,000 for every model, and
    say nothing. The parts get the dtype of the whole, which 4.57 believes where it differs.
    """
    # Not through the config's properties, which would change rope_parameters.
    text, vision = vars(config.text_config), vars(config.vision_config)
    name = str(dtype).removeprefix("torch.")
    changes = [(text, {**legacy_rope(text["rope_parameters"]), "dtype": name}), (vision, {"dtype": name})]
    before = [(settings, dict(settings)) for settings, _ in changes]
    for settings, new in changes:
        settings.update(new)
    try:
        yield
    finally:
        for settings, old in before:
            settings.clear()
            settings.update(old)


def check_layout(layout: str, with_tower: bool, mm_vision_tower: str | None) -> None:
    """ValueError for an unknown layout, or for options of the original one where HF's is asked for."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected {' or '.join(map(repr, LAYOUTS))}")
    if layout == "hf" and not (with_tower and mm_vision_tower is None):
        raise ValueError("with_tower and mm_vision_tower are for layout='original'; the HF layout has its tower")


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """A floating dtype from its name; None and "auto" stay undecided.

    Raises:
        ValueError: for another name.
    """
    if name in (None, "auto"):
        return None
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype {name!r} is not a floating dtype such as float32, bfloat16 or float16")
    return dtype
