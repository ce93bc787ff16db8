"""The projector: its types and names, and that it gets gradients where there is no image."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from llava_fast.ops.patch_embed import CLIP_MEAN, CLIP_STD


@pytest.mark.parametrize(
    ("kind", "layers"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3), ("identity", 0)]
)
def test_projector_types(tiny: SimpleNamespace, kind: str, layers: int) -> None:
    config = tiny.config({"hidden_size": 24}, mm_projector_type=kind)
    model = tiny.ours(config)
    names = {name for name in model.state_dict() if "projector" in name}
    expected = {f"model.multi_modal_projector.linear_{i + 1}.{p}" for i in range(layers) for p in ("weight", "bias")}
    assert names == expected
    pixels = torch.randn(2, 3, 12, 12)
    states, _ = model.model.vision_tower(pixels, 2, mean=CLIP_MEAN, std=CLIP_STD)
    features = states[2][:, 1:]
    for i in range(layers):
        layer = getattr(model.model.multi_modal_projector, f"linear_{i + 1}")
        features = layer(F.gelu(features) if i else features)
    tiny.assert_near(torch.stack(model.get_image_features(pixels).pooler_output), features)


def test_text_alone_reaches_the_projector_with_zero_gradients(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    model = tiny.ours(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("projector" in name)
    inputs = tiny.batch(config, [[7], [12]])
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if "projector" in name:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
