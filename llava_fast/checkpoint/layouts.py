"""Translates parameter names and configs between LLaVA's checkpoint layouts and ours; `NAMES` is the table of names.

The original config is flat (a Llama config with `mm_…` keys), HF's nests a text and a vision config.
Sources: haotian-liu/LLaVA (llava_arch.py, builder.py), transformers' convert_llava_weights_to_hf.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

from llava_fast.errors import blaming
from llava_fast.model.language import text_config
from llava_fast.model.vision import tower_config

LAYOUTS = ("hf", "original")


class Names(NamedTuple):
    """Prefixes of parameter names in each layout; the rest of a name is the same everywhere, except the projector's."""

    ours: str  # also HF's in memory since 5.6
    on_disk: str  # HF's on disk, all versions
    in_memory_4: str  # HF's in memory, transformers 4.57
    original: str
    modules: tuple[str, ...] = ("",)  # follow the original's prefix, as its language model's is that of all names

    def hf(self) -> list[str]:
        """Every prefix that an HF file may use, longest first: `vision_model.` may be missing."""
        names = {self.ours, self.on_disk, self.in_memory_4}
        return sorted(names | {name.replace("vision_model.", "") for name in names}, key=len, reverse=True)


LANGUAGE, PROJECTOR, TOWER = "model.language_model.", "model.multi_modal_projector.", "model.vision_tower."
_TEXT, _CLIP = ("embed_tokens.", "layers.", "norm."), ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
# fmt: off
NAMES = (
    #     ours       HF on disk                    HF in memory, 4.57                  the original
    Names(LANGUAGE,  "language_model.model.",      "model.language_model.",            "model.", _TEXT),
    Names("lm_head.", "language_model.lm_head.",   "lm_head.",                         "lm_head."),
    Names(PROJECTOR, "multi_modal_projector.",     "model.multi_modal_projector.",     "model.mm_projector.", ()),
    Names(TOWER,     "vision_tower.vision_model.", "model.vision_tower.vision_model.",
                                                   "model.vision_tower.vision_tower.vision_model.", _CLIP),
)
# fmt: on
TOWER_MODULES = tuple(TOWER + module for module in _CLIP)
EMBEDDINGS, HEAD = f"{LANGUAGE}embed_tokens.weight", "lm_head.weight"
# From HF's names to ours, as transformers' `key_mapping`: patterns are applied to each key in order.
KEY_MAPPING = {f"^{re.escape(theirs)}": names.ours for names in NAMES for theirs in names.hf() if theirs != names.ours}
# Pairs of a prefix of any layout and ours, longest first.
_KNOWN = sorted(
    {(theirs, names.ours) for names in NAMES for theirs in names.hf()}
    | {
        (beginning + module, names.ours + module)
        for names in NAMES
        for beginning in (names.original, names.original.replace("vision_model.", ""))
        for module in names.modules
    },
    key=lambda pair: -len(pair[0]),
)
_ORIGINAL_PROJECTOR = re.compile(r"(?:.*\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)")
# Buffers that old files contain and newer code computes.
DERIVED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")

TEXT_CONFIGS: dict[str, type[LlamaConfig | MistralConfig]]
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
# Towers that the released models refer to: their shapes are known even if their files are not here.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}


