"""`save_pretrained` in HF's or the original layout, and `save_projector`."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from llava_fast.checkpoint.layouts import (
    EMBEDDINGS,
    HEAD,
    PROJECTOR,
    check_layout,
    classic_name,
    original_config,
    original_name,
    original_names,
    readable_by_transformers_4,
)
from llava_fast.checkpoint.weights import write_bytes, write_text
from llava_fast.model.pretrained import LlavaPreTrainedModel


class SaveMixin(LlavaPreTrainedModel):
    """`save_pretrained` and `save_projector`."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        layout: str = "hf",
        with_tower: bool = True,
        mm_vision_tower: str | None = None,
        save_original_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write config and safetensors.

        Args:
            layout: "hf", which transformers 4.36 to 5.x load, or "original", which the original LLaVA code loads.
            with_tower: for "original": put the vision tower among the weights; the released files have none.
            mm_vision_tower: for "original": CLIP directory or hub name to write into its config; default: that of the
                checkpoint from which the model was loaded.
            save_original_format: for "hf": False writes the parameter names that transformers ≥ 5.6 has in memory, as
                its own models do; transformers 4 cannot load them.
            args, kwargs: transformers' arguments (max_shard_size, variant …).

        Raises:
            ValueError: for another layout, or a model that the original config cannot express; nothing is written.
        """
        check_layout(layout, with_tower, mm_vision_tower)
        config = self.config
        if layout != "hf" and not save_original_format:
            raise ValueError("save_original_format=False goes with layout='hf'; the original has names of its own")
        kwargs["save_original_format"] = False  # the base class has no mapping for our class
        weights = self.state_dict() if state_dict is None else state_dict
        if config.tie_word_embeddings:
            weights = {name: weight for name, weight in weights.items() if name != HEAD}
        if layout == "hf":
            # Of a model with adapters (`add_adapter`), transformers writes these alone, in peft's format.
            if save_original_format and not getattr(self, "_hf_peft_config_loaded", False):
                weights = {classic_name(name): weight for name, weight in weights.items()}
            with readable_by_transformers_4(config, self.dtype):
                super().save_pretrained(save_directory, is_main_process, weights, push_to_hub, *args, **kwargs)
            return
        if push_to_hub:
            raise ValueError("push_to_hub goes with layout='hf'; write the original layout to a directory")
        flat = original_config(config, mm_vision_tower=mm_vision_tower, tower_inside=with_tower, dtype=self.dtype)
        rows = flat["vocab_size"]
        weights = {
            theirs: (weights[name][:rows] if name in (EMBEDDINGS, HEAD) else weights[name]).contiguous()
            for name, theirs in original_names(weights, flat, with_tower=with_tower).items()
        }
        super().save_pretrained(save_directory, is_main_process, weights, push_to_hub, *args, **kwargs)
        if is_main_process:
            write_text(Path(save_directory) / "config.json", json.dumps(flat, indent=2, sort_keys=True) + "\n")

    def save_projector(self, file: str | os.PathLike) -> None:
        """Write the projector alone, as the original code's stage 1 does: `mm_projector.bin`, or `.safetensors`.

        Raises:
            ValueError: for another file extension.
            OSError: if it cannot be written; an existing file is left unchanged.
        """
        file = Path(file)
        kind = getattr(self.config, "mm_projector_type", "mlp2x_gelu")
        weights = {
            original_name(name, kind): weight.detach().cpu().clone()
            for name, weight in self.state_dict().items()
            if name.startswith(PROJECTOR)
        }
        if file.suffix == ".safetensors":
            data = safetensors.torch.save(weights)
        elif file.suffix == ".bin":
            buffer = io.BytesIO()
            torch.save(weights, buffer)
            data = buffer.getvalue()
        else:
            raise ValueError(f"{file} ends in {file.suffix!r}; expected .bin or .safetensors")
        partial = file.with_name(f".{file.name}.partial")
        try:
            write_bytes(partial, [data])
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
