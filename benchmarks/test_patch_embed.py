"""Pixels to the vision tower's tokens: uint8 images to patches, position, CLS, pre-LayerNorm; for 1, 8 and 32 images.

Everything after decoding is measured, including normalisation, which other providers do in separate passes. With
backward, the gradients of all weights (a trained tower); pixels have none.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from benchmarks.harness import Case, Tensors, benchmark_of, function, report, with_weights
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.ops import patch_embed

EPS = 1e-5
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.25, 0.3)


def cases(gpu: bool) -> list[Case]:
    """The cases on a GPU (CLIP ViT-L/14 at 336, bf16), and smaller ones on a CPU."""
    dtype = torch.bfloat16 if gpu else torch.float32
    shapes = [(images, 336, 14, 1024) for images in (1, 8, 32)] if gpu else [(1, 56, 14, 64), (4, 112, 14, 128)]
    return [patch_embed_case(*shape, dtype, backward) for shape in shapes for backward in (False, True)]


def patch_embed_case(images: int, side: int, patch: int, width: int, dtype: torch.dtype, backward: bool) -> Case:
    patches, depth = (side // patch) ** 2, 3 * patch**2

    def inputs() -> Tensors:
        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, device=DEVICE).to(dtype)

        return {
            "pixels": torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, device=DEVICE),
            "weight": draw(width, 3, patch, patch) / patch,
            **{"cls": draw(width), "position": draw(1 + patches, width)},
            **{"norm_weight": draw(width), "norm_bias": draw(width)},
        }

    # Pixels and weights are read and tokens written; backward reads pixels, what was normalised and its gradient, and
    # writes the weights' gradients.
    pixels, tokens = 3 * images * side**2, images * (1 + patches) * width * dtype.itemsize
    weights = (depth + patches + 4) * width * dtype.itemsize
    return Case(
        op="patch_embed",
        shape=(images, side, patch, width),
        dtype=dtype,
        backward=backward,
        inputs=inputs,
        reference=_reference,
        providers=providers(backward),
        bytes_moved=(2 * pixels + 3 * tokens + 2 * weights) if backward else pixels + tokens + weights,
        flops=(4 if backward else 2) * images * patches * depth * width,
    )


def providers(backward: bool) -> dict[str, Callable[[Tensors], Callable]]:
    """The providers. `hf` is transformers' module, `linear` the convolution as a GEMM of unfolded patches."""
    found = {"hf": _hf, "linear": function(_linear)}
    if not torch.cuda.is_available():
        return {**found, "reference": function(_reference)}
    found["compile"] = function(torch.compile(_linear))
    if not backend.unavailable("triton"):
        found["triton"] = function(_with_backend("triton"))
    if not backend.unavailable("cuda") and not backward:
        found["cuda"] = function(_with_backend("cuda"))
    return found


def _reference(pixels, weight, cls, position, norm_weight, norm_bias):
    tensors = (pixels, weight, cls, position, norm_weight, norm_bias)
    return (patch_embed.patch_embed_reference(*tensors, EPS, MEAN, STD),)


def _normalised(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, 3, H, W], as an image processor on the GPU would make it."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).to(dtype).permute(0, 3, 1, 2)


def _hf(inputs: Tensors) -> Callable:
    pixels, weight, position = inputs["pixels"], inputs["weight"], inputs["position"]
    sizes = {"hidden_size": len(weight), "image_size": pixels.shape[1], "patch_size": weight.shape[-1]}
    module = CLIPVisionEmbeddings(CLIPVisionConfig(**sizes, num_attention_heads=1)).to(DEVICE)
    with_weights(module, class_embedding=inputs["cls"])
    with_weights(module.patch_embedding, weight=weight)
    with_weights(module.position_embedding, weight=position)
    norm = with_weights(torch.nn.LayerNorm(len(weight), EPS), weight=inputs["norm_weight"], bias=inputs["norm_bias"])
    return lambda: (norm(module(_normalised(pixels, weight.dtype))),)


def _linear(pixels, weight, cls, position, norm_weight, norm_bias):
    images, height, width, _ = pixels.shape
    patch = weight.shape[-1]
    grid = (
        _normalised(pixels, weight.dtype).unflatten(3, (width // patch, patch)).unflatten(2, (height // patch, patch))
    )
    patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, C · P · P]
    tokens = torch.cat((cls.expand(images, 1, -1), F.linear(patches, weight.flatten(1))), dim=1) + position
    return (F.layer_norm(tokens, cls.shape, norm_weight, norm_bias, EPS),)


def _with_backend(name: str) -> Callable:
    def call(**inputs):
        with backend.use_backend(name, "patch_embed"):
            return (patch_embed.patch_embed(*inputs.values(), eps=EPS, mean=MEAN, std=STD),)

    return call


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_patch_embed(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
