"""Pictures of every kind: pixels are those of `convert("RGB")`, which is what LLaVA does with a file."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from transformers.image_utils import load_image

from llava_fast.errors import one_line
from llava_fast.processor import images
from llava_fast.processor.images import FORMATS, read_rgb

SIZE = (31, 23)


def noise(*channels: int, dtype=np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, top, (SIZE[1], SIZE[0], *channels), dtype=dtype, endpoint=True)


RGB, RGBA = Image.fromarray(noise(3)), Image.fromarray(noise(4))
FRAMES = [Image.new("RGB", SIZE, colour).convert("P") for colour in ("red", "blue", "lime")]

# How a file is written, and the mode PIL opens it in.
KINDS = {
    "grey.png": (lambda path: RGB.convert("L").save(path), "L"),
    "bits.png": (lambda path: RGB.convert("1").save(path), "1"),
    "alpha.png": (lambda path: RGBA.save(path), "RGBA"),
    "grey-alpha.png": (lambda path: RGBA.convert("LA").save(path), "LA"),
    "palette.png": (lambda path: RGB.quantize(17).save(path), "P"),
    "palette-transparent.png": (lambda path: RGB.quantize(17).save(path, transparency=3), "P"),
    "palette-alpha.png": (lambda path: RGB.quantize(17).save(path, transparency=bytes(range(17))), "P"),
    "deep.png": (lambda path: Image.fromarray(noise(dtype=np.uint16)).save(path), "I;16"),
    "deep.tiff": (lambda path: Image.fromarray(noise(dtype=np.uint16)).save(path), "I;16"),
    "float.tiff": (lambda path: Image.fromarray(noise().astype(np.float32)).save(path), "F"),
    "cmyk.jpg": (lambda path: RGB.convert("CMYK").save(path), "CMYK"),
    "cmyk.tiff": (lambda path: RGB.convert("CMYK").save(path), "CMYK"),
    "grey.jpg": (lambda path: RGB.convert("L").save(path), "L"),
    "progressive.jpg": (lambda path: RGB.save(path, progressive=True), "RGB"),
    "alpha.webp": (lambda path: RGBA.save(path, lossless=True), "RGBA"),
    "animated.gif": (lambda path: FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:]), "P"),
    "animated.webp": (
        lambda path: RGB.save(path, save_all=True, append_images=[Image.new("RGB", SIZE)], lossless=True),
        "RGB",
    ),
    "animated.png": (lambda path: RGB.save(path, save_all=True, append_images=[Image.new("RGB", SIZE)]), "RGB"),
    "pages.tiff": (lambda path: RGB.save(path, save_all=True, append_images=[Image.new("RGB", SIZE)]), "RGB"),
    "two.mpo": (lambda path: RGB.save(path, save_all=True, append_images=[Image.new("RGB", SIZE)]), "RGB"),
    "plain.bmp": (lambda path: RGB.save(path), "RGB"),
    "plain.ppm": (lambda path: RGB.save(path), "RGB"),
    "plain.jp2": (lambda path: RGB.save(path), "RGB"),
    "misnamed.txt": (lambda path: RGB.save(path, "PNG"), "RGB"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", KINDS)
def test_any_kind_is_converted_as_llava_does(tmp_path, name):
    write, mode = KINDS[name]
    path = tmp_path / name
    write(path)
    with Image.open(path) as opened:
        assert opened.mode == mode
        expected = np.asarray(opened.convert("RGB"))
    for source in (path, str(path), Image.open(path)):
        rgb = read_rgb(source)
        assert rgb.mode == "RGB" and rgb.size == SIZE
        np.testing.assert_array_equal(np.asarray(rgb), expected)


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith(("animated", "pages", "two"))])
def test_the_first_frame_counts(tmp_path, name):
    write, _ = KINDS[name]
    write(tmp_path / name)
    with Image.open(tmp_path / name) as opened:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened)]
    assert len(frames) == (3 if name.endswith("gif") else 2)
    rgb = np.asarray(read_rgb(tmp_path / name))
    np.testing.assert_array_equal(rgb, frames[0])
    assert not np.array_equal(rgb, frames[1])


def test_alpha_is_dropped_and_16_bits_are_clipped(tmp_path):
    RGBA.save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "alpha.png")), np.asarray(RGBA)[..., :3])
    deep = np.array([[0, 200, 255, 256, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    clipped = np.asarray(read_rgb(tmp_path / "deep.png"))[0, :, 0]
    with Image.open(tmp_path / "deep.png") as opened:
        np.testing.assert_array_equal(clipped, np.asarray(opened.convert("RGB"))[0, :, 0])
    assert clipped[0] == 0 and clipped[-1] == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_left_alone(tmp_path, orientation, suffix):
    """As by LLaVA and by transformers' image processors; transformers' `load_image` does turn a picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    RGB.save(path, exif=exif)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_rgb(path)), expected)
    assert load_image(str(path)).size == (SIZE if orientation < 5 else SIZE[::-1])


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("L", (120, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 119 * 100)
    monkeypatch.setattr(Image.Image, "convert", None)  # which decodes
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="120x100 pixels are more than"):
        read_rgb(path)


def test_only_picture_formats_are_tried(tmp_path):
    assert "EPS" not in FORMATS and set(images._formats()) <= set(FORMATS)
    assert {"BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"} <= set(images._formats())
    path = tmp_path / "drawing.eps"
    RGB.save(path)
    with Image.open(path) as opened:  # PIL would hand it to Ghostscript
        assert opened.format == "EPS"
    with pytest.raises(ValueError, match=r"cannot read image .*drawing\.eps: cannot identify image file"):
        read_rgb(path)


def test_what_is_not_finite_is_refused(tmp_path):
    for value in (np.nan, np.inf):
        pixels = noise().astype(np.float32)
        pixels[3, 4] = value
        with pytest.raises(ValueError, match="pixels that are NaN or infinite"):
            read_rgb(Image.fromarray(pixels))
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "TIFF")
        (tmp_path / "x.tiff").write_bytes(buffer.getvalue())
        with pytest.raises(ValueError, match=r"x\.tiff: pixels that are NaN"):
            read_rgb(tmp_path / "x.tiff")


def test_arrays_of_each_shape():
    for array in (noise(3), noise(), noise(1), noise(4), noise(2), noise(3).transpose(2, 0, 1)):
        for source in (array, torch.tensor(array)):
            assert read_rgb(source).size == SIZE


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.png", "a.png"),
        (Path("a/é b.png"), "a/é b.png"),
        ("a\n\tb\r.png", "a b .png"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\ud800.png", r"\ud800.png"),
        ("abcdefghij" * 3, "abcde…fghij"),
        ("", ""),
        (ValueError("a\nb"), "a b"),
    ],
)
def test_one_line(name, line):
    assert one_line(name, limit=10 if "…" in line else 200) == line
