"""One-line errors that name the file, key or value."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Packages of the extras of llava-fast, as they are imported.
EXTRAS = dict.fromkeys(("accelerate", "google", "peft", "pyarrow", "pydantic", "sentencepiece", "yaml"), "train")


def missing_extra(error: ModuleNotFoundError) -> str:
    """How to install a package that could not be imported; an empty string if no extra of llava-fast installs it."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    return f"{package} is not installed; pip install 'llava-fast[{extra}]' brings it" if extra else ""


def one_line(value: Any, limit: int = 200) -> str:
    """Untrusted text made safe for an error message: no line breaks or control characters, shortened in the middle."""
    text = " ".join(str(value).split())
    if len(text) > limit:
        text = text[: limit // 2] + "…" + text[-limit // 2 :]
    return text if text.isprintable() else repr(text)[1:-1]


@contextmanager
def blaming(file: str | os.PathLike) -> Iterator[None]:
    """Convert any exception raised inside the block into a ValueError of one line that names `file`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__} "  # KeyError('x') is 'x'
        raise ValueError(f"{file}: {kind}{one_line(error, 300)}") from error
