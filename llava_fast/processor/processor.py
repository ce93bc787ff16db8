"""`LlavaProcessor`: images and prompts to a batch; a drop-in for transformers' class of that name.

Intended differences from transformers:
- pixels are uint8 [N, H, W, 3] and the model normalises them; with `processor.pixels = "float"` they are transformers'
  [N, 3, H, W], for a model of transformers;
- the number of tokens of an image is checked when the processor is created, not only in the model;
- tensors of rows of unequal length are padded by default, where transformers raises an error;
- images are always converted to RGB, and the order of an array's channels is detected;
- a bad image, or a row whose `<image>` marks do not match its images, is an error of one line with the file or the row.

Files are those of transformers, so either library loads what the other saved.
"""

from __future__ import annotations

import base64
import io
import os
import re
import stat
from collections.abc import Sequence
from functools import cache
from os import PathLike
from typing import Any, Literal, TypeGuard, cast

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, LlavaConfig, LlavaImageProcessorPil
from transformers.image_utils import httpx  # which package this is depends on the version of huggingface-hub
from transformers.processing_utils import MultiModalData, ProcessingKwargs

from llava_fast.errors import one_line
from llava_fast.model.vision import pixel_normalisation
from llava_fast.ops.patch_embed import Normalisation, check_same, folded, note_normalisation, noted_normalisation
from llava_fast.ops.resize import preprocess
from llava_fast.processor.files import FilesMixin

# transformers marks control tokens in a user's text with this character (`sanitize_control_tokens`).
_USER_TEXT_FENCE = "\U000f0000"

# Allowed image formats. PIL reads more, for some of which it starts other programs (EPS: Ghostscript).
FORMATS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 MPO PCX PNG PPM QOI TGA TIFF WEBP".split()
MAX_FILE_BYTES = 2**30  # some PIL readers load the whole file to get its size in pixels


def _size(setting: Any) -> dict[str, int]:
    """An image processor's `size` or `crop_size` as a plain dict; its class depends on the transformers version."""
    return {key: value for key, value in dict(setting or {}).items() if value is not None}


def _listed(images: Any) -> list[Any]:
    """No image, one, or several (a list, or an array of four dimensions) as a list."""
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        return list(images)
    return [] if images is None else [images]


class _Batch(BatchFeature):
    """A batch that keeps the normalisation note on its uint8 pixels when it moves to another device."""

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        noted = noted_normalisation(self.data.get("pixel_values"))
        moved = super().to(*args, **kwargs)
        note_normalisation(moved.data.get("pixel_values"), noted)
        return moved


