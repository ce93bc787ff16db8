"""Pixels to tokens, patch by patch, and against transformers' CLIP."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from llava_fast.backend import use_backend
from llava_fast.ops.patch_embed import patch_embed

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with use_backend("reference"):
        yield


def parameters(patch: int, patches: int, width: int = 16, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    return SimpleNamespace(
        weight=torch.randn(width, 3, patch, patch, dtype=dtype) / patch,
        cls=torch.randn(width, dtype=dtype),
        position=torch.randn(1 + patches, width, dtype=dtype),
        norm_weight=torch.randn(width, dtype=dtype),
        norm_bias=torch.randn(width, dtype=dtype),
    )


def run(pixels: torch.Tensor, p: SimpleNamespace) -> torch.Tensor:
    return patch_embed(pixels, p.weight, p.cls, p.position, p.norm_weight, p.norm_bias, eps=1e-5, mean=MEAN, std=STD)


def exact(pixels: torch.Tensor, p: SimpleNamespace) -> torch.Tensor:
    """By the definition in float64, one patch at a time."""
    p = SimpleNamespace(**{name: tensor.double() for name, tensor in vars(p).items()})
    if pixels.dtype == torch.uint8:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
        pixels = ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    pixels = pixels.double()
    size = p.weight.shape[-1]
    tokens = [p.cls.expand(len(pixels), -1)]
    for row in range(pixels.shape[2] // size):
        for column in range(pixels.shape[3] // size):
            patch = pixels[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            tokens.append(patch.flatten(1) @ p.weight.flatten(1).T)
    tokens = torch.stack(tokens, 1) + p.position
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p.norm_weight + p.norm_bias


@pytest.mark.parametrize("as_uint8", [True, False])
@pytest.mark.parametrize(
    ("batch", "height", "width", "patch"),
    [(1, 4, 4, 4), (3, 12, 12, 4), (2, 17, 17, 5), (2, 9, 14, 3), (1, 28, 28, 14), (0, 8, 8, 4)],
)
def test_values_and_gradients(batch: int, height: int, width: int, patch: int, as_uint8: bool) -> None:
    p = parameters(patch, (height // patch) * (width // patch))
    if as_uint8:
        pixels = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)
    else:
        pixels = torch.randn(batch, 3, height, width)
    kept = pixels.clone()
    q = SimpleNamespace(**{name: tensor.clone().requires_grad_() for name, tensor in vars(p).items()})
    r = SimpleNamespace(**{name: tensor.clone().requires_grad_() for name, tensor in vars(p).items()})
    actual, expected = run(pixels, q), exact(pixels, r)
    assert actual.shape == (batch, p.position.shape[0], 16)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(pixels, kept)
    weight = torch.randn(actual.shape)
    actual.backward(weight)
    expected.backward(weight.double())
    for name in vars(p):
        ours, theirs = getattr(q, name).grad, getattr(r, name).grad
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}")


def test_the_same_as_clip() -> None:
    config = CLIPVisionConfig(hidden_size=16, image_size=15, patch_size=4, num_attention_heads=2)
    embeddings = CLIPVisionEmbeddings(config)
    norm = torch.nn.LayerNorm(16)
    pixels = torch.randn(2, 3, 15, 15)
    expected = norm(embeddings(pixels))
    actual = patch_embed(
        pixels,
        embeddings.patch_embedding.weight,
        embeddings.class_embedding,
        embeddings.position_embedding.weight,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        mean=MEAN,
        std=STD,
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_are_rounded_once(dtype: torch.dtype) -> None:
    p = parameters(4, 9, dtype=dtype)
    pixels = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8)
    actual = run(pixels, p)
    assert actual.dtype == dtype
    floats = ((pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    assert torch.equal(actual, run(floats, p))
    patches = F.conv2d(floats.to(dtype), p.weight, stride=4).flatten(2).transpose(1, 2)
    tokens = torch.cat((p.cls.expand(2, 1, -1), patches), 1) + p.position
    stock = F.layer_norm(tokens, (16,), p.norm_weight, p.norm_bias, 1e-5)
    truth = exact(pixels, p)
    assert (actual.double() - truth).abs().max() <= 2 * (stock.double() - truth).abs().max()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 12, 12, dtype=torch.uint8), r"torch.uint8 \(1, 3, 12, 12\)"),
        (torch.zeros(1, 12, 12, 3), r"torch.float32 \(1, 12, 12, 3\)"),
        (torch.zeros(3, 12, 12), r"torch.float32 \(3, 12, 12\)"),
        (torch.zeros(1, 1, 12, 12), r"torch.float32 \(1, 1, 12, 12\)"),
        (torch.zeros(1, 3, 16, 16), "16×16 give 16 patches of 4; the position embedding has 9"),
        (torch.zeros(1, 8, 12, 3, dtype=torch.uint8), "8×12 give 6 patches of 4"),
    ],
)
def test_other_shapes_are_refused(pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(pixels, parameters(4, 9))
