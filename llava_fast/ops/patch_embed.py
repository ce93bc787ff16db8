"""Pixels to vision-tower tokens: normalise, patchify, project, add position and CLS, pre-LayerNorm.

    z[0]     = cls + position[0]
    z[1 + n] = patch_n(pixels) · weight + position[1 + n]
    out      = LayerNorm(z)

uint8 pixels are normalised as (p / 255 - mean) / std in float32 and rounded to the weight's dtype once.

Shapes: B images, H × W pixels, C = 3 channels, P patch size, N = (H/P)(W/P) patches, D width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, register


def patch_embed_reference(
    pixels: torch.Tensor,
    weight_DCPP: torch.Tensor,
    cls_D: torch.Tensor,
    position_ND: torch.Tensor,
    norm_weight_D: torch.Tensor,
    norm_bias_D: torch.Tensor,
    eps: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> torch.Tensor:
    if pixels.dtype == torch.uint8:
        mean_C = torch.tensor(mean, device=pixels.device)
        std_C = torch.tensor(std, device=pixels.device)
        pixels = ((pixels.float() / 255 - mean_C) / std_C).permute(0, 3, 1, 2)
    patches = F.conv2d(pixels.to(weight_DCPP.dtype), weight_DCPP, stride=weight_DCPP.shape[-1])
    patches_BND = patches.flatten(2).transpose(1, 2)
    cls = cls_D.expand(patches_BND.shape[0], 1, -1)
    tokens = torch.cat((cls, patches_BND), dim=1) + position_ND
    return F.layer_norm(tokens, norm_weight_D.shape, norm_weight_D, norm_bias_D, eps)


register("patch_embed", "reference", patch_embed_reference)


def patch_embed(
    pixels: torch.Tensor,
    weight_DCPP: torch.Tensor,
    cls_D: torch.Tensor,
    position_ND: torch.Tensor,
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
        position_ND: [1 + N, D] position embeddings, CLS first.
        norm_weight_D, norm_bias_D: [D] pre-LayerNorm.
        eps: of the LayerNorm.
        mean, std: per channel, for pixels scaled to 0–1; used with uint8 only.

    Returns:
        [B, 1 + N, D] in the dtype of the weight.

    Raises:
        ValueError: when the pixels have neither shape, or do not give N patches.
    """
    expected = "uint8 [images, height, width, 3] or floating [images, 3, height, width]"
    if pixels.dim() != 4 or pixels.shape[3 if pixels.dtype == torch.uint8 else 1] != weight_DCPP.shape[1]:
        raise ValueError(f"pixel_values is {pixels.dtype} {tuple(pixels.shape)}; expected {expected}")
    height, width = pixels.shape[1:3] if pixels.dtype == torch.uint8 else pixels.shape[2:4]
    patch = weight_DCPP.shape[-1]
    if (height // patch) * (width // patch) + 1 != position_ND.shape[0]:
        raise ValueError(
            f"pixel_values of {height}×{width} give {(height // patch) * (width // patch)} patches of {patch}; "
            f"the position embedding has {position_ND.shape[0] - 1}"
        )
    return choose("patch_embed", pixels, weight_DCPP)(
        pixels, weight_DCPP, cls_D, position_ND, norm_weight_D, norm_bias_D, eps, mean, std
    )
