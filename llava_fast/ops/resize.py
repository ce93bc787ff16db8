"""Resizes decoded images to the tower's square as PIL does: antialiased bicubic, with centre crop or padding.

    out = second(first(image)),  each  round(Σ_j k[o, j] · x[start[o] + j])  to 8 bits along one axis

The weights are PIL's (Pillow, `Resample.c`): Keys' cubic with a = -1/2 (Keys 1981), stretched by the scale where the
image shrinks, normalised in float64 and rounded to 22 fractional bits. All later arithmetic is integer, so the result
is bit-identical to PIL's. The host computes the weights, and both implementations read the same tables.

Cropped pixels are not computed, and no padded square is built: positions outside of the image have the fill colour.
Bytes, an image of H × W to S × S: 3 HW read, 3 HS written and read (8 bits, as in PIL), 3 S² written; and a table of
(1 + taps) · 4 S for each axis, with slightly more than 4 · scale taps. The batch is ragged: all images are stored in
one buffer, and each pass over all of them is one launch.

Shapes: B images of H × W pixels (different sizes), S output side. The first pass resizes along each of L lines (rows,
or columns if those come first) to [L, S, 3]; the second pass resizes across the lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch

from llava_fast.backend import choose, extension, register

FRACTION_BITS = 22
# Columns of a plan's `images`; csrc/resize.h has them in this order.
FIELDS = (
    "pixels",  # offset of the first line that is needed
    "line_bytes",  # stride between lines; the next field: between pixels of a line
    "pixel_bytes",
    "length",  # of a line; the next field: its offset in the padded square
    "margin",
    "lines",  # number of lines needed; then: the offset of the first in the square; the lines of all earlier images
    "first_line",
    "lines_before",
    "first",  # per pass: the offset of its table in `tables`, and its taps
    "first_taps",
    "second",
    "second_taps",
    "by_columns",  # whether lines are columns
)
_PILLOW = tuple(int(number) for number in PIL.__version__.split(".")[:2])


def preprocess(
    images: Sequence[torch.Tensor],
    *,
    size: int,
    fill: tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Resize decoded images for the vision tower, bit-identical to LLaVA's image processors, which use PIL.

    Args:
        images: uint8 [H, W, 3] each, all on one device.
        size: side of the result in pixels.
        fill: colour of the square that each image is centred on before it is resized; None: the shorter side is
            resized to `size`, followed by a centre crop.
        device: of the computation and the result; default: that of the images. All images are copied there at once.

    Returns:
        uint8 [B, size, size, 3].

    Raises:
        ValueError: for an image of another shape or type or without pixels, naming its index; a bad size or fill.
    """
    for i, image in enumerate(images):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] != 3 or image.numel() == 0:
            raise ValueError(f"image {i} is {image.dtype} {tuple(image.shape)}; expected uint8 [height, width, 3]")
    plan = make_plan([(image.shape[0], image.shape[1]) for image in images], size, fill)
    if not images:
        return torch.empty(0, size, size, 3, dtype=torch.uint8, device=device)
    pixels = torch.cat([image.reshape(-1) for image in images]).to(device or images[0].device)
    return choose("resize", pixels)(pixels, plan)


@dataclass(frozen=True)
class ResizePlan:
    """Sizes, offsets and weight tables to resize a batch.

    images: int64 [B, 13], see `FIELDS`.
    tables: int32; for each axis of each image [S, 1 + taps]: the first input position, then the weights.
    lines: number of lines of all images.
    """

    size: int
    fill: tuple[int, int, int]
    lines: int
    images: torch.Tensor
    tables: torch.Tensor


@lru_cache(maxsize=256)
def axis_table(length: int, resized: int, first: int, size: int) -> np.ndarray:
    """Weights to resize `length` pixels to `resized`, for results `first` to `first + size`: int32 [size, 1 + taps].

    The first column is the input position of the first weight; unused weights are 0.
    """
    scale = length / resized
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (np.arange(first, first + size) + 0.5) * scale
    start = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), length)
    position = start[:, None] + np.arange((end - start).max())
    x = np.abs((position - centre[:, None] + 0.5) * (1.0 / stretch))
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0)) * (position < end[:, None])
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed sequentially, as in Pillow's C code
    fixed = np.trunc(weights * (1 << FRACTION_BITS) + np.copysign(0.5, weights))
    table = np.concatenate((start[:, None], fixed), axis=1).astype(np.int32)
    table.setflags(write=False)
    return table


def columns_first(height: int, width: int, resized_height: int, resized_width: int) -> bool:
    """Whether PIL resizes columns before rows; the order matters, as it rounds to 8 bits between the passes."""
    shrinks = resized_height < height
    if _PILLOW >= (13, 0):
        return shrinks and height - resized_height > 2 * (width - resized_width)
    return shrinks and _PILLOW >= (12, 2) and height > 100 * width


class _Axis(NamedTuple):
    """One axis of an image: its length and stride, its offset in the square, and how it is resized."""

    length: int
    stride: int
    margin: int
    table: np.ndarray


