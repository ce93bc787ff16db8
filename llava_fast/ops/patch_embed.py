"""Pixels to vision-tower tokens: normalise, patchify, project, add position and CLS, pre-LayerNorm.

    z[0]     = cls + position[0]
    z[1 + n] = patch_n(pixels) · weight + position[1 + n]
    out      = LayerNorm(z)

uint8 pixels are normalised as (p / 255 - mean) / std in float32 and rounded to the weight's dtype once: folding mean
and deviation into rounded weights would double the error.

Two passes. The first is a GEMM that reads patches directly from the image bytes and normalises them in registers: no
float image, no im2col buffer. Its epilogue adds the position (or writes the CLS row), so there is no concatenation. It
writes z in the dtype of the result: PyTorch rounds twice before the norm (convolution, sum), this kernel once; float32
would move 4 bytes more per element of z. The second pass is the norm, in place unless z is saved for backward. Each
call permutes the weight to [K, D], with K in the image's storage order: 1.2 MB.

Bytes per image in bf16 for CLIP ViT-L/14 at 336 (T = 577, D = 1024, K = 588): 0.34 MB of pixels, then z written, read
and written again, 1.2 MB each: 3.9 MB, besides the weight's 3.6. PyTorch's float image, convolution, concatenation, sum
and norm move 22 MB per image. FLOPs: 2 B N K D.

Backward: that of the norm, then dW = patchesᵀ · dz with the patches read and normalised as in the forward pass; only z
and two float32 per row are saved. Gradients that are not needed are not computed.

Shapes: B images, H × W pixels, C = 3 channels, P patch size, K = C P², N = (H/P)(W/P) patches, T = 1 + N, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, differentiated, extension, observed, register
from llava_fast.ops import norm
from llava_fast.ops._launch import Example, launch, multiprocessors, tile
from llava_fast.ops._patch_embed_kernels import _patch_embed_dweight_kernel, _patch_embed_fwd_kernel
from llava_fast.ops._triton import takes


def patch_embed(
    pixels: torch.Tensor,
    weight_DCPP: torch.Tensor,
    cls_D: torch.Tensor,
    position_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    norm_bias_D: torch.Tensor,
    *,
    eps: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> torch.Tensor:
    """Embed a batch of images.

    Args:
        pixels: uint8 [B, H, W, 3] as decoded, or floating [B, 3, H, W] already normalised.
        weight_DCPP: [D, 3, P, P], the weight of CLIP's patch convolution.
        cls_D: [D] class embedding.
        position_TD: [1 + N, D] position embeddings, CLS first.
        norm_weight_D, norm_bias_D: [D] pre-LayerNorm.
        eps: of the LayerNorm.
        mean, std: per channel, for pixels scaled to 0–1; used with uint8 only.

    Returns:
        [B, 1 + N, D] in the dtype of the weight.

    Raises:
        ValueError: if the pixels have neither of these shapes, or do not give N patches.
    """
    expected = "uint8 [images, height, width, 3] or floating [images, 3, height, width]"
    if pixels.dim() != 4 or pixels.shape[3 if pixels.dtype == torch.uint8 else 1] != weight_DCPP.shape[1]:
        raise ValueError(f"pixel_values is {pixels.dtype} {tuple(pixels.shape)}; expected {expected}")
    height, width = pixels.shape[1:3] if pixels.dtype == torch.uint8 else pixels.shape[2:4]
    patch = weight_DCPP.shape[-1]
    if (height // patch) * (width // patch) + 1 != position_TD.shape[0]:
        raise ValueError(
            f"pixel_values of {height}×{width} give {(height // patch) * (width // patch)} patches of {patch}; "
            f"the position embedding has {position_TD.shape[0] - 1}"
        )
    tensors = (pixels, weight_DCPP, cls_D, position_TD, norm_weight_D, norm_bias_D)
    return choose("patch_embed", *tensors)(*tensors, eps, mean, std)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_NOTE = "normalisation"  # attribute of a tensor of pixels


class Normalisation(NamedTuple):
    """Mean and deviation of each channel, for pixels scaled to 0–1."""

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __str__(self) -> str:
        return " and ".join(f"({', '.join(f'{x:.4g}' for x in values)})" for values in self)

    def same_as(self, other: Normalisation) -> bool:
        pairs = zip(self.mean + self.std, other.mean + other.std)
        return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in pairs)

    def apply(self, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[B, 3, H, W] of `dtype` from pixels as `patch_embed` takes them; only uint8 is normalised."""
        if pixels.dtype == torch.uint8:
            wide = torch.promote_types(dtype, torch.float32)
            mean_C, std_C = (torch.tensor(values, dtype=wide, device=pixels.device) for values in self)
            pixels = ((pixels.to(wide) / 255 - mean_C) / std_C).permute(0, 3, 1, 2)
        return pixels.to(dtype)


