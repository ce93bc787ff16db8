"""Merges token embeddings and image features: out[row] = feature[i] if the row is the i-th slot, else table[id].

Replaces an embedding look-up followed by `masked_scatter`: one kernel writes each row once, from the table or from the
features (4·T·D bytes in bf16; the look-up alone moves as much, and `masked_scatter` reads and writes it all again with
a mask of T·D). Rows of image tokens do not read the table. The slots come from the host (a pack knows them) or from a
running count of the image tokens on the device: one int32 per row, without synchronisation.

Backward: the gradient of the features is a gather of rows. That of the table is PyTorch's embedding backward, without
the rows of image and padding tokens; it is skipped for a frozen table. `merge` takes embedded text instead of a table.

Shapes: B batch, T tokens, V vocabulary, D width, M image tokens in all, R = B · T rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

from llava_fast.backend import choose, observed, register
from llava_fast.ops._launch import Example, as_rows, launch, tile
from llava_fast.ops._triton import jit, takes, tl


def merge(
    embeds_BTD: torch.Tensor,
    features_MD: torch.Tensor,
    *,
    slots_M: torch.Tensor | None = None,
    mask_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Replace the embeddings of image tokens by image features.

    Args:
        embeds_BTD: token embeddings.
        features_MD: [M, D] image features in reading order, any floating dtype.
        slots_M: int64 [M], the flat position (row · T + column) of each image token, each once; or
        mask_BT: bool, True at image tokens.

    Returns:
        A new [B, T, D] tensor in the dtype of the embeddings.

    Raises:
        ValueError: when the numbers of image tokens and features differ (with a mask on a GPU this is asserted on
            the device, without waiting for it).
    """
    _require_a_feature_each(features_MD, slots_M, mask_BT)
    if features_MD.shape[0] == 0:
        return embeds_BTD
    return choose("merge", embeds_BTD, features_MD)(embeds_BTD, None, features_MD, slots_M, mask_BT, -1)


def embed_merge(
    ids_BT: torch.Tensor,
    table_VD: torch.Tensor,
    features_MD: torch.Tensor,
    *,
    slots_M: torch.Tensor | None = None,
    mask_BT: torch.Tensor | None = None,
    padding_id: int | None = None,
) -> torch.Tensor:
    """Look up the tokens' embeddings and put image features in the slots, in one pass.

    Args:
        ids_BT: int64; the kernel does not read those of image tokens.
        table_VD: embedding table.
        features_MD, slots_M, mask_BT: as `merge` takes them.
        padding_id: token that gives its row of the table no gradient (`nn.Embedding.padding_idx`).

    Returns:
        [B, T, D] in the dtype of the table. For an id outside the vocabulary the kernel writes NaN; on a CPU it is an
        `IndexError`.

    Raises:
        ValueError: as `merge`.
    """
    _require_a_feature_each(features_MD, slots_M, mask_BT)
    padding_id = -1 if padding_id is None else padding_id % table_VD.shape[0]
    return choose("merge", table_VD, features_MD)(table_VD, ids_BT, features_MD, slots_M, mask_BT, padding_id)


def _require_a_feature_each(
    features_MD: torch.Tensor, slots_M: torch.Tensor | None, mask_BT: torch.Tensor | None
) -> None:
    features = features_MD.shape[0]
    if slots_M is not None:
        if slots_M.numel() != features:
            raise ValueError(_mismatch(slots_M.numel(), features))
    elif mask_BT is None:
        raise ValueError("merge: neither slots_M nor mask_BT says which tokens are the image's")
    elif mask_BT.device.type == "cpu" and not torch.compiler.is_compiling():
        tokens = int(mask_BT.sum())
        if tokens != features:
            raise ValueError(_mismatch(tokens, features))
    else:
        torch._assert_async(mask_BT.sum() == features, _mismatch("a different number", features))


def _mismatch(tokens: int | str, features: int) -> str:
    return f"Image features and image tokens do not match: tokens: {tokens}, features: {features}"


