"""Resizing a ragged batch: the plan, the weights, what is refused, and the kernel against the reference."""

import numpy as np
import pytest
import torch

from llava_fast.backend import BackendUnavailable, use_backend
from llava_fast.ops import resize
from llava_fast.ops.resize import preprocess

GREY = (122, 116, 104)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_an_image_does_not_depend_on_its_batch():
    images = [picture(9, 7), picture(31, 50, 1), picture(1, 20, 2), picture(64, 11, 3)]
    for fill in (None, GREY):
        together = preprocess(images, size=12, fill=fill)
        assert together.shape == (4, 12, 12, 3) and together.dtype == torch.uint8
        for i, image in enumerate(images):
            assert torch.equal(together[i], preprocess([image], size=12, fill=fill)[0])


def test_strided_images_and_none():
    image = picture(40, 60)
    part = image[3:37:2, 5:50]
    assert not part.is_contiguous()
    assert torch.equal(preprocess([part], size=10), preprocess([part.clone()], size=10))
    assert preprocess([], size=10).shape == (0, 10, 10, 3)


def test_only_lines_that_matter_are_resized():
    """The crop of a tall picture needs a part of its rows, and the first pass makes no others."""
    plan = resize.make_plan([(60, 40)], 10, None)
    of = dict(zip(resize.FIELDS, plan.images[0].tolist()))
    assert not of["by_columns"]
    # Rows 2 to 11 of 15, centred on rows 10, 14 … 46 of the image, and 8 rows (the filter's support) to either side.
    assert of["lines"] == plan.lines == 52
    assert of["pixels"] == 3 * 40 * 2 and of["first_line"] == 2


@pytest.mark.parametrize("length,resized", [(1000, 336), (100, 336), (336, 336), (2, 1)])
def test_weights_sum_to_one(length, resized):
    table = resize.axis_table(length, resized, 0, resized)
    sums = table[:, 1:].astype(np.int64).sum(1)
    assert np.abs(sums - (1 << resize.FRACTION_BITS)).max() <= table.shape[1] / 2  # half a unit of rounding each
    assert (table[:, 0] >= 0).all()


@pytest.mark.parametrize(
    ("version", "tall", "very_tall"), [((11, 3), False, False), ((12, 2), False, True), ((13, 0), True, True)]
)
def test_columns_first_as_in_each_pillow(version, tall, very_tall, monkeypatch):
    monkeypatch.setattr(resize, "_PILLOW", version)
    assert resize.columns_first(100, 40, 50, 20) is tall
    assert resize.columns_first(900, 4, 450, 2) is very_tall
    assert not resize.columns_first(100, 60, 50, 30)
    assert not resize.columns_first(10, 60, 50, 300)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([picture(4, 4), torch.zeros(4, 4, 3)], {}, r"image 1 is torch.float32 \(4, 4, 3\)"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8)], {}, r"image 0 is torch.uint8 \(3, 4, 4\)"),
        ([torch.zeros(0, 4, 3, dtype=torch.uint8)], {}, r"image 0 is torch.uint8 \(0, 4, 3\)"),
        ([picture(4, 4)], {"size": 0}, "size is 0; it must be 1 or more"),
        ([picture(4, 4)], {"fill": (1, 2, 256)}, r"fill is \(1, 2, 256\)"),
        ([picture(4, 4)], {"fill": (1, 2)}, r"fill is \(1, 2\)"),
    ],
)
def test_bad_input_is_named(images, options, message):
    with pytest.raises(ValueError, match=message):
        preprocess(images, **{"size": 5, **options})


def test_the_cuda_kernel_takes_pixels_on_a_gpu():
    assert resize._supports_cuda(picture(2, 2)) == "the pixels are on cpu"
    with use_backend("cuda", "resize"), pytest.raises(BackendUnavailable, match="cannot run 'resize'"):
        preprocess([picture(4, 4)], size=2)


@pytest.mark.gpu
@pytest.mark.parametrize("fill", [None, GREY])
@pytest.mark.parametrize("size", [5, 336])
def test_cuda_kernel(size, fill):
    shapes = [(40, 57), (900, 310), (1, 1), (1, 90), (130, 1), (336, 336), (720, 1280)]
    images = [picture(*shape, seed) for seed, shape in enumerate(shapes)]
    with use_backend("cuda", "resize"):
        found = preprocess(images, size=size, fill=fill, device="cuda")
    assert found.is_cuda
    assert torch.equal(found.cpu(), preprocess(images, size=size, fill=fill))


@pytest.mark.gpu
def test_reference_on_a_gpu():
    image = picture(40, 57)
    with use_backend("reference", "resize"):
        assert torch.equal(preprocess([image], size=9, device="cuda").cpu(), preprocess([image], size=9))
