"""The whole model with kernels asked for by name (in the interpreter on a CPU) against its reference operations."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_fast.backend import use_backend
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.ops._launch import recorded
from tests.tiny import TEXT, VISION

# Operations that have a Triton kernel, and the kernels that a forward and backward of the model must launch.
KERNEL_OPS = (
    "rms_norm",
    "layer_norm",
    "rotary",
    "swiglu",
    "quick_gelu",
    "attention",
    "patch_embed",
    "projector",
    "merge",
)
KERNELS = {
    "norm_fwd_kernel",
    "norm_bwd_kernel",
    "rotary_kernel",
    "activation_fwd_kernel",
    "activation_bwd_kernel",
    "attention_fwd_kernel",
    "attention_bwd_dq_kernel",
    "attention_bwd_dkdv_kernel",
    "patch_embed_fwd_kernel",
    "patch_embed_dweight_kernel",
    "projector_bwd_kernel",
    "merge_fwd_kernel",
    "merge_bwd_kernel",
}
STEPS = 10


def mini_model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, vocab_size=64),
        image_token_index=63,
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config)


def train(device: str) -> list[float]:
    """Losses of a few optimiser steps on all parameters."""
    model = mini_model().to(device).train()
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 60, (2, 20), generator=generator)
    input_ids[:, 3:7] = 63
    labels = input_ids.masked_fill(input_ids == 63, -100).to(device)
    pixels = torch.randint(0, 256, (2, 28, 28, 3), generator=generator, dtype=torch.uint8).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=input_ids.to(device), pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_with_kernels_follows_the_reference(device: str):
    with use_backend("reference"), recorded() as launched:
        expected = train(device)
    assert launched == []
    with use_backend("triton", *KERNEL_OPS), recorded() as launched:
        found = train(device)
    assert {launch.name.strip("_") for launch in launched} == KERNELS
    assert expected[-1] < 0.7 * expected[0], "the training learns nothing, so following it would show nothing"
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