def merge_reference(
    table: torch.Tensor,
    ids_BT: torch.Tensor | None,
    features_MD: torch.Tensor,
    slots_M: torch.Tensor | None,
    mask_BT: torch.Tensor | None,
    padding_id: int,
) -> torch.Tensor:
    if ids_BT is not None:
        table = F.embedding(ids_BT, table, None if padding_id < 0 else padding_id)
    if features_MD.shape[0] == 0:
        return table
    rows = table.reshape(-1, table.shape[-1])
    features_MD = features_MD.to(rows.dtype)
    if slots_M is not None:
        return rows.index_copy(0, slots_M, features_MD).view(table.shape)
    assert mask_BT is not None
    mask = mask_BT.reshape(-1)
    # An image token takes feature number i, where i is the number of image tokens before it.
    source = (mask.cumsum(0) - 1).clamp(min=0, max=features_MD.shape[0] - 1)
    return torch.where(mask[:, None], features_MD[source], rows).view(table.shape)


@jit
def _merge_fwd_kernel(
    table_ptr,
    ids_ptr,
    features_ptr,
    source_ptr,
    out_ptr,
    vocabulary,
    count,
    width,
    table_stride,
    features_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    out_ptr += row * width + column
    source = tl.load(source_ptr + row).to(tl.int64)
    if source >= 0:
        known = source < count
        value = tl.load(features_ptr + source * features_stride + column, mask=inside & known, other=0.0).to(tl.float32)
    else:
        token = row
        if ids_ptr is not None:
            token = tl.load(ids_ptr + row)
        known = (token >= 0) & (token < vocabulary)
        value = tl.load(table_ptr + token * table_stride + column, mask=inside & known, other=0.0).to(tl.float32)
    # An id outside the table or a missing feature gives a row of NaN rather than a silent error.
    value = tl.where(known, value, float("nan"))
    tl.store(out_ptr, value.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _merge_bwd_kernel(dout_ptr, source_ptr, dtext_ptr, dfeatures_ptr, count, width, dout_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = tl.load(source_ptr + row).to(tl.int64)
    if dtext_ptr is None:
        if source < 0:
            return
    dout = tl.load(dout_ptr + row * dout_stride + column, mask=inside, other=0.0)
    if dtext_ptr is not None:
        text = tl.where(source < 0, dout, 0.0)
        tl.store(dtext_ptr + row * width + column, text.to(dtext_ptr.dtype.element_ty), mask=inside)
    if dfeatures_ptr is not None:
        wanted = inside & (source >= 0) & (source < count)
        tl.store(dfeatures_ptr + source * width + column, dout.to(dfeatures_ptr.dtype.element_ty), mask=wanted)


def _sources(
    slots_M: torch.Tensor | None, mask_BT: torch.Tensor | None, rows: int, device: torch.device
) -> torch.Tensor:
    """int32 [R]: the index of each row's feature, −1 for text."""
    if slots_M is not None:
        order = torch.arange(slots_M.numel(), device=device, dtype=torch.int32)
        return torch.full((rows,), -1, device=device, dtype=torch.int32).index_copy_(0, slots_M, order)
    assert mask_BT is not None
    mask = mask_BT.reshape(-1)
    return torch.where(mask, mask.cumsum(0, dtype=torch.int32) - 1, -1)


def _forward(
    table: torch.Tensor, ids: torch.Tensor | None, features: torch.Tensor, source_R: torch.Tensor
) -> torch.Tensor:
    rows, shape = as_rows(table), table.shape if ids is None else (*ids.shape, table.shape[1])
    out, width = torch.empty(shape, dtype=table.dtype, device=table.device), table.shape[-1]
    if out.numel():
        features_MD = as_rows(features)
        choice = tile("merge_fwd", "any", table.device)
        launch(
            _merge_fwd_kernel,
            (source_R.numel(), -(-width // choice["BLOCK"])),
            *(rows, None if ids is None else ids.contiguous(), features_MD, source_R, out),
            *(rows.shape[0], features_MD.shape[0], width, rows.stride(0), features_MD.stride(0)),
            tile=choice,
        )
    return out


def _backward(
    dout: torch.Tensor,
    source_R: torch.Tensor,
    dtext: torch.Tensor | None,
    dfeatures_MD: torch.Tensor | None,
) -> None:
    """Write the gradients whose tensors are given."""
    dout_RD = as_rows(dout)
    if dout_RD.numel() and not (dtext is None and (dfeatures_MD is None or not dfeatures_MD.numel())):
        choice = tile("merge_bwd", "any", dout.device)
        launch(
            _merge_bwd_kernel,
            (dout_RD.shape[0], -(-dout_RD.shape[1] // choice["BLOCK"])),
            *(dout_RD, source_R, dtext, dfeatures_MD, 0 if dfeatures_MD is None else dfeatures_MD.shape[0]),
            *(dout_RD.shape[1], dout_RD.stride(0)),
            tile=choice,
        )


def _table_gradient(
    dout: torch.Tensor, ids: torch.Tensor, source_R: torch.Tensor, vocabulary: int, padding_id: int
) -> torch.Tensor:
    """The gradient of the look-up. Image and padding rows go to an extra row past the vocabulary, which is cut off."""
    ids = ids.reshape(-1)
    ids = torch.where((source_R >= 0) | (ids == padding_id), vocabulary, ids)
    return torch.ops.aten.embedding_dense_backward(as_rows(dout), ids, vocabulary + 1, vocabulary, False)[:vocabulary]


@torch.library.custom_op("llava_fast::merge", mutates_args=())
def _merge_op(
    table: torch.Tensor, ids: torch.Tensor | None, features: torch.Tensor, source: torch.Tensor, padding_id: int
) -> torch.Tensor:
    return _forward(table, ids, features, source)


@_merge_op.register_fake
def _merge_fake(table, ids, features, source, padding_id):
    return table.new_empty(table.shape if ids is None else (*ids.shape, table.shape[1]))


# A custom op cannot return None, so an output that is not needed is an empty tensor.
@torch.library.custom_op("llava_fast::merge_backward", mutates_args=())
def _merge_backward_op(
    dout: torch.Tensor,
    source: torch.Tensor,
    features: int,
    features_dtype: torch.dtype,
    want_text: bool,
    want_features: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtext, dfeatures = _merge_backward_fake(dout, source, features, features_dtype, want_text, want_features)
    _backward(dout, source, dtext if want_text else None, dfeatures if want_features else None)
    return dtext, dfeatures


@_merge_backward_op.register_fake
def _merge_backward_fake(dout, source, features, features_dtype, want_text, want_features):
    dfeatures = dout.new_empty((features, dout.shape[-1]) if want_features else 0, dtype=features_dtype)
    return dout.new_empty(dout.shape if want_text else 0), dfeatures


def _setup_context(ctx, inputs, output):
    table, ids, features, source, ctx.padding_id = inputs
    ctx.vocabulary, ctx.features, ctx.features_dtype = table.shape[0], features.shape[0], features.dtype
    ctx.save_for_backward(ids, source)


def _autograd(ctx, dout):
    ids, source = ctx.saved_tensors
    want_table, _, want_features, *_ = ctx.needs_input_grad
    want_text = want_table and ids is None
    dtable, dfeatures = torch.ops.llava_fast.merge_backward(
        dout, source, ctx.features, ctx.features_dtype, want_text, want_features
    )
    if want_table and ids is not None:
        dtable = _table_gradient(dout, ids, source, ctx.vocabulary, ctx.padding_id)
    return dtable if want_table else None, None, dfeatures if want_features else None, None, None


_merge_op.register_autograd(_autograd, setup_context=_setup_context)


def _merge_triton(table, ids_BT, features_MD, slots_M, mask_BT, padding_id):
    rows = table.numel() // table.shape[-1] if ids_BT is None else ids_BT.numel()
    source_R = _sources(slots_M, mask_BT, rows, table.device)
    if not observed(table, ids_BT, features_MD):
        return _forward(table, ids_BT, features_MD, source_R)
    return torch.ops.llava_fast.merge(table, ids_BT, features_MD, source_R, padding_id)


register("merge", "reference", merge_reference)
register("merge", "triton", _merge_triton, takes)


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """A sample with one text row in four, from ids and from embeddings; and both gradients.

    The tuner times the look-up, and the gradient of the features alone.
    """
    rows, width = (832, 4096) if device.type != "cpu" else (5, 300)
    table, features = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    ids = torch.randint(0, rows, (1, rows), device=device)
    source = _sources(None, torch.arange(rows, device=device) % 4 != 0, rows, device)
    tiles = [
        {"BLOCK": block, "num_warps": warps, "num_stages": 1}
        for block in (512, 1024, 2048, 4096)
        for warps in (2, 4, 8)
        if 4 <= block // (32 * warps) <= 32
    ]
    yield Example("merge_fwd", "any", partial(_forward, table, ids, features, source), tiles)
    yield Example("merge_fwd", "any", partial(_forward, table, None, features, source))

    def backward(text: bool):
        gradients = torch.zeros_like(table) if text else None, torch.zeros_like(features)
        _backward(table, source, *gradients)
        return gradients

    yield Example("merge_bwd", "any", partial(backward, False), tiles)
    yield Example("merge_bwd", "any", partial(backward, True))