def folded(settings: Mapping[str, Any]) -> Normalisation:
    """All normalisation settings of an image processor as one mean and deviation; CLIP's where a setting is missing.

    (pixel · factor − mean) / deviation is (pixel / 255 − mean / s) / (deviation / s) with s = 255 · factor.

    Raises:
        ValueError: naming the key, for values that cannot normalise a pixel.
    """

    def value(key: str, default: Any) -> Any:
        return default if settings.get(key) is None else settings[key]

    def numbers(key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        given = value(key, default)
        found = given if isinstance(given, (list, tuple)) else [given] * len(default)
        if len(found) != len(default) or not all(type(x) in (int, float) and math.isfinite(x) for x in found):
            raise ValueError(f"{key} is {given!r}, expected {'a number' if len(default) == 1 else 'three numbers'}")
        if 0 in found and key != "image_mean":
            raise ValueError(f"{key} is {given!r}, which cannot be 0")
        return tuple(map(float, found))

    for key in ("do_rescale", "do_normalize"):
        if not isinstance(value(key, True), bool):
            raise ValueError(f"{key} is {settings[key]!r}, expected true or false")
    scale = 255 * numbers("rescale_factor", (1 / 255,))[0] if value("do_rescale", True) else 255.0
    mean, std = numbers("image_mean", CLIP_MEAN), numbers("image_std", CLIP_STD)
    if not value("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    if math.isclose(scale, 1):
        return Normalisation(mean, std)
    return Normalisation(tuple(m / scale for m in mean), tuple(s / scale for s in std))


def check_same(numbers: Normalisation, whose: object, model: Normalisation) -> None:
    """ValueError, in one line, if the model's normalisation differs from `numbers`; `whose` names their owner."""
    if not numbers.same_as(model):
        raise ValueError(
            f"{whose} normalises pixels with mean and deviation {numbers}, but the model's config (image_mean, "
            f"image_std) with {model}"
        )


def note_normalisation(pixels: Any, normalisation: Normalisation | None) -> None:
    """Attach the normalisation to a tensor of uint8 pixels, as an attribute; a copy of the tensor loses it."""
    if isinstance(pixels, torch.Tensor) and normalisation is not None:
        setattr(pixels, _NOTE, normalisation)


def noted_normalisation(pixels: Any) -> Normalisation | None:
    return getattr(pixels, _NOTE, None)


def patch_embed_reference(
    pixels: torch.Tensor,
    weight_DCPP: torch.Tensor,
    cls_D: torch.Tensor,
    position_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    norm_bias_D: torch.Tensor,
    eps: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> torch.Tensor:
    pixels = Normalisation(mean, std).apply(pixels, weight_DCPP.dtype)
    patches = F.conv2d(pixels, weight_DCPP, stride=weight_DCPP.shape[-1])
    patches_BND = patches.flatten(2).transpose(1, 2)
    cls = cls_D.expand(patches_BND.shape[0], 1, -1)
    tokens = torch.cat((cls, patches_BND), dim=1) + position_TD
    return F.layer_norm(tokens, norm_weight_D.shape, norm_weight_D, norm_bias_D, eps)


def _tile_key(dtype: torch.dtype, rows: int) -> str:
    """The key of the tile table; few rows get smaller tiles, so that every multiprocessor has one."""
    return f"{'single' if dtype == torch.float32 else 'half'}_{'few' if rows <= 2048 else 'many'}"


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """(p / 255 - mean) / std as p · scale + shift: three scales, three shifts."""
    return tuple(1 / (255 * s) for s in std) + tuple(-m / s for m, s in zip(mean, std))


def _image_arguments(
    pixels: torch.Tensor, patch: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[int | float, ...], dict[str, Any]]:
    """Height, width, scales and shifts; and the constexprs of both kernels."""
    is_bytes = pixels.dtype == torch.uint8
    height, width = pixels.shape[1:3] if is_bytes else pixels.shape[2:4]
    channels = pixels.shape[3 if is_bytes else 1]
    numbers = _normalisation(mean, std) if is_bytes else (0.0,) * 6
    return (height, width, *numbers), {"BYTES": is_bytes, "C": channels, "P": patch}


def _forward(
    pixels: torch.Tensor,
    weight_DCPP: torch.Tensor,
    cls_D: torch.Tensor,
    position_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    norm_bias_D: torch.Tensor,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The result; z if it is saved for backward; the norm's mean and 1 / deviation of each row."""
    pixels = pixels.contiguous()
    images, tokens, d = pixels.shape[0], *position_TD.shape
    rows = images * tokens
    z = torch.empty(images, tokens, d, dtype=weight_DCPP.dtype, device=pixels.device)
    if rows:
        numbers, constexprs = _image_arguments(pixels, weight_DCPP.shape[-1], mean, std)
        order = (2, 3, 1, 0) if constexprs["BYTES"] else (1, 2, 3, 0)
        weight_KD = weight_DCPP.permute(order).reshape(-1, d).contiguous()
        choice = tile("patch_embed_fwd", _tile_key(z.dtype, rows), z.device)
        launch(
            _patch_embed_fwd_kernel,
            (-(-rows // choice["BLOCK_M"]) * -(-d // choice["BLOCK_N"]),),
            *(pixels, weight_KD, cls_D.contiguous(), position_TD.contiguous(), z, rows, tokens, d, *numbers),
            tile=choice,
            **constexprs,
        )
    out, _, row_mean, rstd = norm.norm_forward(z, norm_weight_D, norm_bias_D, None, eps, out=None if keep_z else z)
    assert row_mean is not None and rstd is not None  # row_mean is None only for RMSNorm
    return out, z if keep_z else None, row_mean, rstd


def _dweight(
    pixels: torch.Tensor, weight_DCPP: torch.Tensor, dz_BTD: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    dweight = torch.empty(weight_DCPP.shape, dtype=weight_DCPP.dtype, device=dz_BTD.device)
    images, tokens, d = dz_BTD.shape
    if images == 0:
        return dweight.zero_()
    numbers, constexprs = _image_arguments(pixels, weight_DCPP.shape[-1], mean, std)
    choice = tile("patch_embed_dweight", "single" if dz_BTD.dtype == torch.float32 else "half", dz_BTD.device)
    launch(
        _patch_embed_dweight_kernel,
        (-(-weight_DCPP[0].numel() // choice["BLOCK_K"]) * -(-d // choice["BLOCK_N"]),),
        *(pixels.contiguous(), dz_BTD, dweight, images * tokens, tokens, d, *numbers),
        tile=choice,
        **constexprs,
    )
    return dweight


def _dpixels(pixels: torch.Tensor, weight_DCPP: torch.Tensor, dz_BTD: torch.Tensor) -> torch.Tensor:
    """The gradient of float pixels, in PyTorch since it is rarely needed. Pixels at the margin may be in no patch."""
    images, channels, height, width = pixels.shape
    patch = weight_DCPP.shape[-1]
    rows, columns = height // patch, width // patch
    patches = (dz_BTD[:, 1:] @ weight_DCPP.flatten(1)).view(images, rows, columns, channels, patch, patch)
    inner = patches.permute(0, 3, 1, 4, 2, 5).reshape(images, channels, rows * patch, columns * patch)
    return F.pad(inner, (0, width - columns * patch, 0, height - rows * patch)).to(pixels.dtype)


@torch.library.custom_op("llava_fast::patch_embed", mutates_args=())
def _patch_embed_op(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    cls: torch.Tensor,
    position: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out, z, row_mean, rstd = _forward(pixels, weight, cls, position, norm_weight, norm_bias, eps, mean, std, keep_z)
    return out, out.new_empty(0) if z is None else z, row_mean, rstd


@_patch_embed_op.register_fake
def _patch_embed_fake(pixels, weight, cls, position, norm_weight, norm_bias, eps, mean, std, keep_z):
    out = weight.new_empty(pixels.shape[0], *position.shape)
    row = weight.new_empty(pixels.shape[0] * position.shape[0], dtype=torch.float32)
    return out, torch.empty_like(out) if keep_z else out.new_empty(0), row, torch.empty_like(row)


# A custom op cannot return None, so a gradient that is not needed is an empty tensor.
@torch.library.custom_op("llava_fast::patch_embed_backward", mutates_args=())
def _patch_embed_backward_op(
    dout: torch.Tensor,
    pixels: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    norm_weight: torch.Tensor,
    row_mean: torch.Tensor,
    rstd: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    want: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`want` and the results: pixels, weight, cls, position, norm weight, norm bias."""
    dz, dnorm_weight, dnorm_bias = norm.norm_backward(dout, None, z, norm_weight, row_mean, rstd, want[4] or want[5])
    nothing = z.new_empty(0)  # two outputs must not be the same tensor
    return (
        _dpixels(pixels, weight, dz) if want[0] else pixels.new_empty(0),
        _dweight(pixels, weight, dz, mean, std) if want[1] else nothing,
        dz[:, 0].sum(0) if want[2] else nothing.clone(),
        dz.sum(0) if want[3] else nothing.clone(),
        dnorm_weight if want[4] and dnorm_weight is not None else nothing.clone(),
        dnorm_bias if want[5] and dnorm_bias is not None else nothing.clone(),
    )


@_patch_embed_backward_op.register_fake
def _patch_embed_backward_fake(dout, pixels, weight, z, norm_weight, row_mean, rstd, mean, std, want):
    width = norm_weight.shape
    shapes = (pixels.shape, weight.shape, width, z.shape[1:], width, width)
    like = (pixels, *[z] * 5)
    return tuple(t.new_empty(shape if wanted else 0) for t, shape, wanted in zip(like, shapes, want))


def _setup_context(ctx, inputs, output):
    pixels, weight, _, _, norm_weight, _, _, ctx.mean, ctx.std, _ = inputs
    _, z, row_mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pixels, weight, z, norm_weight, row_mean, rstd)


def _autograd(ctx, dout, _dz, _dmean, _drstd):
    want = list(ctx.needs_input_grad[:6])
    gradients = torch.ops.llava_fast.patch_embed_backward(dout, *ctx.saved_tensors, ctx.mean, ctx.std, want)
    return *(gradient if wanted else None for gradient, wanted in zip(gradients, want)), None, None, None, None


_patch_embed_op.register_autograd(_autograd, setup_context=_setup_context)


def _supports(pixels: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> bool | str:
    for tensor in others:
        if tensor.dtype != weight.dtype:
            return f"the patch weight is {weight.dtype}, another parameter {tensor.dtype}"
    if pixels.dtype == torch.uint8 and weight.shape[1] != 3:
        return f"uint8 pixels have {weight.shape[1]} channels; the kernel normalises 3"
    if weight.shape[0] > norm.MAX_WIDTH:
        return f"width {weight.shape[0]} is over {norm.MAX_WIDTH}"
    return takes(weight) if pixels.dtype == torch.uint8 else takes(pixels, weight)


def _patch_embed_triton(pixels, weight, cls, position, norm_weight, norm_bias, eps, mean, std):
    tensors = (pixels, weight, cls, position, norm_weight, norm_bias)
    run = torch.ops.llava_fast.patch_embed if observed(*tensors) else _forward
    return run(*tensors, eps, mean, std, differentiated(*tensors))[0]


def _patch_embed_cuda(pixels, weight, cls, position, norm_weight, norm_bias, eps, mean, std):
    module, pixels = extension(), pixels.contiguous()
    weight_KD = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]).contiguous()
    inputs = {"pixels": pixels, "weight": weight_KD, "cls": cls, "position": position}
    inputs = {**inputs, "norm_weight": norm_weight, "norm_bias": norm_bias}
    inputs = {name: tensor.contiguous() for name, tensor in inputs.items()}
    out = torch.empty(pixels.shape[0], *position.shape, dtype=weight.dtype, device=pixels.device)
    with torch.cuda.device(pixels.device):
        module.patch_embed_forward(
            output=out.data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in inputs.items()},
            **_cuda_sizes(module, pixels, weight),
            eps=eps,
            mean=mean,
            std=std,
            stream=torch.cuda.current_stream(pixels.device).cuda_stream,
        )
    return out


def _cuda_sizes(module: Any, pixels: torch.Tensor, weight_DCPP: torch.Tensor) -> dict[str, Any]:
    images, height, width, _ = pixels.shape
    return {
        **{"images": images, "height": height, "width": width},
        **{"patch": weight_DCPP.shape[-1], "columns": weight_DCPP.shape[0]},
        "dtype": getattr(module.DType, str(weight_DCPP.dtype).removeprefix("torch.")),
        "multiprocessors": multiprocessors(pixels.device),
    }


def _supports_cuda(pixels: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> bool | str:
    if differentiated(pixels, weight, *others):
        return "the CUDA kernel has no backward"
    if not pixels.is_cuda:
        return f"the tensors are on {pixels.device.type}"
    if pixels.dtype != torch.uint8:
        return f"the pixels are {pixels.dtype}; the CUDA kernel takes torch.uint8"
    answer = _supports(pixels, weight, *others)
    if answer is not True:
        return answer
    module, nowhere = extension(), 16  # any aligned address
    names = ("output", "pixels", "weight", "cls", "position", "norm_weight", "norm_bias")
    try:
        sizes = _cuda_sizes(module, pixels, weight)
        module.patch_embed_plan(**dict.fromkeys(names, nowhere), **sizes, eps=0, mean=(0,) * 3, std=(1,) * 3)
    except ValueError as error:
        return str(error)
    return True


register("patch_embed", "reference", patch_embed_reference)
register("patch_embed", "triton", _patch_embed_triton, _supports)
register("patch_embed", "cuda", _patch_embed_cuda, _supports_cuda)


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """CLIP ViT-L/14 at 336, from bytes (timed by the tuner) and from floats: one image, and 31, whose number of rows is
    not a multiple of 16, as in most batches."""
    side, width, patch = (336, 1024, 14) if device.type != "cpu" else (28, 32, 14)
    single, tokens = dtype == torch.float32, 1 + (side // patch) ** 2
    shapes = ((width, 3, patch, patch), (width,), (tokens, width), (width,), (width,))
    weight, cls, position, norm_weight, norm_bias = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    mean_std = (0.5,) * 3, (0.5,) * 3  # pixels from -1 to 1
    tiles = [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m in (32, 64, 128)
        for n in (64, 128, 256)
        for k in ((16,) if single else (32, 64))
        for warps in (4, 8)
        for stages in (2, 3, 4)
        if 16 <= m * n // (32 * warps) <= 64
    ]
    for as_bytes in (True, False):
        timed = tiles if as_bytes else []
        for images in (1, 31):
            pixels = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, device=device)
            if not as_bytes:
                pixels = pixels.permute(0, 3, 1, 2).to(dtype).contiguous()
            call = partial(
                _forward, pixels, weight, cls, position, norm_weight, norm_bias, 1e-5, *mean_std, keep_z=False
            )
            yield Example("patch_embed_fwd", _tile_key(dtype, images * tokens), call, timed)
        dz = torch.randn(images, tokens, width, device=device).to(dtype)
        yield Example(
            "patch_embed_dweight",
            "single" if single else "half",
            partial(_dweight, pixels, weight, dz, *mean_std),
            timed,
        )