def _axes(height: int, width: int, size: int, fill: tuple[int, int, int] | None) -> tuple[bool, tuple[_Axis, _Axis]]:
    """Whether columns are first, and the axis of the first pass and that of the second."""
    side, short = max(height, width), min(height, width)
    sides = ((height, 3 * width), (width, 3))
    if fill is None:
        resized = [size if length == short else int(size * side / short) for length, _ in sides]
        axes = [
            _Axis(*of, 0, axis_table(of[0], target, (target - size) // 2, size)) for of, target in zip(sides, resized)
        ]
        by_columns = columns_first(height, width, *resized)
    else:
        axes = [_Axis(*of, (side - of[0]) // 2, axis_table(side, size, 0, size)) for of in sides]
        by_columns = columns_first(side, side, size, size)
    return by_columns, (axes[0], axes[1]) if by_columns else (axes[1], axes[0])


def make_plan(shapes: Sequence[tuple[int, int]], size: int, fill: tuple[int, int, int] | None) -> ResizePlan:
    """The plan for images of these heights and widths; see `preprocess`."""
    if size < 1:
        raise ValueError(f"size is {size}; it must be 1 or more")
    if fill is not None and (len(fill) != 3 or not all(0 <= value <= 255 for value in fill)):
        raise ValueError(f"fill is {fill}; it must be three numbers from 0 to 255")
    images, tables = np.zeros((len(shapes), len(FIELDS)), np.int64), [np.zeros(0, np.int32)]
    pixels = lines_before = at = 0
    for i, (height, width) in enumerate(shapes):
        by_columns, (first, second) = _axes(height, width, size, fill)
        first_taps, second_taps = (axis.table.shape[1] - 1 for axis in (first, second))
        start = max(int(second.table[0, 0]) - second.margin, 0)
        lines = min(int(second.table[-1, 0]) + second_taps - second.margin, second.length) - start
        images[i] = (
            *(pixels + start * second.stride, second.stride, first.stride, first.length, first.margin),
            *(lines, second.margin + start, lines_before),
            *(at, first_taps, at + first.table.size, second_taps, by_columns),
        )
        tables += [first.table.reshape(-1), second.table.reshape(-1)]
        at += first.table.size + second.table.size
        pixels += 3 * height * width
        lines_before += lines
    flat = np.concatenate(tables)
    return ResizePlan(size, fill or (0, 0, 0), lines_before, torch.from_numpy(images), torch.from_numpy(flat))


def _pass(x_NLC: torch.Tensor, table: torch.Tensor, start: int, fill_C: torch.Tensor) -> torch.Tensor:
    """[N, L, 3] to [N, S, 3]; the first input pixel is at position `start`, pixels outside are `fill_C`."""
    position_S, weights_SJ = table[:, 0].long() - start, table[:, 1:]
    sums_NSC = torch.full((), 1 << (FRACTION_BITS - 1), dtype=torch.int32, device=x_NLC.device)
    for j in range(weights_SJ.shape[1]):
        at_S = position_S + j
        inside_S = (at_S >= 0) & (at_S < x_NLC.shape[1])
        values_NSC = x_NLC[:, at_S.clamp(0, x_NLC.shape[1] - 1)].int()
        values_NSC = torch.where(inside_S[:, None], values_NSC, fill_C)
        sums_NSC = sums_NSC + values_NSC * weights_SJ[:, j, None]
    return (sums_NSC >> FRACTION_BITS).clamp(0, 255).to(torch.uint8)


def resize_reference(pixels: torch.Tensor, plan: ResizePlan) -> torch.Tensor:
    out = torch.empty(len(plan.images), plan.size, plan.size, 3, dtype=torch.uint8, device=pixels.device)
    fill_C = torch.tensor(plan.fill, dtype=torch.int32, device=pixels.device)
    tables = plan.tables.to(pixels.device)
    for out_SSC, numbers in zip(out, plan.images.tolist()):
        of = dict(zip(FIELDS, numbers, strict=True))
        first, second = (
            tables[of[name] :][: plan.size * (1 + of[f"{name}_taps"])].view(plan.size, -1)
            for name in ("first", "second")
        )
        lines_LWC = pixels.as_strided(
            (of["lines"], of["length"], 3), (of["line_bytes"], of["pixel_bytes"], 1), of["pixels"]
        )
        lines_LSC = _pass(lines_LWC, first, of["margin"], fill_C)
        columns_SSC = _pass(lines_LSC.transpose(0, 1), second, of["first_line"], fill_C)
        out_SSC.copy_(columns_SSC if of["by_columns"] else columns_SSC.transpose(0, 1))
    return out


def _resize_cuda(pixels: torch.Tensor, plan: ResizePlan) -> torch.Tensor:
    device = pixels.device
    out = torch.empty(len(plan.images), plan.size, plan.size, 3, dtype=torch.uint8, device=device)
    between = torch.empty(plan.lines, plan.size, 3, dtype=torch.uint8, device=device)
    images, tables = plan.images.to(device), plan.tables.to(device)
    with torch.cuda.device(device):
        extension().resize_forward(
            output=out.data_ptr(),
            between=between.data_ptr(),
            pixels=pixels.data_ptr(),
            images=images.data_ptr(),
            tables=tables.data_ptr(),
            num_images=len(images),
            lines=plan.lines,
            size=plan.size,
            fill=plan.fill,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return out


def _supports_cuda(pixels: torch.Tensor, _plan: Any = None) -> bool | str:
    return True if pixels.is_cuda else f"the pixels are on {pixels.device.type}"


register("resize", "reference", resize_reference)
register("resize", "cuda", _resize_cuda, _supports_cuda)
