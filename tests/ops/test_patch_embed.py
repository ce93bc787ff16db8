"""Pixels to tokens: the reference patch by patch and against transformers' CLIP, the kernels by the kit's rules."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from kit import ALSO_HALF, DEVICES, DTYPES, check_kernel, poisoned
from torch.nn import functional as F
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from llava_fast.backend import BackendUnavailable, use_backend
from llava_fast.ops import patch_embed as module
from llava_fast.ops._launch import recorded
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


# ---- the kernels

FORWARD = ["patch_embed_fwd_kernel", "norm_fwd_kernel"]
KERNELS = [*FORWARD, "norm_bwd_kernel", "patch_embed_dweight_kernel"]
# Images, height, width, patch, tower's width: one patch, a margin no patch covers, odd widths, 588 numbers a patch.
SHAPES = [(1, 4, 4, 4, 16), (3, 12, 12, 4, 64), (2, 17, 17, 5, 70), (2, 9, 14, 3, 33), (2, 28, 42, 14, 48)]


def tensors(images, height, width, patch, d, dtype, device, *, as_bytes: bool) -> dict[str, torch.Tensor]:
    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size).to(device, dtype)

    pixels = draw(images, 3, height, width)
    if as_bytes:
        pixels = torch.randint(0, 256, (images, height, width, 3), dtype=torch.uint8).to(device)
    position = draw(1 + (height // patch) * (width // patch), d)
    return {
        **{"pixels": pixels, "weight_DCPP": draw(d, 3, patch, patch) / patch, "cls_D": draw(d)},
        **{"position_TD": position, "norm_weight_D": draw(d), "norm_bias_D": draw(d)},
    }


def embed(**inputs: torch.Tensor) -> torch.Tensor:
    return patch_embed(**inputs, eps=1e-5, mean=MEAN, std=STD)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("as_bytes", [True, False], ids=["bytes", "floats"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, as_bytes, device):
    for dtype in DTYPES:
        draws = [tensors(*shape, dtype, device, as_bytes=as_bytes) for _ in range(2)]
        check_kernel(embed, *draws, op="patch_embed", kernels=KERNELS)


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_kernel_on_more_rows_than_a_tile(dtype, device):
    """Tiles that span several images, and several steps of the sum over rows in dW."""
    inputs = tensors(9, 20, 24, 4, 80, dtype, device, as_bytes=True)
    check_kernel(embed, inputs, op="patch_embed", kernels=KERNELS)


@pytest.mark.parametrize("device", DEVICES)
def test_kernel_on_float_pixels_of_another_dtype(device):
    """transformers' processor gives float32 pixels whatever the model's dtype: they are rounded in registers."""
    inputs = tensors(2, 12, 12, 4, 32, torch.float16, device, as_bytes=False)
    inputs["pixels"] = inputs["pixels"].float() / 3
    check_kernel(embed, inputs, op="patch_embed", kernels=KERNELS)


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_kernel_on_strided_inputs(dtype, device):
    wide = tensors(4, 12, 24, 4, 64, dtype, device, as_bytes=True)
    inputs = {name: t[..., :32] if name in ("cls_D", "norm_weight_D", "norm_bias_D") else t for name, t in wide.items()}
    inputs["pixels"] = wide["pixels"][::2, :, 4:16]
    inputs["weight_DCPP"] = wide["weight_DCPP"][::2].to(memory_format=torch.channels_last)
    inputs["position_TD"] = wide["position_TD"][:10, 16:48]
    check_kernel(embed, inputs, op="patch_embed", kernels=KERNELS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("as_bytes", [True, False], ids=["bytes", "floats"])
def test_kernel_on_no_images(as_bytes, device):
    inputs = tensors(0, 8, 8, 4, 16, torch.float32, device, as_bytes=as_bytes)
    found = check_kernel(embed, inputs, op="patch_embed", kernels=[])
    assert found["out0"].shape == (0, 5, 16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("trained", "kernels"),
    [
        ((), FORWARD),
        (("weight_DCPP",), KERNELS),
        (("cls_D", "position_TD"), KERNELS[:3]),
        (("norm_weight_D", "norm_bias_D"), KERNELS[:3]),
    ],
)
def test_what_is_frozen_costs_nothing(trained, kernels, device):
    inputs = tensors(2, 8, 8, 4, 16, torch.float32, device, as_bytes=True)
    frozen = [name for name in inputs if name not in trained]
    with recorded() as launched:
        check_kernel(embed, inputs, op="patch_embed", kernels=kernels, frozen=frozen)
    want_dweight = [launch.constexprs["WANT_DWEIGHT"] for launch in launched if "WANT_DWEIGHT" in launch.constexprs]
    assert want_dweight == (["norm_weight_D" in trained] if trained else [])


def test_the_norm_is_in_place_where_nothing_is_kept():
    inputs = tensors(2, 8, 8, 4, 16, torch.float32, "cpu", as_bytes=True)
    for keep in (False, True):
        with use_backend("triton", "patch_embed"), recorded() as launched:
            embed(**{name: t.requires_grad_(keep and t.is_floating_point()) for name, t in inputs.items()})
        x, y = launched[1].args[0], launched[1].args[4]
        assert (x.data_ptr() == y.data_ptr()) is not keep


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("as_bytes", [True, False], ids=["bytes", "floats"])
def test_opcheck(as_bytes, device):
    inputs = list(tensors(2, 9, 8, 4, 16, torch.float32, device, as_bytes=as_bytes).values())
    numbers = (list(MEAN), list(STD))
    torch.library.opcheck(module._patch_embed_op, (*inputs, 1e-5, *numbers, False))
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    torch.library.opcheck(module._patch_embed_op, (*leaves, 1e-5, *numbers, True))
    pixels, weight, _, _, norm_weight, _ = (t.detach() for t in leaves)
    z, row = torch.randn(2, 5, 16, device=device), torch.rand(10, device=device)
    for want in ([not as_bytes, True, False, True, False, True], [False, False, True, False, True, False]):
        arguments = (torch.randn_like(z), pixels, weight, z, norm_weight, row, row, *numbers, want)
        torch.library.opcheck(module._patch_embed_backward_op, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    inputs = tensors(2, 8, 8, 4, 16, torch.float32, device, as_bytes=True)
    inputs["weight_DCPP"].requires_grad_()

    def step(**inputs):
        return embed(**inputs).square().sum()

    with use_backend("triton", "patch_embed"), poisoned():
        (expected,) = torch.autograd.grad(step(**inputs), inputs["weight_DCPP"])
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(**inputs)
        (found,) = torch.autograd.grad(found, inputs["weight_DCPP"])
    torch.testing.assert_close(found, expected)


def test_what_the_kernel_does_not_take():
    def asked(**changes):
        inputs = tensors(1, 4, 4, 4, 8, torch.float32, "cpu", as_bytes=True) | changes
        with use_backend("triton", "patch_embed"):
            embed(**inputs)

    with pytest.raises(
        BackendUnavailable, match=r"the patch weight is torch\.float32, another parameter torch\.float16"
    ):
        asked(cls_D=torch.ones(8, dtype=torch.float16))
    with pytest.raises(BackendUnavailable, match="uint8 pixels have 1 channels; the kernel normalises 3"):
        asked(pixels=torch.zeros(1, 4, 4, 1, dtype=torch.uint8), weight_DCPP=torch.ones(8, 1, 4, 4))
    with pytest.raises(BackendUnavailable, match=r"torch\.float64 is not one of"):
        asked(pixels=torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    with pytest.raises(BackendUnavailable, match="width 8193 is over 8192"):
        asked(**tensors(1, 4, 4, 4, 8193, torch.float32, "cpu", as_bytes=True))


def test_rounded_pixels_are_more_exact_than_a_folded_weight():
    """In bfloat16 the kernel normalises pixels, and rounds them; its error is within PyTorch's own, by the largest and
    by root mean square. With mean and deviation folded into rounded weights it would be larger."""
    inputs = tensors(4, 56, 56, 14, 128, torch.bfloat16, "cpu", as_bytes=True)
    with use_backend("reference"):
        truth = embed(**{name: t.double() if t.is_floating_point() else t for name, t in inputs.items()})
        theirs = embed(**inputs)
    with use_backend("triton", "patch_embed"):
        ours = embed(**inputs)

    wide = {name: t.float() for name, t in inputs.items()}
    scale, shift = torch.tensor(module._normalisation(MEAN, STD)).split(3)
    folded_DK = (wide["weight_DCPP"] * scale.view(3, 1, 1)).bfloat16().float().flatten(1)
    bias_D = (wide["weight_DCPP"] * shift.view(3, 1, 1)).sum((1, 2, 3))
    patches = F.unfold(wide["pixels"].permute(0, 3, 1, 2), 14, stride=14).transpose(1, 2) @ folded_DK.T + bias_D
    z = (torch.cat((wide["cls_D"].expand(4, 1, -1), patches), 1) + wide["position_TD"]).bfloat16().float()
    folded = F.layer_norm(z, (128,), wide["norm_weight_D"], wide["norm_bias_D"], 1e-5).bfloat16()

    errors = [out.double() - truth for out in (ours, theirs, folded)]
    largest, square = ([float(of(error.abs())) for error in errors] for of in (torch.max, torch.norm))
    assert largest[0] <= largest[1]
    assert square[0] <= square[1] < square[2]


@pytest.mark.gpu
def test_bfloat16_at_full_size():
    inputs = tensors(2, 336, 336, 14, 1024, torch.bfloat16, "cuda", as_bytes=True)
    check_kernel(embed, inputs, op="patch_embed", kernels=KERNELS)


# ---- the CUDA twin

# Whole tiles, several columns of tiles, a block of few strips; strips that are aligned to 16, 4 and 1 bytes.
CUDA_SHAPES = [
    (5, 336, 336, 14, 1024),
    (1, 336, 336, 14, 1024),
    (3, 28, 42, 14, 264),
    (2, 17, 17, 5, 72),
    (1, 4, 4, 4, 16),
]


def cuda_embed(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> None:
    """The twin against PyTorch; the pixels start `offset` bytes into their storage."""
    inputs = tensors(*shape, dtype, "cuda", as_bytes=True)
    storage = torch.empty(inputs["pixels"].numel() + offset, dtype=torch.uint8, device="cuda")
    inputs["pixels"] = storage[offset:].view_as(inputs["pixels"]).copy_(inputs["pixels"])
    check_kernel(embed, inputs, op="patch_embed", kernels=[], frozen=tuple(inputs), backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_cuda_twin(shape, dtype):
    cuda_embed(shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [1, 4])
def test_cuda_twin_on_pixels_that_are_not_aligned(offset):
    cuda_embed((3, 28, 42, 14, 264), torch.bfloat16, offset)


@pytest.mark.gpu
def test_cuda_twin_on_no_images():
    cuda_embed((0, 28, 28, 14, 64), torch.bfloat16)


def test_the_cuda_twin_refuses_what_it_cannot_do():
    inputs = list(tensors(1, 4, 4, 4, 16, torch.float16, "cpu", as_bytes=True).values())
    assert module._supports_cuda(*inputs) == "the tensors are on cpu"
    inputs[1].requires_grad_()
    assert module._supports_cuda(*inputs) == "the CUDA kernel has no backward"
    with torch.no_grad():
        assert module._supports_cuda(*inputs) == "the tensors are on cpu"


@pytest.mark.gpu
def test_what_the_cuda_twin_does_not_take():
    inputs = list(tensors(1, 8, 8, 4, 12, torch.float16, "cuda", as_bytes=True).values())
    assert module._supports_cuda(*inputs) == "columns is 12, not a multiple of 8"
    assert "takes torch.uint8" in module._supports_cuda(inputs[0].half().permute(0, 3, 1, 2), *inputs[1:])