class LlavaProcessor(FilesMixin):
    """Images and text to model inputs; same files, arguments and chat templates as transformers' `LlavaProcessor`.

    Args:
        image_processor: transformers' CLIP or LLaVA image processor; its settings are used, not its code.
        tokenizer: a tokenizer that has `image_token` as one token.
        patch_size: the vision tower's patch size in pixels.
        vision_feature_select_strategy: "default" drops the tower's CLS token, "full" keeps it.
        chat_template: Jinja; see `llava_fast.processor.templates`.
        image_token: the text that marks an image in a prompt.
        num_additional_image_tokens: tokens of the tower besides the patches; 1, the CLS token, for CLIP.
        pad_to_square: pad images with the image processor's mean colour instead of cropping them; None keeps the
            image processor's setting. Stored in the image processor (LLaVA's `do_pad`), where transformers reads it.
    Raises:
        ValueError: for settings that would give a wrong number of image tokens.

    Attributes:
        pixels: the `pixel_values` of calls: "uint8" [N, H, W, 3], which only llava_fast's model takes, or "float"
            [N, 3, H, W], normalised, as transformers' processor makes them and every model takes them. Not saved.
    """

    pixels: Literal["uint8", "float"] = "uint8"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 1,
        pad_to_square: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if patch_size is None:
            raise ValueError("patch_size is not set: pass it, or add it to processor_config.json (14 for LLaVA-1.5)")
        if vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy is 'default' or 'full', not {vision_feature_select_strategy!r}"
            )
        if vision_feature_select_strategy == "default" and num_additional_image_tokens < 1:
            raise ValueError(
                "num_additional_image_tokens=0 with the 'default' strategy would make every image one token short of "
                "its features (575 for 576): set it to 1, here or in processor_config.json"
            )
        token = getattr(tokenizer, "image_token", None) or image_token
        if tokenizer.convert_ids_to_tokens(tokenizer.encode(token, add_special_tokens=False)) != [token]:
            raise ValueError(
                f"the tokenizer has no token {token!r}: "
                f"tokenizer.add_tokens([{token!r}], special_tokens=True), and resize the model's embeddings"
            )
        if tokenizer.pad_token is None:  # the original code pads with <unk>
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )
        if pad_to_square is not None:
            self.pad_to_square = pad_to_square
        self.image_size  # noqa: B018  an image processor we cannot follow is an error now, not at the first image

    # Images

    def check(self, config: LlavaConfig) -> None:
        """ValueError, in one line, if a model with this config normalises pixels differently from this processor.

        Needed only if model and processor come from different directories.
        """
        check_same(self.normalisation, "the processor", pixel_normalisation(config))

    @property
    def normalisation(self) -> Normalisation:
        """The normalisation of uint8 pixels: the image processor's mean, deviation, rescale factor and `do_…` flags."""
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        settings = {name: getattr(self.image_processor, name, None) for name in names}
        return folded(settings | {key: bool(settings[key]) for key in ("do_rescale", "do_normalize")})

    @property
    def pad_to_square(self) -> bool:
        """Whether images are padded to a square before they are resized; can be set."""
        # CLIP's image processor also has `do_pad`, but it means padding a batch to its largest image.
        is_llava = type(self.image_processor).__name__.startswith("LlavaImageProcessor")
        return is_llava and bool(self.image_processor.do_pad)

    @pad_to_square.setter
    def pad_to_square(self, value: bool) -> None:
        if value != self.pad_to_square:
            self.image_processor = LlavaImageProcessorPil.from_dict({**self.image_processor.to_dict(), "do_pad": value})

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of every image the model will see.

        Raises:
            ValueError: if by the image processor's settings the size depends on the image.
        """
        settings = self.image_processor
        size, crop = _size(settings.size), _size(settings.crop_size)
        if _size(getattr(settings, "pad_size", None)) and settings.do_pad and not self.pad_to_square:
            raise ValueError(f"{type(settings).__name__} with pad_size: images are only padded to a square")
        if settings.do_center_crop and crop.keys() == {"height", "width"}:
            return crop["height"], crop["width"]
        if settings.do_resize and not settings.do_center_crop:
            if size.keys() == {"height", "width"}:
                return size["height"], size["width"]
            if size.keys() == {"shortest_edge"} and self.pad_to_square:
                return size["shortest_edge"], size["shortest_edge"]
        raise ValueError(
            f"{type(settings).__name__} with do_center_crop={settings.do_center_crop}, crop_size={crop} and "
            f"size={size} does not give images of one size"
        )

    def num_image_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """Tokens of one image in `input_ids`; its size after preprocessing, in pixels, is `image_size` by default."""
        default_height, default_width = self.image_size
        patches = ((height or default_height) // self.patch_size) * ((width or default_width) // self.patch_size)
        return patches + self.num_additional_image_tokens - (self.vision_feature_select_strategy == "default")

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """What vLLM asks for: the tokens of images of these sizes, all alike; `kwargs` as in a call."""
        if image_sizes is None:
            return MultiModalData()
        kwargs.pop("pixels", None)
        settings = self._options(kwargs)["images_kwargs"]
        count = self._with_image_settings(settings).num_image_tokens()
        return MultiModalData(num_image_tokens=[count] * len(image_sizes), num_image_patches=[1] * len(image_sizes))

    def image_pixels(self, image: Image.Image | str | PathLike | bytes | np.ndarray | torch.Tensor) -> np.ndarray:
        """One image, cropped or padded to the model's size: uint8 [H, W, 3]. `read_rgb` lists the accepted types.

        Bit-identical to transformers' PIL image processors.
        """
        settings, rgb = self.image_processor, self._opened(image)
        if self.pad_to_square:
            rgb = expand_to_square(rgb, self._padding())
        if settings.do_resize:
            rgb = rgb.resize(self._resized(*rgb.size), resample=settings.resample)
        if settings.do_center_crop:
            height, width = self.image_size
            left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
            rgb = rgb.crop((left, top, left + width, top + height))  # PIL fills black outside of the image
        return np.array(rgb)

    def pixels_on(self, device: torch.device | str, images: Sequence[Any]) -> torch.Tensor:
        """`image_pixels` of all images at once, computed on `device`, bit-identical: uint8 [N, H, W, 3].

        Raises:
            ValueError: for settings other than LLaVA's: bicubic resize of the shortest edge, then crop, or padding.
        """
        settings, (height, width) = self.image_processor, self.image_size
        edge = _size(settings.size).get("shortest_edge")
        if not settings.do_resize or settings.resample != Image.Resampling.BICUBIC or not edge == height == width:
            raise ValueError(
                f"only a bicubic resize of the shortest edge to {height}x{width} can be done on a device, not "
                f"do_resize={settings.do_resize}, resample={settings.resample}, size={_size(settings.size)}"
            )
        fill = self._padding() if self.pad_to_square else None
        decoded = [torch.from_numpy(np.array(self._opened(image))) for image in images]
        return preprocess(decoded, size=edge, fill=fill, device=device)

    def _opened(self, image: Any) -> Image.Image:
        """Read an image as RGB; an error if it, padded or resized, has more pixels than PIL's limit."""
        rgb = read_rgb(image)
        width, height = rgb.size
        try:
            if self.pad_to_square:
                width = height = max(rgb.size)
                check_area(width, height)
            if self.image_processor.do_resize:
                check_area(*self._resized(width, height))
        except ValueError as error:
            name = one_line(image) if isinstance(image, (str, PathLike)) else f"of {rgb.width}x{rgb.height}"
            raise ValueError(f"cannot resize image {name}: {error}") from None
        return rgb

    def _padding(self) -> tuple[int, int, int]:
        red, green, blue = (int(mean * 255) for mean in self.image_processor.image_mean)
        return red, green, blue

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        size = _size(self.image_processor.size)
        if size.keys() == {"height", "width"}:
            return size["width"], size["height"]
        if size.keys() != {"shortest_edge"}:
            raise ValueError(f"size {size} is neither shortest_edge nor height and width")
        edge = size["shortest_edge"]
        long_edge = int(edge * max(width, height) / min(width, height))
        return (edge, long_edge) if width <= height else (long_edge, edge)

    def normalize(self, pixels_NHWC: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] to transformers' float32 `pixel_values` [N, 3, H, W]."""
        settings = self.image_processor
        values_NHWC = pixels_NHWC.astype(np.float32)
        if settings.do_rescale:
            values_NHWC = (pixels_NHWC * float(settings.rescale_factor)).astype(np.float32)
        if settings.do_normalize:
            mean, std = (np.array(x, np.float32) for x in (settings.image_mean, settings.image_std))
            values_NHWC = (values_NHWC - mean) / std
        return np.ascontiguousarray(values_NHWC.transpose(0, 3, 1, 2))

    # Batches

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, *others: None, **kwargs: Any
    ) -> BatchFeature:
        """Prompts and their images to `input_ids`, `attention_mask` and `pixel_values`.

        Args:
            images: one image; a flat list, assigned to the rows' `<image>` marks in order; or one list per row, empty
                or None for a text-only row. Each may be anything that `read_rgb` takes.
            text: a prompt or a list of them.
            others: transformers' `videos` and `audio`, by position: None.
            kwargs: transformers' options, flat or in `text_kwargs`, `images_kwargs` and `common_kwargs`:
                pixels: "uint8" or "float", instead of the attribute.
                padding: default: tensors of several rows are padded to the longest.
                padding_side: default: `tokenizer.padding_side`; "left" for generation.
                return_tensors: "pt", "np" or None for lists.
                device: resize images on this device and return `pixel_values` as a tensor there. Float pixels are made
                    on the host.
                size, image_mean, ...: the image processor's settings in this call. If they change the normalisation,
                    pixels are float, because a model normalises uint8 by its own config.
        Raises:
            ValueError: if marks and images do not match, naming the row; if truncation cuts image tokens; for image
                settings with which images have no common size.
            TypeError: for videos or audio.
        """
        pixels = kwargs.pop("pixels", self.pixels)
        if pixels not in ("uint8", "float"):
            raise ValueError(f"pixels is 'uint8' or 'float', not {pixels!r}")
        if any(other is not None for other in (*others, kwargs.pop("videos", None), kwargs.pop("audio", None))):
            raise TypeError("LLaVA reads images and text, no videos or audio")
        if images is None and text is None:
            raise ValueError("nothing to process: give images, text or both")
        options = self._options(kwargs)
        of_text, of_images = options["text_kwargs"], options["images_kwargs"]
        asked = ("return_mm_token_type_ids", "return_text_replacement_offsets")  # by vLLM and `apply_chat_template`
        wants_types, wants_offsets = (of_text.pop(key, options.get(key)) for key in asked)
        tensor_type, pixel_type = (of.pop("return_tensors", None) for of in (of_text, of_images))
        device = of_images.pop("device", None)
        processor = self._with_image_settings(of_images) if of_images else self

        data: dict[str, Any] = {}
        texts = [text] if isinstance(text, str) else text if text is None else list(text)
        if not all(isinstance(row, str) for row in texts or ()):
            raise ValueError("text is a string or a list of strings")
        flat = self._flat_images(images, texts)
        if texts is not None:
            if of_text.get("padding") is None:
                of_text["padding"] = tensor_type is not None and len(texts) > 1
            data, replacements = processor._tokenize(texts, of_text)
            if wants_types:
                data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if flat:
            as_floats = pixels == "float" or processor.normalisation != self.normalisation
            made = processor._pixels(flat, as_floats, device)
            data |= BatchFeature({"pixel_values": made}, tensor_type=pixel_type or tensor_type)
        batch = _Batch(data, tensor_type=tensor_type)
        if flat and not as_floats:
            note_normalisation(batch["pixel_values"], self.normalisation)
        if texts is not None and wants_offsets:
            batch["text_replacement_offsets"] = replacements
        return batch

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The options of a call by their receiver, with transformers' precedence."""
        return self._merge_kwargs(cast(Any, ProcessingKwargs), self.tokenizer.init_kwargs, **kwargs)

    def _pixels(self, images: list[Any], as_floats: bool, device: Any) -> list[np.ndarray] | torch.Tensor:
        """`pixel_values`: an array per image, or one tensor on `device`."""
        if device is not None and not as_floats:
            return self.pixels_on(device, images)
        pixels = np.stack([self.image_pixels(image) for image in images])
        made = self.normalize(pixels) if as_floats else pixels
        return list(made) if device is None else torch.from_numpy(made).to(device)

    def _mark(self) -> re.Pattern:
        return re.compile(f"(?<!{_USER_TEXT_FENCE}){re.escape(self.image_token)}")

    def _flat_images(self, images: Any, texts: list[str] | None) -> list[Any]:
        """All images in order, after a check that every row has as many images as marks."""
        listed = _listed(images)
        per_row = any(item is None or isinstance(item, (list, tuple)) for item in listed)
        rows = [_listed(item) for item in listed]
        flat = [image for row in rows for image in row]
        if texts is None:
            return flat
        marks = [len(self._mark().findall(row)) for row in texts]
        if per_row:
            if len(rows) != len(texts):
                raise ValueError(f"images are given for {len(rows)} rows, but there are {len(texts)} rows of text")
            for i, (row, count) in enumerate(zip(rows, marks)):
                if len(row) != count:
                    raise ValueError(f"row {i} has {count} {self.image_token} marks but {len(row)} images")
        elif sum(marks) != len(flat):
            used = 0
            for i, count in enumerate(marks):
                used += count
                if used > len(flat):
                    raise ValueError(
                        f"row {i} needs {count} images for its {self.image_token} marks, but only "
                        f"{max(0, len(flat) - used + count)} of {len(flat)} are left for it"
                    )
            raise ValueError(
                f"{len(flat)} images are given, but the rows (0 to {len(texts) - 1}) have only {sum(marks)} "
                f"{self.image_token} marks"
            )
        return flat

    def _tokenize(self, texts: list[str], options: dict[str, Any]) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
        """Expand the marks and tokenise; also returns the replacements, as transformers describes them."""
        mark, count = self._mark(), self.num_image_tokens()
        tokens = self.image_token * count
        longer = len(tokens) - len(self.image_token)
        same = {"type": "image", "text": self.image_token, "replacement": tokens}
        replacements = []
        for text in texts:
            spans = [match.span() for match in mark.finditer(text)]
            new = [(start + i * longer, end + (i + 1) * longer) for i, (start, end) in enumerate(spans)]
            replacements.append([{**same, "span": a, "new_span": b} for a, b in zip(spans, new)])
        data = dict(self.tokenizer([mark.sub(tokens, text) for text in texts], **options))
        for i, (ids, marks) in enumerate(zip(data["input_ids"], replacements)):
            found = ids.count(self.image_token_id)
            if found != count * len(marks):
                raise ValueError(
                    f"row {i} has {found} image tokens where its {len(marks)} images need {count * len(marks)}: "
                    f"raise max_length ({options.get('max_length')}) or shorten the prompt"
                )
        return data, replacements


