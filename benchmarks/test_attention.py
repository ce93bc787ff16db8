"""Attention of towers and of packs, forward and backward; FLOPs count only the pairs that see each other.

    attention                 a pack of samples, causal                            LLaVA-1.5-7B's heads; a prompt of
                                                                                   640, a sample of 832, packs of them
    attention_images          the same, and the tokens of an image see each other  tokens is an image of 576 with text
    attention_sample          one sample, causal                                   a sample of 832
    attention_gqa             causal, a quarter of the key heads
    attention_tower           images of 577 tokens that all see each other         CLIP ViT-L/14-336's heads
    attention_build           `attention`, and             every call makes ranges, a dense mask, a block mask or
    attention_images_build    `attention_images`           cumulative lengths from position_ids, as each step does

In the other cases ranges and masks are made before the measurement, as a model makes them once for all its layers.
Shapes are [B, T, H, d], with GQA [B, T, H, G, d].
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.attention_providers import by_range, mask_of, masked, names, providers
from benchmarks.harness import Case, Tensors, benchmark_of, function, report
from benchmarks.records import DEVICE
from llava_fast.ops.attention import KeyRanges, attention_reference
from llava_fast.sequence import Pack, key_ranges, pack

# Tokens of an image and its offset in the sample, and packs; on a CPU smaller, to limit the time.
IMAGE = {True: (576, 35), False: (64, 9)}
PACKS = {True: [(832,) * 5, (832,) * 10], False: [(160, 97, 144, 33)]}
SINGLE = {True: [(640,), (832,)], False: []}
TOWERS = {True: [(1, 577, 16, 64), (32, 577, 16, 64)], False: [(2, 145, 4, 64)]}
HEADS = {True: (32, 8, 128), False: (8, 2, 64)}


def cases(gpu: bool) -> list[Case]:
    dtype = torch.bfloat16 if gpu else torch.float32
    heads, groups, dim = HEADS[gpu]
    small, large = PACKS[gpu][0], PACKS[gpu][-1]
    both = (False, True)
    return [
        *(tower_case(*shape, dtype, backward) for shape in TOWERS[gpu] for backward in both),
        *(
            pack_case(op, lengths, heads, heads, dim, dtype, backward, IMAGE[gpu])
            for op, packs in (("attention", SINGLE[gpu] + PACKS[gpu]), ("attention_images", PACKS[gpu]))
            for lengths in packs
            for backward in both
        ),
        *(
            pack_case("attention_sample", small[:1], heads, heads, dim, dtype, backward, IMAGE[gpu])
            for backward in both
        ),
        *(pack_case("attention_gqa", small, heads, groups, dim, dtype, backward, IMAGE[gpu]) for backward in both),
        *(
            pack_case(f"{op}_build", large, heads, heads, dim, dtype, True, IMAGE[gpu])
            for op in ("attention", "attention_images")
        ),
    ]


def tower_case(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, backward: bool) -> Case:
    def inputs() -> Tensors:
        start = torch.zeros(batch, tokens, device=DEVICE, dtype=torch.int32)
        return {**_draw(batch, tokens, heads, heads, dim, dtype), "start": start, "end": start + tokens}

    return Case(
        op="attention_tower",
        shape=(batch, tokens, heads, dim),
        dtype=dtype,
        backward=backward,
        inputs=inputs,
        reference=lambda q, k, v, start, end: (attention_reference(q, k, v, KeyRanges(start, end), dim**-0.5),),
        providers=providers(dense=False),
        bytes_moved=_bytes(batch * tokens, heads, heads, dim, dtype, backward),
        flops=_flops(batch * tokens**2, heads, dim, backward),
    )


def pack_case(
    op: str,
    lengths: tuple[int, ...],
    heads: int,
    key_heads: int,
    dim: int,
    dtype: torch.dtype,
    backward: bool,
    image: tuple[int, int],
) -> Case:
    """One of the packs above, by its name."""
    count, first = image
    tokens = sum(lengths)
    spans = [[(first, count)] if length >= first + count else [] for length in lengths]
    see_each_other = "images" in op
    packed = pack(lengths, spans, bidirectional_images=see_each_other)

    def inputs() -> Tensors:
        drawn = _draw(1, tokens, heads, key_heads, dim, dtype)
        if not op.endswith("build"):
            return {**drawn, "start": packed.key_start.to(DEVICE), "end": packed.key_end.to(DEVICE)}
        in_image = [first <= i < first + count and bool(s) for n, s in zip(lengths, spans) for i in range(n)]
        is_image = torch.tensor([in_image], device=DEVICE) if see_each_other else torch.empty(0, device=DEVICE).bool()
        return {**drawn, "position_ids": packed.position_ids.to(DEVICE), "is_image": is_image}

    return Case(
        op=op,
        shape=(1, tokens, heads, dim) if key_heads == heads else (1, tokens, heads, key_heads, dim),
        dtype=dtype,
        backward=backward,
        inputs=inputs,
        reference=partial(_sample_by_sample, packed, lengths),
        providers=_building(count) if op.endswith("build") else providers(),
        bytes_moved=_bytes(tokens, heads, key_heads, dim, dtype, backward),
        flops=_flops(int((packed.key_end - packed.key_start).sum()), heads, dim, backward),
        capturable=not op.endswith("build"),  # reading lengths on the host synchronises
    )


def _draw(batch: int, tokens: int, heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    of_heads = {"q": heads, "k": key_heads, "v": key_heads}
    return {name: torch.randn(batch, tokens, n, dim, device=DEVICE).to(dtype) for name, n in of_heads.items()}


def _bytes(tokens: int, heads: int, key_heads: int, dim: int, dtype: torch.dtype, backward: bool) -> int:
    # Forward reads q, k, v and writes the output; backward reads those and the output's gradient, writes three.
    of_queries, of_keys = (6, 6) if backward else (2, 2)
    return (of_queries * heads + of_keys * key_heads) * tokens * dim * dtype.itemsize


def _flops(pairs: int, heads: int, dim: int, backward: bool) -> int:
    # Two products forward and five backward, each 2 · d operations for every pair of a query and a key it sees.
    return (7 if backward else 2) * 2 * dim * heads * pairs


def _sample_by_sample(packed: Pack, lengths: tuple[int, ...], q, k, v, *_, **__) -> tuple[torch.Tensor]:
    """The reference, one sample at a time: a dense mask over the whole pack would not fit in float64."""
    outs, at = [], 0
    for n in lengths:
        rows = slice(at, at + n)
        ranges = KeyRanges(*(r[:, rows].to(q.device) - at for r in (packed.key_start, packed.key_end)))
        outs.append(attention_reference(q[:, rows], k[:, rows], v[:, rows], ranges, q.shape[-1] ** -0.5))
        at += n
    return (torch.cat(outs, 1),)


def _building(image_tokens: int) -> dict:
    """All providers start from position_ids and the image mask on the device."""

    def ranges(q, position_ids, is_image):
        image_mask = is_image if is_image.numel() else None
        return key_ranges(
            *q.shape[:2], q.device, position_ids=position_ids, image_mask=image_mask, image_tokens=image_tokens
        )

    def torch_sdpa(q, k, v, position_ids, is_image):
        return masked(q, k, v, mask_of(*ranges(q, position_ids, is_image), k.shape[1]))

    def provider(name, q, k, v, position_ids, is_image):
        return by_range(name, q, k, v, ranges(q, position_ids, is_image))

    return {"torch": function(torch_sdpa), **{name: function(partial(provider, name)) for name in names()}}


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_attention(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
