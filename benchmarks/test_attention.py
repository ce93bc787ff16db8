"""Attention over a pack of samples: by key range, and PyTorch's SDPA with the dense mask that says the same.

Forward and backward, float32. Both are checked against each other before they are timed.
"""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from llava_fast.ops.attention import attention
from llava_fast.sequence import pack

# Eight samples of about the length of a LLaVA turn with its image (scaled down to what a CPU does in time).
LENGTHS = (160, 97, 144, 201, 33, 150, 128, 111)
HEADS, KEY_HEADS, DIM = 8, 8, 64


@pytest.fixture
def ways(device: torch.device) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Name -> a step that returns the output and the three gradients."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = sum(LENGTHS)

    def leaf(heads: int) -> torch.Tensor:
        values = torch.randn(1, tokens, heads, DIM, device=device, generator=generator)
        return values.requires_grad_()

    q, k, v = leaf(HEADS), leaf(KEY_HEADS), leaf(KEY_HEADS)
    packed = pack(LENGTHS)
    start, end = packed.key_start.to(device), packed.key_end.to(device)
    key = torch.arange(tokens, device=device)
    mask = (key >= start[..., None]) & (key < end[..., None])  # [1, T, T]

    def by_range() -> torch.Tensor:
        return attention(q, k, v, start, end)

    def by_mask() -> torch.Tensor:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None]
        )
        return out.transpose(1, 2)

    def step(forward: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        out = forward()
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return [out, *gradients]

    return {"key range": lambda: step(by_range), "dense mask": lambda: step(by_mask)}


@pytest.mark.benchmark(group="attention, packed, forward and backward")
@pytest.mark.parametrize("way", ["key range", "dense mask"])
def test_attention(benchmark, ways: dict[str, Callable[[], list[torch.Tensor]]], way: str):
    for found, expected in zip(ways["key range"](), ways["dense mask"]()):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    benchmark(ways[way])
    benchmark.extra_info["tokens"] = sum(LENGTHS)
