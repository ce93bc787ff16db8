"""Converts a checkpoint to another layout, tensor by tensor, without a model in memory.

The result is written to a temporary directory beside the target, read back and compared, and then renamed, so the
target is complete or absent. Memory is bounded except for an adapter, which peft merges into a model in memory.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TypedDict

import torch

from llava_fast.checkpoint.adapter import is_adapter
from llava_fast.checkpoint.layouts import (
    EMBEDDINGS,
    HEAD,
    check_layout,
    classic_name,
    dtype_of,
    original_config,
    original_names,
    readable_by_transformers_4,
)
from llava_fast.checkpoint.reader import OpenCheckpoint, Pieces, open_checkpoint
from llava_fast.checkpoint.strict import check_checkpoint
from llava_fast.checkpoint.weights import (
    in_memory,
    parse_size,
    read_json,
    sync_entry,
    verify,
    write_text,
    write_weights,
)
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.hub import local_folder
from llava_fast.processor.processor import LlavaProcessor

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSOR_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)


class Converted(TypedDict):
    """The result of `convert`."""

    target: Path
    layout: str
    tensors: int
    bytes: int
    shards: int


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    layout: str,
    vision_tower: str | os.PathLike | None = None,
    mm_projector: str | os.PathLike | None = None,
    base_model: str | os.PathLike | None = None,
    with_tower: bool = True,
    mm_vision_tower: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> Converted:
    """Write the checkpoint `source`, a directory or hub id of any layout, to the new directory `target`.

    Args:
        layout: "hf" or "original".
        vision_tower, mm_projector, base_model: as in `from_pretrained`.
        with_tower, mm_vision_tower: as in `save_pretrained`.
        dtype: of all weights; None leaves each tensor as it is.
        max_shard_size: bytes, or text such as "5GB".

    Raises:
        FileExistsError: if `target` exists.
        OSError, ValueError: one line that names file, key or value; `target` is not created.
    """
    target = Path(target)
    check_layout(layout, with_tower, mm_vision_tower)
    shard_bytes, dtype = parse_size(max_shard_size), dtype_of(dtype)
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; it is not overwritten")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"no directory {target.absolute().parent} to put {target.name} in")
    opened = _open(local_folder(source), base_model, {"vision_tower": vision_tower, "mm_projector": mm_projector})
    check_checkpoint(LlavaForConditionalGeneration, opened)
    config = opened.config
    weights = {name: stored.to(dtype) for name, stored in opened.weights.items()}
    # A loaded model has one dtype; use that of the language model.
    config.dtype = dtype or next(stored.dtype for name, stored in weights.items() if ".language_model." in name)
    processor = None
    if layout == "hf" and opened.layout == "original" and _has_tokenizer(opened.path):
        processor = LlavaProcessor.for_original(opened.path, config)
    flat = None
    if layout == "hf":
        weights = {classic_name(name): stored for name, stored in weights.items()}
    else:
        flat = original_config(config, mm_vision_tower=mm_vision_tower, tower_inside=with_tower, dtype=config.dtype)
        weights = {
            theirs: weights[name].rows(flat["vocab_size"]) if name in (EMBEDDINGS, HEAD) else weights[name]
            for name, theirs in original_names(weights, flat, with_tower=with_tower).items()
        }
    n_bytes = sum(stored.nbytes for stored in weights.values())
    free = shutil.disk_usage(target.absolute().parent).free
    if n_bytes > free:
        raise OSError(f"{target} needs {n_bytes / 2**30:.2f} GiB, but its disk has {free / 2**30:.2f} GiB left")

    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.absolute().parent))
    try:
        _permit(partial)
        if flat is None:
            config.architectures = ["LlavaForConditionalGeneration"]
            with readable_by_transformers_4(config, config.dtype):
                config.save_pretrained(partial)
        else:
            write_text(partial / "config.json", json.dumps(flat, indent=2, sort_keys=True) + "\n")
        if processor is not None:
            processor.save_pretrained(partial)
        else:
            for name in PROCESSOR_FILES:
                if (opened.path / name).is_file():
                    shutil.copyfile(opened.path / name, partial / name)
        _copy_generation_config(opened.path, partial)
        digests = write_weights(partial, weights, shard_bytes)
        verify(partial, weights, digests)
        if with_tower:
            check_checkpoint(LlavaForConditionalGeneration, open_checkpoint(partial))
        sync_entry(partial)
        partial.rename(target)
        sync_entry(target.absolute().parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shards = len(list(target.glob("*.safetensors")))
    return Converted(target=target, layout=layout, tensors=len(weights), bytes=n_bytes, shards=shards)


def _open(source: Path, base_model: str | os.PathLike | None, pieces: Pieces) -> OpenCheckpoint:
    if not is_adapter(source):
        if base_model is not None:
            raise ValueError(f"base_model is for adapters, and {source} has no adapter_config.json")
        return open_checkpoint(source, **pieces)
    model = LlavaForConditionalGeneration.from_pretrained(source, base_model=base_model, dtype="auto", **pieces)
    tied = model.config.tie_word_embeddings
    weights = {
        name: in_memory(weight, f"{source}: {name}")
        for name, weight in model.state_dict().items()
        if not (tied and name == HEAD)
    }
    layout = "original" if hasattr(model.config, "mm_vision_tower") else "hf"
    base = local_folder(model.name_or_path, ())
    with_tokenizer = (folder for folder in (source, base) if _has_tokenizer(folder))
    return OpenCheckpoint(next(with_tokenizer, source), layout, model.config, weights)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _copy_generation_config(source: Path, target: Path) -> None:
    """Copy only the token ids: transformers 5 refuses to save the sampling settings of old files."""
    file = source / "generation_config.json"
    if file.is_file():
        ids = {key: value for key, value in read_json(file).items() if key.endswith("_token_id")}
        write_text(target / file.name, json.dumps(ids, indent=2, sort_keys=True) + "\n")


def _permit(folder: Path) -> None:
    """Give a temporary directory the permissions of an ordinary one."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
