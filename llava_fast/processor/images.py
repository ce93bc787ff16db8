"""Pictures from anywhere as RGB, or one line saying why not.

What comes in is not trusted: a file is refused by what its header says before anything is decoded (more pixels than
PIL's limit, a format outside of `FORMATS`, a file larger than `MAX_FILE_BYTES`), and whatever a decoder raises becomes
a ValueError that names the file. Nothing but a regular file is opened, so a pipe cannot make a run wait for ever.

The pixels are those of LLaVA's `convert("RGB")`: of an animation the first frame, without alpha channel, 16 bits
clipped to 8, a palette looked up, CMYK converted without a colour profile. EXIF orientation is not applied: neither
LLaVA nor transformers' image processors turn a picture (transformers' `load_image`, which fetches URLs, does).
"""

from __future__ import annotations

import os
import stat
from functools import cache
from os import PathLike

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image

from llava_fast.errors import one_line

# Formats that pictures come in. PIL has readers for more, some of which start other programs (EPS: Ghostscript).
FORMATS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 MPO PCX PNG PPM QOI TGA TIFF WEBP".split()
MAX_FILE_BYTES = 2**30  # some readers take in the whole file to learn its size in pixels


def read_rgb(source: Image.Image | str | PathLike | np.ndarray | torch.Tensor) -> Image.Image:
    """Open a picture in any PIL mode as RGB, decoded.

    Args:
        source: a PIL image, a file, an http(s) URL, or a uint8 array or tensor ([H, W], [H, W, C] or [C, H, W]).
    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for one that is no picture, is cut short or has more pixels than PIL allows; one line, with the
            file's name.

    As in LLaVA this is `convert("RGB")` alone: EXIF orientation is not applied, 16-bit values are clipped and an
    alpha channel is dropped (recent transformers lay it on white, which LLaVA's weights have never seen).
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        source = _from_array(source)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"(a PIL image, {source.mode})"
    elif isinstance(source, (str, PathLike)):
        name = os.fspath(source)
        if not _is_inline(name):
            _check_file(name)
    else:
        raise ValueError(f"an image is a PIL image, a file name or an array, not {type(source).__name__}")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        with load_image(name) if _is_inline(name) else Image.open(name, formats=_formats()) as opened:
            return _to_rgb(opened)
    except Exception as error:  # decoders raise all sorts: OSError, SyntaxError, struct.error, zlib.error ...
        reason = one_line(error, 300) or type(error).__name__
        raise ValueError(f"cannot read image {one_line(name)}: {reason}") from error


def check_area(width: int, height: int) -> None:
    """ValueError for more pixels than PIL's limit, `Image.MAX_IMAGE_PIXELS`.

    PIL itself only warns up to twice its limit, and knows nothing of what padding or resizing will make.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width}x{height} pixels are more than the limit of {limit} (decompression bomb?)")


def expand_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Centre an image on a square of `color` as wide as its longer side; on an odd margin, left and top are less."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _to_rgb(image: Image.Image) -> Image.Image:
    check_area(*image.size)
    if 0 in image.size:
        raise ValueError(f"{image.width}x{image.height} pixels")
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("pixels that are NaN or infinite")
    return image.convert("RGB")


def _check_file(name: str) -> None:
    try:
        status = os.stat(name)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(f"no image file {one_line(name)}")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"cannot read image {one_line(name)}: {status.st_size} bytes, at most {MAX_FILE_BYTES}")


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this PIL can read; given one that it cannot, `Image.open` would raise KeyError."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _is_inline(name: str) -> bool:
    """Whether a string is a URL, or a picture in base64 as chat templates allow, rather than a file."""
    return name.startswith(("http://", "https://", "data:image/")) or len(name) > 4096


def _from_array(source: np.ndarray | torch.Tensor) -> Image.Image:
    dtype, shape = str(source.dtype).removeprefix("torch."), list(source.shape)
    if dtype != "uint8" or len(shape) not in (2, 3):
        raise ValueError(f"an image array is uint8 with 2 or 3 dimensions, not {dtype} {shape}")
    array = np.asarray(source)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if 0 in array.shape or array.shape[2:] not in ((), (1,), (2,), (3,), (4,)):
        raise ValueError(f"an image array is [H, W], [H, W, C] or [C, H, W] with 1 to 4 channels, not {shape}")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))
