"""Token embeddings with image features in their slots: 576 image tokens and 256 of text in each of 1, 8 and 32 rows.

From ids to the merged rows; with backward the gradient of the features, as with a frozen table. `hf` is transformers'
code without its check of the number of image tokens, which synchronises and cannot be captured. `triton` checks without
synchronisation, and counts image tokens on the device; `triton-slots` gets their positions, as from a collator.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Tensors, benchmark_of, function, report
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.ops.merge import embed_merge

PATCHES, IMAGE, VOCABULARY = 576, 3, 32064


def cases(gpu: bool) -> list[Case]:
    dtype = torch.bfloat16 if gpu else torch.float32
    sizes = [(n, PATCHES, 256, 4096) for n in (1, 8, 32)] if gpu else [(1, PATCHES, 64, 512)]
    return [merge_case(*size, dtype, backward) for size in sizes for backward in (False, True)]


def merge_case(rows: int, patches: int, text: int, width: int, dtype: torch.dtype, backward: bool) -> Case:
    table = torch.randn(VOCABULARY, width, device=DEVICE).to(dtype)
    place = torch.arange(rows * (patches + text)).view(rows, -1)[:, text // 4 : text // 4 + patches]
    slots = place.flatten().to(DEVICE)

    def inputs() -> Tensors:
        ids = torch.randint(IMAGE + 1, VOCABULARY, (rows, patches + text), device=DEVICE)
        ids.view(-1)[slots] = IMAGE
        return {"ids": ids, "features": torch.randn(rows * patches, width, device=DEVICE).to(dtype)}

    def over_table(fn: Callable) -> Callable:
        # Only tensors in `inputs` get gradients; the table is not among them.
        return lambda ids, features: (fn(ids, table.to(features.dtype), features, slots),)

    # Each row is read once and written once; backward reads and writes those of the features.
    moved = 2 * rows * (patches + text) + 2 * rows * patches * backward
    return Case(
        op="merge",
        shape=(rows, patches + text, width),
        dtype=dtype,
        backward=backward,
        inputs=inputs,
        reference=over_table(_torch),
        providers={name: function(over_table(fn)) for name, fn in providers().items()},
        bytes_moved=moved * width * dtype.itemsize,
        flops=0,
    )


def providers() -> dict[str, Callable]:
    found = {"torch": _torch, "hf": _hf}
    if not torch.cuda.is_available():
        return {**found, "reference": _ours("reference", by_slots=True)}
    found["compile"] = torch.compile(_hf)
    if not backend.unavailable("triton"):
        found |= {"triton": _ours("triton", by_slots=False), "triton-slots": _ours("triton", by_slots=True)}
    return found


def _torch(ids, table, features, slots):
    rows = F.embedding(ids, table)
    return rows.view(-1, rows.shape[-1]).index_copy(0, slots, features).view(rows.shape)


def _hf(ids, table, features, slots):
    rows = F.embedding(ids, table)
    return rows.masked_scatter((ids == IMAGE)[..., None].expand_as(rows), features)


def _ours(name: str, *, by_slots: bool) -> Callable:
    def call(ids, table, features, slots):
        with backend.use_backend(name, "merge"):
            if by_slots:
                return embed_merge(ids, table, features, slots_M=slots)
            return embed_merge(ids, table, features, mask_BT=ids == IMAGE)

    return call


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_merge(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
