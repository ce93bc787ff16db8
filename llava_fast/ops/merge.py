"""Image features into their slots of the token embeddings: out[slot_i] = features[i], the rest untouched.

Replaces `masked_scatter`: the slots come from the host (a pack knows them) or from a running count of the image
tokens on the device; neither waits for the device. Gradients flow to the features, and to the embeddings everywhere
but in the slots.

Shapes: B batch, T tokens, D width, M image tokens in all.
"""

from __future__ import annotations

import torch

from llava_fast.backend import choose, register


def merge_reference(
    embeds_BTD: torch.Tensor,
    features_MD: torch.Tensor,
    slots_M: torch.Tensor | None,
    mask_BT: torch.Tensor | None,
) -> torch.Tensor:
    rows = embeds_BTD.reshape(-1, embeds_BTD.shape[-1])
    if slots_M is not None:
        return rows.index_copy(0, slots_M, features_MD).view_as(embeds_BTD)
    mask = mask_BT.reshape(-1)
    # Row r of the output, if it is an image token, takes the feature with as many image tokens before it.
    source = (mask.cumsum(0) - 1).clamp(min=0, max=features_MD.shape[0] - 1)
    return torch.where(mask[:, None], features_MD[source], rows).view_as(embeds_BTD)


register("merge", "reference", merge_reference)


def merge(
    embeds_BTD: torch.Tensor,
    features_MD: torch.Tensor,
    *,
    slots_M: torch.Tensor | None = None,
    mask_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write image features over the embeddings of the image tokens.

    Args:
        embeds_BTD: token embeddings.
        features_MD: [M, D] image features in reading order, any floating dtype.
        slots_M: int64 [M], the flat position (row · T + column) of each image token; or
        mask_BT: bool, True at image tokens.

    Returns:
        A new [B, T, D] tensor in the dtype of the embeddings.

    Raises:
        ValueError: when the numbers of image tokens and features differ (with a mask on a GPU this is asserted on
            the device, without waiting for it).
    """
    if slots_M is not None:
        if slots_M.numel() != features_MD.shape[0]:
            raise ValueError(_mismatch(slots_M.numel(), features_MD.shape[0]))
    elif mask_BT.device.type == "cpu" and not torch.compiler.is_compiling():
        tokens = int(mask_BT.sum())
        if tokens != features_MD.shape[0]:
            raise ValueError(_mismatch(tokens, features_MD.shape[0]))
    else:
        torch._assert_async(
            mask_BT.sum() == features_MD.shape[0], _mismatch("a different number", features_MD.shape[0])
        )
    if features_MD.shape[0] == 0:
        return embeds_BTD
    features_MD = features_MD.to(embeds_BTD.dtype)
    return choose("merge", embeds_BTD, features_MD)(embeds_BTD, features_MD, slots_M, mask_BT)


def _mismatch(tokens: int | str, features: int) -> str:
    return f"Image features and image tokens do not match: tokens: {tokens}, features: {features}"
