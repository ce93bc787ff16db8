"""Names of models: a directory of this machine, or the id of a model on the Hugging Face hub.

A name that is a directory is that directory. `organisation/name` is otherwise an id: its files are downloaded into the
hub's cache, once, and everything else works with the directory there. Any other name is a path.

Only files that this library reads are downloaded: settings, tokenizer, and weights in one format (safetensors before
`.bin`); never code. huggingface_hub's environment variables (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN) apply.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from llava_fast.errors import one_line

logger = logging.getLogger(__name__)

# Beginnings of the names of weight files. Of each, one format is downloaded: safetensors if it is there, else `.bin`.
MODEL = ("model", "adapter_model", "non_lora_trainables")
PROJECTOR = ("mm_projector",)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILE_SUFFIXES = (".bin", ".ckpt", ".gguf", ".json", ".pt", ".pth", ".safetensors", ".yaml", ".yml")
_SETTINGS = re.compile(r"[\w.-]+\.(json|jinja|model|txt)|additional_chat_templates/[\w.-]+\.jinja", re.ASCII)
# An unreachable hub is an error, or the cached copy is used, after this time; huggingface_hub would retry each file.
_PATIENCE_S = 4.0


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id: two words around one slash, without the suffix of a file."""
    if not _ID.fullmatch(name) or name.endswith(_FILE_SUFFIXES):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def local_folder(name: str | os.PathLike, weights: Iterable[str] = MODEL, *, subfolder: str = "", **hub: Any) -> Path:
    """The directory of a model's files.

    Args:
        name: a directory, or a hub id.
        weights: `MODEL` or `PROJECTOR`: the weights to download with an id's settings; () for the settings alone.
        subfolder: of a repository, from which files are downloaded instead of its root.
        hub: revision, token, cache_dir, force_download, local_files_only, as in `huggingface_hub.snapshot_download`.

    Raises:
        OSError: one line: there is no such directory, no such model on the hub, or the hub cannot be reached and its
            cache lacks the model.
    """
    folder, name = Path(name), os.fspath(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{name} is a file, expected the directory of a model")
    if not is_id(name):
        raise FileNotFoundError(f"no directory {name}")
    try:
        if hub.get("local_files_only"):
            raise LocalEntryNotFoundError("nothing is downloaded")
        asked = {key: hub[key] for key in ("revision", "token") if key in hub}
        found = HfApi().model_info(name, timeout=_PATIENCE_S, **asked)
    except Exception as error:  # errors of the network, whose types depend on huggingface_hub's version
        return _cached(name, weights, subfolder, _reason(name, error, hub), hub)
    inside = f"{subfolder}/" if subfolder else ""
    files = [file.rfilename for file in found.siblings or ()]
    files = [file.removeprefix(inside) for file in files if file.startswith(inside)]
    wanted = [file for file in files if _SETTINGS.fullmatch(file) and ".index." not in file]
    wanted += _weight_files(files, weights)
    try:
        return Path(snapshot_download(name, allow_patterns=[inside + file for file in wanted], **hub))
    except Exception as error:
        raise OSError(f"{name} was not downloaded completely: {_reason(name, error, hub)}") from error


def _weight_files(files: list[str], families: Iterable[str]) -> list[str]:
    """The weight files to download, of the files in a folder: one file or shards, in the first format there is."""
    chosen: list[str] = []
    for family in families:
        stem = f"(?:{family}|pytorch_model)" if family == "model" else family
        for end in ("safetensors", "bin"):
            whole = re.compile(rf"{stem}\.{end}")
            shards = re.compile(rf"{stem}(?:-\d+-of-\d+\.{end}|\.{end}\.index\.json)", re.ASCII)
            found = [file for file in files if whole.fullmatch(file)] or [f for f in files if shards.fullmatch(f)]
            if found:
                chosen += found
                break
    return chosen


def _cached(name: str, weights: Iterable[str], subfolder: str, reason: str, hub: dict[str, Any]) -> Path:
    """The copy in the hub's cache of a model that cannot be downloaded. Without one the error gives the `reason`."""
    try:
        cached = Path(snapshot_download(name, allow_patterns=[], **{**hub, "local_files_only": True}))
    except LocalEntryNotFoundError:
        raise FileNotFoundError(f"no directory {name}, and {reason}") from None
    here = [file.name for file in (cached / subfolder).glob("*")]
    if weights and not _weight_files(here, weights):
        raise FileNotFoundError(f"no weights are in {cached / subfolder}, the copy of {name}, and {reason}")
    logger.info("%s; the copy in %s is used", reason, cached)
    return cached


def _reason(name: str, error: Exception, hub: dict[str, Any]) -> str:
    """Why a model could not be downloaded, in one line."""
    where = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its terms on {where}/{name}, then `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {hub.get('revision')!r} on {where}"
    if isinstance(error, RepositoryNotFoundError):
        return f"no model {name} is on {where} (if it is private: `hf auth login`)"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        flag = "HF_HUB_OFFLINE" if isinstance(error, OfflineModeIsEnabled) else "local_files_only"
        cache = hub.get("cache_dir") or constants.HF_HUB_CACHE
        return f"the cache {cache} does not have it; {flag} forbids downloading it"
    return f"{where} cannot be reached: {one_line(error) or type(error).__name__}"
