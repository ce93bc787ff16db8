"""Sums over many tiles, in bfloat16: kernels must hold them in float32.

The first tile adds up to far more than each of the others, so that a sum held in bfloat16 does not change after it:
256 + 1/2 is 256 there. Random numbers do not show this: their sums over a few tiles differ by less than the kit allows.
"""

from functools import partial

import pytest
import torch

from llava_fast.backend import use_backend
from tests.ops.kernel_cases import BF16, check, normal, small_tiles

TERMS = 512  # 32 tiles


def terms() -> torch.Tensor:
    """[TERMS]: the first 16 add up to 256, and every 16 after them to 1/2; all to 271.5."""
    return torch.full((TERMS,), 1 / 32).index_fill(0, torch.arange(16), 16.0).to(BF16)


def test_projector() -> None:
    from llava_fast.ops.projector import projector

    tensors = {"x": torch.ones(1, 2, TERMS).to(BF16), "w0": terms().expand(32, TERMS).contiguous()}
    tensors |= {"b0": normal(32), "w1": normal(9, 32)}
    function = lambda x, w0, b0, w1: projector(x, [w0, w1], [b0, None])  # noqa: E731
    check(function, tensors, "projector", "projector_fwd", "projector_fwd", frozen=tuple(tensors))


def test_loss() -> None:
    from llava_fast.ops.loss import linear_cross_entropy

    weight = torch.zeros(3, TERMS).to(BF16)
    weight[0] = terms()
    tensors = {"hidden": torch.ones(1, 2, TERMS).to(BF16), "weight": weight}
    function = partial(linear_cross_entropy, labels=torch.tensor([[1, 2]]))
    check(function, tensors, "linear_cross_entropy", "gemm", "loss", frozen=tuple(tensors))


def test_patch_embed() -> None:
    """Normalised afterwards: the first column is 271.5, the second 256, which the first tile completes."""
    from llava_fast.ops.patch_embed import patch_embed

    weight = torch.zeros(24, 3, 14, 14).to(BF16)
    weight.view(24, -1)[0, :TERMS] = terms()
    weight.view(24, -1)[1, :16] = 16
    tensors = {"pixels": torch.ones(1, 3, 14, 14).to(BF16), "weight_DCPP": weight}
    tensors |= {"cls_D": normal(24), "position_TD": torch.zeros(2, 24).to(BF16)}
    tensors |= {"norm_weight_D": torch.ones(24).to(BF16), "norm_bias_D": torch.zeros(24).to(BF16)}
    function = partial(patch_embed, eps=1e-5, mean=(0.5,) * 3, std=(0.25,) * 3)
    check(function, tensors, "patch_embed", "patch_embed_fwd", "norm_fwd", frozen=tuple(tensors))


def keys_and_values() -> dict[str, torch.Tensor]:
    """[1, TERMS, 1, 16]: before they are divided by their sum, probabilities are 1 in the first tile, 1/512 after it;
    values are 1: a sum of either, alone, in bfloat16 makes the result another than 1."""
    k, v = torch.zeros(1, TERMS, 1, 16), torch.ones(1, TERMS, 1, 16)
    k[:, 16:, :, 0] = -25  # times 1 / sqrt(16): about the logarithm of 1/512
    return {"k_BSGd": k.to(BF16), "v_BSGd": v.to(BF16)}


def check_attention(queries: int, kernel: str) -> None:
    from llava_fast.ops.attention import attention

    tensors = {"q_BTHd": torch.ones(1, queries, 1, 16).to(BF16), **keys_and_values()}
    tensors |= {"start_BT": torch.zeros(1, queries).int(), "end_BT": torch.full((1, queries), TERMS).int()}
    check(partial(attention, return_lse=True), tensors, "attention", kernel, frozen=tuple(tensors))


def test_attention() -> None:
    check_attention(16, "attention_fwd")


def test_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_fast.ops.attention import decode

    monkeypatch.setattr(decode, "splits_of", lambda q, k: 1)
    check_attention(1, "decode_attention")


@pytest.mark.parametrize("kernel", ["rms_norm", "layer_norm"])
def test_gradients_of_the_norms(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over rows, of two programs: of the last parameter, whose terms are those of the gradient."""
    from llava_fast.ops import norm

    monkeypatch.setattr(norm, "multiprocessors", lambda device: 1)
    parameters = {"weight": torch.ones(2).to(BF16)}
    if kernel == "layer_norm":
        parameters["bias"] = torch.zeros(2).to(BF16)
    last = list(parameters.values())[-1].requires_grad_()
    with use_backend("triton", kernel), small_tiles():
        y = getattr(norm, kernel)(torch.ones(TERMS, 2).to(BF16), **parameters, eps=0.0 if kernel == "rms_norm" else 1.0)
        (y[0] if isinstance(y, tuple) else y).backward(terms()[:, None].expand(TERMS, 2))
    assert last.grad is not None and (last.grad - 271.5).abs().max() <= 1, last.grad


def test_gradient_of_the_projector_s_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over rows, of four programs with 32 tiles each. GELU is the identity at 20, and its derivative 1."""
    from llava_fast.ops import projector

    monkeypatch.setattr(projector, "multiprocessors", lambda device: 1)
    with small_tiles():
        da = terms()[:, None].expand(TERMS, 16).contiguous()
        _, _, dbias = projector._through_gelu(da, torch.full((TERMS, 16), 20.0).to(BF16), False, True)
    assert dbias is not None and (dbias - 271.5).abs().max() <= 1, dbias