def is_original(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is in the original layout, whose early versions used the model_type "llava", too."""
    kind = config.get("model_type")
    flat = "mm_vision_tower" in config and "text_config" not in config
    return kind in ("llava_llama", "llava_mistral") or (kind == "llava" and flat)


def our_name(key: str) -> str:
    """Our name for a key of any layout; an unknown key is returned unchanged."""
    if match := _ORIGINAL_PROJECTOR.fullmatch(key):
        place = int(match[1] or 0)
        # Odd indices of the original's nn.Sequential are the activations.
        return key if place % 2 else f"{PROJECTOR}linear_{place // 2 + 1}.{match[2]}"
    for theirs, ours in _KNOWN:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def hf_names(name: str) -> list[str]:
    """Every name that a parameter of ours has in HF's layouts, on disk and in memory."""
    names = _names(name)
    return [theirs + name.removeprefix(names.ours) for theirs in names.hf()]


def classic_name(name: str) -> str:
    """HF's name on disk of one of our parameters."""
    names = _names(name)
    return names.on_disk + name.removeprefix(names.ours)


def original_name(name: str, projector_type: str = "mlp2x_gelu") -> str:
    """The original's name of one of our parameters."""
    names = _names(name)
    rest = name.removeprefix(names.ours)
    if names.ours == PROJECTOR:
        match = re.fullmatch(r"linear_(\d+)\.(weight|bias)", rest)
        if match is None:
            raise ValueError(f"{name!r} is not the name of a parameter of this model")
        rest = match[2] if projector_type == "linear" else f"{2 * int(match[1]) - 2}.{match[2]}"
    return names.original + rest


def original_names(names: Iterable[str], flat: dict[str, Any], *, with_tower: bool) -> dict[str, str]:
    """Our names to the original's, for the parameters that a checkpoint with the config `flat` contains."""
    kept = (name for name in names if with_tower or not name.startswith(TOWER))
    return {name: original_name(name, flat["mm_projector_type"]) for name in kept}


def _names(name: str) -> Names:
    for names in NAMES:
        if name.startswith(names.ours):
            return names
    raise ValueError(f"{name!r} is not the name of a parameter of this model")


def projector_type(names: Iterable[str]) -> str:
    """`mm_projector_type` of a projector with these parameters (our names)."""
    count = sum(name.startswith(PROJECTOR) and name.endswith(".weight") for name in names)
    return {0: "identity", 1: "linear"}.get(count, f"mlp{count}x_gelu")


# Configs


def image_tokens(vision: CLIPVisionConfig, strategy: str) -> int:
    """Tokens of one image: the patches, and with the strategy "full" the CLS token.

    Raises:
        ValueError: for a config with non-square images.
    """
    image, patch = vision.image_size, vision.patch_size
    if not isinstance(image, int) or not isinstance(patch, int):
        raise ValueError(f"image_size is {image!r} and patch_size {patch!r}, expected a number")
    return (image // patch) ** 2 + (strategy == "full")


def llava_config(flat: dict[str, Any], vision: CLIPVisionConfig, file: Path) -> LlavaConfig:
    """HF's config of a model whose original config is `flat`.

    As in HF's own converter, an image token and a padding token are appended to the vocabulary, and the embeddings grow
    to a multiple of 64; `original_vocab_size` stores the number of rows before. If the config names its image token (as
    written by `original_config`), nothing is appended.

    Args:
        flat: the original `config.json`.
        vision: the tower's config.
        file: the file of `flat`, for messages.

    Raises:
        ValueError: naming file and key, for unsupported values.
    """
    cls = TEXT_CONFIGS[flat["model_type"]]
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if type(flat.get(key)) is not int or flat[key] < 1:
            raise ValueError(f"{file}: {key} is {flat.get(key)!r}, expected a number")
    layer, select = flat.get("mm_vision_select_layer", -2), flat.get("mm_vision_select_feature", "patch")
    if type(layer) is not int:
        raise ValueError(f"{file}: mm_vision_select_layer is {layer!r}, expected a number")
    if select not in list(_SELECT):  # a dict would raise TypeError for a list
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
    strategy = _SELECT[select]
    settings: dict[str, Any] = {
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "mm_projector_type": kind,
        "tie_word_embeddings": bool(flat.get("tie_word_embeddings", False)),
    }
    if isinstance(flat.get("image_token_index"), int):
        settings["image_token_index"] = flat["image_token_index"]
    else:
        size = text.vocab_size
        settings |= {"image_token_index": size, "original_vocab_size": size, "pad_token_id": size + 1}
        text.vocab_size = grown_vocabulary(size)
    with blaming(file):
        settings["image_seq_length"] = image_tokens(vision, strategy)
        config = LlavaConfig(vision_config=vision, text_config=text, **settings)
    for key in ("mm_vision_tower", "image_aspect_ratio", "image_mean", "image_std", "tokenizer_model_max_length"):
        if flat.get(key) is not None:
            setattr(config, key, flat[key])
    config.dtype = text.dtype
    return config


def grown_vocabulary(size: int) -> int:
    """Embedding rows for a vocabulary plus image and padding token, rounded up to a multiple of 64 as in HF's code."""
    return -(-(size + 2) // 64) * 64


def kept_vocabulary(config: LlavaConfig) -> int:
    """Embedding rows to write in the original layout: its original number, unless tokens were added since."""
    original, rows = getattr(config, "original_vocab_size", None), text_config(config).vocab_size
    return original if original is not None and rows == grown_vocabulary(original) else rows


def original_config(
    config: LlavaConfig, *, mm_vision_tower: str | None, tower_inside: bool, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The original code's `config.json` of a model.

    Args:
        config: the model's config.
        mm_vision_tower: CLIP directory or hub name from which the original code loads its image processor (and its
            tower, unless `tower_inside`). Default: that of the loaded checkpoint, or OpenAI's if the shape is equal.
        tower_inside: whether the tower's weights are in the checkpoint.
        dtype: of the weights; default: the config's.

    Raises:
        ValueError: naming the key, for a model that the original config cannot express.
    """
    vision, text = tower_config(config), text_config(config)
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
            "the original layout names its CLIP directory, and this model does not say which: pass mm_vision_tower=NAME"
        )
    kind = "llava_mistral" if text.model_type == "mistral" else "llava_llama"
    left_out = ("_name_or_path", "head_dim", "transformers_version")
    flat: dict[str, Any] = {key: value for key, value in text.to_diff_dict().items() if key not in left_out}
    if text.head_dim is not None and text.head_dim * text.num_attention_heads != text.hidden_size:
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
        # The original code loads a tower from the checkpoint only if this key says that the tower was trained.
        "unfreeze_mm_vision_tower": tower_inside,
        # Our own key: the tower's config, for loading without the tower's directory.
        "mm_vision_config": {key: v for key, v in vision.to_diff_dict().items() if key not in left_out},
    }
    if flat["vocab_size"] == text.vocab_size:
        flat["image_token_index"] = config.image_token_index
    for key in ("image_mean", "image_std", "tokenizer_model_max_length"):
        if getattr(config, key, None) is not None:
            flat[key] = list(value) if isinstance(value := getattr(config, key), tuple) else value
    of_text = flat.pop("dtype", None)
    if (named := dtype or of_text or config.dtype) is not None:
        flat["torch_dtype"] = str(named).removeprefix("torch.")
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
    """Inside this context `config` is saved in a form that transformers 4 and 5 both read correctly.

    Rotary settings are also written under their old names: without these 4.45 and 4.57 silently use a base of 10,000.
    Text and vision config get the model's dtype, because 4.57 prefers theirs to the model's.
    """
    # `vars`, because the config's properties would change rope_parameters.
    text, vision = vars(text_config(config)), vars(tower_config(config))
    name = str(dtype).removeprefix("torch.")
    changes: list[tuple[dict[str, Any], dict[str, Any]]]
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
    """ValueError for an unknown layout, or for options of the original layout with `layout="hf"`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected {' or '.join(map(repr, LAYOUTS))}")
    if layout == "hf" and not (with_tower and mm_vision_tower is None):
        given = "with_tower=False" if not with_tower else f"mm_vision_tower={mm_vision_tower}"
        raise ValueError(f"{given} is for layout=original; the HF layout has its tower")


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """A floating dtype from its name; None for None and "auto".

    Raises:
        ValueError: for another name.
    """
    if name in (None, "auto"):
        return None
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype {name!r} is not a floating dtype such as float32, bfloat16 or float16")
    return dtype
