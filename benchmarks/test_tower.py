"""Vision tower and projector at inference: normalised pixels of 1, 8 and 32 images to rows of the language model.

CLIP ViT-L/14-336, feature layer −2, mlp2x_gelu. `hf` is transformers' own model, which runs all layers; `compile` is
the same compiled, with the patch convolution as a GEMM. Pixels are floating here, as transformers takes them; the
benchmark of the patch embedding measures uint8 pixels.
"""

import copy
from collections.abc import Callable
from functools import cache

import torch
import transformers
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from benchmarks.harness import Case, Tensors, benchmark_of, function, report
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.model.llava import LlavaModel

OPERATIONS = ("patch_embed", "layer_norm", "attention", "quick_gelu", "projector")
Rows = Callable[[torch.Tensor], tuple[torch.Tensor]]


def cases(gpu: bool) -> list[Case]:
    dtype = torch.bfloat16 if gpu else torch.float32
    return [tower_case(images, dtype, large=gpu) for images in ((1, 8, 32) if gpu else (1,))]


def config(large: bool) -> LlavaConfig:
    width, layers, size, text = (1024, 24, 336, 4096) if large else (128, 4, 112, 256)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=size,
        patch_size=14,
    )
    # The language model is not run; one layer of it is enough.
    language = LlamaConfig(
        hidden_size=text, intermediate_size=text, num_hidden_layers=1, num_attention_heads=text // 64
    )
    return LlavaConfig(vision_config=vision, text_config=language, vision_feature_layer=-2)


def tower_case(images: int, dtype: torch.dtype, *, large: bool) -> Case:
    size, width = (336, 1024) if large else (112, 128)

    def inputs() -> Tensors:
        return {"pixels": torch.randn(images, 3, size, size, device=DEVICE).to(dtype)}

    flops, weights, results = work(images, large)
    return Case(
        op="tower",
        shape=(images, (size // 14) ** 2 + 1, width),
        dtype=dtype,
        backward=False,
        inputs=inputs,
        reference=lambda pixels: _ours("reference", large)(pixels),
        providers={name: function(fn) for name, fn in providers(large).items()},
        bytes_moved=(weights + images * 3 * size * size + results) * dtype.itemsize,
        flops=flops,
    )


def work(images: int, large: bool) -> tuple[int, int, int]:
    """FLOPs of the layers up to the feature layer and of the projector; numbers of elements in weights and results."""
    size, width, text, layers = (336, 1024, 4096, 23) if large else (112, 128, 256, 3)
    patches = (size // 14) ** 2
    tokens = patches + 1
    # Per token and layer: q, k, v, output and MLP, and two products with all keys.
    layer = 12 * width * width + 2 * tokens * width
    products = tokens * layers * layer + patches * (3 * 14 * 14 * width + width * text + text * text)
    weights = layers * 12 * width * width + 3 * 14 * 14 * width + width * text + text * text
    return 2 * images * products, weights, images * patches * text


@cache
def model(large: bool, dtype: torch.dtype, *, stock: bool = False) -> torch.nn.Module:
    """Ours or transformers' model without its head, with the same random weights."""
    torch.manual_seed(0)
    ours = LlavaModel(config(large)).eval()
    if stock:
        theirs = transformers.LlavaModel(config(large)).eval()
        theirs.load_state_dict(ours.state_dict())
        ours = theirs
    return ours.to(DEVICE, dtype)


def providers(large: bool) -> dict[str, Rows]:
    def hf(pixels):
        features = model(large, pixels.dtype, stock=True).get_image_features(pixels).pooler_output
        return (torch.cat(list(features)),)

    if not torch.cuda.is_available():
        return {"hf": hf, "reference": _ours("reference", large)}
    found = {"hf": hf, "compile": _compiled(large)}
    if not backend.unavailable("triton"):
        found["triton"] = _ours("triton", large)
    return found


def _ours(name: str, large: bool) -> Rows:
    def call(pixels):
        with backend.use_backend(name, *OPERATIONS):
            features = model(large, pixels.dtype).get_image_features(pixels).pooler_output
        return (torch.cat(features),)

    return call


def _compiled(large: bool) -> Rows:
    """transformers' model, compiled at its first use."""

    class Patches(torch.nn.Module):
        def __init__(self, weight: torch.Tensor):
            super().__init__()
            self.weight = weight

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            rows_BNK = F.unfold(pixels, 14, stride=14).transpose(1, 2)
            side = pixels.shape[-1] // 14
            return F.linear(rows_BNK, self.weight.flatten(1)).transpose(1, 2).unflatten(2, (side, side))

    @cache
    def prepared(dtype: torch.dtype) -> Callable:
        theirs = copy.deepcopy(model(large, dtype, stock=True))
        theirs.vision_tower.embeddings.patch_embedding = Patches(theirs.vision_tower.embeddings.patch_embedding.weight)
        return torch.compile(theirs.get_image_features)

    def call(pixels):
        return (torch.cat(list(prepared(pixels.dtype)(pixels).pooler_output)),)

    return call


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_tower(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