# Reading images. Files are not trusted: one with more pixels (by its header) than PIL's limit, a format outside of
# `FORMATS`, or more than `MAX_FILE_BYTES` is refused before decoding; any exception of a decoder becomes a ValueError
# that names the file; only regular files are opened, since a pipe could block for ever.


def read_rgb(source: Image.Image | str | PathLike | bytes | np.ndarray | torch.Tensor) -> Image.Image:
    """Read and decode an image in any PIL mode, as RGB.

    Args:
        source: a PIL image; a file; a file's contents as bytes, or as text in base64 or a data: URL; an http(s) URL,
            which is fetched; or a uint8 array or tensor ([H, W], [H, W, C] or [C, H, W]).
    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a file that is not an image, is truncated, or has more pixels than PIL allows; one line, with
            the file's name.

    As in LLaVA this is `convert("RGB")` of the first frame: EXIF orientation is not applied (transformers applies it to
    files and URLs, not to PIL images), 16-bit values are clipped, CMYK is converted without a colour profile, and an
    alpha channel is dropped (recent transformers versions blend it with white, unlike LLaVA's training data).
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        source = _from_array(source)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"(a PIL image, {source.mode})"
    elif isinstance(source, (str, PathLike)):
        name = os.fspath(source)
        if not _is_inline(source):
            _check_file(name)
    elif isinstance(source, bytes):
        name = f"of {len(source)} bytes"
        if len(source) > MAX_FILE_BYTES:
            raise ValueError(f"cannot read image {name}, at most {MAX_FILE_BYTES}")
    else:
        raise ValueError(f"an image is a PIL image, a file name or an array, not {type(source).__name__}")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        contents = _contents(source) if _is_inline(source) else source if isinstance(source, bytes) else None
        with Image.open(name if contents is None else io.BytesIO(contents), formats=_formats()) as opened:
            return _to_rgb(opened)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error ...
        reason = one_line(error, 300).partition(" <_io.BytesIO")[0] or type(error).__name__
        raise ValueError(f"cannot read image {one_line(name)}: {reason}") from error


def check_area(width: int, height: int) -> None:
    """ValueError for more pixels than PIL's limit, `Image.MAX_IMAGE_PIXELS`.

    PIL itself only warns up to twice its limit, and does not check the size after padding or resizing.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width}x{height} pixels are more than the limit of {limit} (decompression bomb?)")


def expand_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Centre an image on a square of `color` of its longer side; an odd margin is one pixel less on the left or top."""
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
    """Those of `FORMATS` that this PIL build can read; for any other `Image.open` would raise KeyError."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _is_inline(source: Any) -> TypeGuard[str]:
    """Whether a source is a URL, or a picture in base64 as chat templates allow, rather than a file."""
    return isinstance(source, str) and (source.startswith(("http://", "https://", "data:")) or len(source) > 4096)


def _contents(source: str) -> bytes:
    """What an http(s) URL refers to, or base64 contains; more than `MAX_FILE_BYTES` are not fetched."""
    if not source.startswith(("http://", "https://")):
        return base64.b64decode(source.partition(",")[2] if source.startswith("data:") else source)
    contents = bytearray()
    with httpx.stream("GET", source, follow_redirects=True, timeout=60) as response:
        response.raise_for_status()
        for piece in response.iter_bytes():
            contents += piece
            if len(contents) > MAX_FILE_BYTES:
                raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
    return bytes(contents)


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
