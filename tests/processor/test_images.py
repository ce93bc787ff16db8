"""Pictures of every kind: pixels are those of `convert("RGB")`, which is what LLaVA does with a file."""

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from transformers.image_utils import load_image

from llava_fast.errors import one_line
from llava_fast.processor import processor as images
from llava_fast.processor.processor import FORMATS, expand_to_square, read_rgb
from tests.processor.made import PHOTOS, assert_within_one, clip, hf_pixels, make, named

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


# Through a processor


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"])
def test_any_mode_is_converted_as_llava_does(mode):
    """`convert("RGB")`, which drops an alpha channel; the newest transformers lay it on white instead."""
    photo = Image.open(PHOTOS[1])
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    if mode == "PA":
        image = photo.convert("P").convert("PA")
    elif mode == "LAB":
        image = Image.frombytes("LAB", (8, 8), bytes(range(192)))
    else:
        via = photo if mode in ("LA", "P", "RGBA", "RGBa") else photo.convert("RGB")
        image = via.convert("L").convert(mode) if mode in ("I", "F") else via.convert(mode)
    assert image.mode == mode
    ours = make().image_pixels(image)
    assert_within_one(ours, hf_pixels(clip(), image.convert("RGB")))
    if "A" not in image.getbands() and mode != "RGBa":
        assert_within_one(ours, hf_pixels(clip(), image))


def test_palette_transparency_and_16_bit_files(tmp_path):
    gif, deep = tmp_path / "transparent.gif", tmp_path / "deep.png"
    image = Image.open(PHOTOS[1]).convert("P")
    image.save(gif, transparency=image.getpixel((0, 0)))
    Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)).save(deep)
    for path in (gif, deep):
        opened = Image.open(path)
        assert opened.mode in ("P", "I;16")
        rgb = Image.fromarray(np.asarray(opened.convert("RGB")))  # PIL remembers the transparent colour otherwise
        assert_within_one(make().image_pixels(path), hf_pixels(clip(), rgb))


def test_exif_orientation_is_not_applied(tmp_path):
    image = Image.open(PHOTOS[1]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(make().image_pixels(tmp_path / "turned.png"), make().image_pixels(image))


def test_arrays_tensors_and_base64_are_images_too():
    image = Image.open(PHOTOS[1]).convert("RGB")
    array = np.asarray(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    expected = make().image_pixels(image)
    for given_ in (array, array.transpose(2, 0, 1), torch.tensor(array), text, "data:image/png;base64," + text):
        np.testing.assert_array_equal(make().image_pixels(given_), expected)
    np.testing.assert_array_equal(
        make().image_pixels(array[..., 0]), make().image_pixels(Image.fromarray(array[..., 0]))
    )
    batch = make()(images=torch.tensor(np.stack([array, array])), return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 28, 28, 3)


class Site(BaseHTTPRequestHandler):
    pages: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        self.send_response(200 if self.path in self.pages else 404)
        self.end_headers()
        self.wfile.write(self.pages.get(self.path, b""))

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_and_base64_are_checked_like_files(site, monkeypatch):
    """The same pixels, formats and limits: what a client or a web server sends is trusted no more than a file."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    buffer, postscript = io.BytesIO(), io.BytesIO()
    RGB.save(buffer, "PNG", exif=exif)
    RGB.save(postscript, "EPS")
    Site.pages = {"/x.png": buffer.getvalue(), "/x.eps": postscript.getvalue()}
    for url in (f"{site}/x.png", "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()):
        np.testing.assert_array_equal(np.asarray(read_rgb(url)), np.asarray(RGB))
    body = base64.b64encode(postscript.getvalue()).decode()
    for source in (f"{site}/x.eps", f"data:image/png;base64,{body}", body.ljust(5000, "=")):
        with pytest.raises(ValueError, match=r"cannot read image .*: cannot identify image file"):
            read_rgb(source)
    with pytest.raises(ValueError, match=r"cannot read image http://.*/none\.png: .*404"):
        read_rgb(f"{site}/none.png")
    with pytest.raises(FileNotFoundError, match="no image file"):  # a path is a path, however long
        read_rgb(Path("a" * 5000))
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_rgb(f"{site}/x.png")


def test_expand_to_square_keeps_a_square():
    square = Image.new("RGB", (5, 5), "red")
    assert expand_to_square(square, (1, 2, 3)) is square
    wide = np.asarray(expand_to_square(Image.new("RGB", (4, 1), "red"), (1, 2, 3)))
    assert [tuple(row) for row in wide[:, 0]] == [(1, 2, 3), (255, 0, 0), (1, 2, 3), (1, 2, 3)]


def test_bad_files_are_named(tmp_path):
    whole = PHOTOS[5].read_bytes()
    png = PHOTOS[1].read_bytes()
    bad = {
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": png[: len(png) // 2],
        "flipped.png": png[:3000] + b"\x00" * 64 + png[3064:],
        "page.jpg": b"<html>404 not found</html>",
        "empty.png": b"",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            make().image_pixels(tmp_path / name)
        assert named(error, tmp_path / name).startswith("cannot read image")
    with pytest.raises(FileNotFoundError) as error:
        make()(images=str(tmp_path / "none.png"), text="<image> what")
    assert named(error, tmp_path / "none.png").startswith("no image file")
    with pytest.raises(FileNotFoundError, match="no image file"):
        make().image_pixels(tmp_path)
    with pytest.raises(ValueError, match=r"not int"):
        make().image_pixels(3)
    with pytest.raises(ValueError, match=r"uint8 with 2 or 3 dimensions, not float64 \[4, 4, 3\]"):
        make().image_pixels(np.zeros((4, 4, 3)))


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("L", (120, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11_999)  # PIL only warns up to twice its limit
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match=r"120x100 pixels") as error:
        make().image_pixels(path)
    named(error, path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_999)  # here PIL itself refuses
    with pytest.raises(ValueError, match="decompression bomb") as error:
        make().image_pixels(path)
    named(error, path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_999)
    with pytest.raises(ValueError, match="120x100 pixels"):
        make().image_pixels(Image.new("L", (120, 100)))


@pytest.mark.parametrize("pad", [False, True])
def test_thin_images_cannot_blow_up(tmp_path, pad):
    path = tmp_path / "thin.png"
    Image.new("L", (200_000, 1)).save(path)
    processor = make(clip(336), pad_to_square=pad)
    for resize in (processor.image_pixels, lambda image: processor.pixels_on("cpu", [image])):
        with pytest.raises(ValueError, match="more than the limit") as error:
            resize(path)
        named(error, path)


def test_read_rgb_leaves_no_file_open(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (3, 3)).save(path)
    image = read_rgb(path)
    path.unlink()
    assert image.getpixel((0, 0)) == (0, 0, 0)
