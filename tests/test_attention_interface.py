"""`attn_implementation="llava_fast"` on transformers' own models, against their SDPA."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.masking_utils import and_masks, sliding_window_causal_mask_function, sliding_window_overlay

import llava_fast
from llava_fast import attention_interface
from llava_fast.attention_interface import attention_forward, range_mask
from llava_fast.backend import use_backend
from llava_fast.ops._launch import recorded

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    llava_fast.register_attention()


def pair(model_class: type, config) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model with SDPA, and with the same weights with key ranges."""
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    stock = model_class(config).eval()
    config = type(config).from_dict(config.to_dict())
    ours = model_class._from_config(config, attn_implementation="llava_fast").eval()
    ours.load_state_dict(stock.state_dict())
    assert ours.config._attn_implementation == "llava_fast"
    return stock, ours


def llama() -> tuple[torch.nn.Module, torch.nn.Module]:
    return pair(LlamaForCausalLM, LlamaConfig(**TEXT))


MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [1] * 8])
IDS = torch.randint(1, 60, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_logits_and_gradients(use_cache: bool) -> None:
    stock, ours = llama()
    labels = IDS.masked_fill(MASK == 0, -100)
    results = []
    for model in (stock, ours):
        output = model(input_ids=IDS, attention_mask=MASK, labels=labels, use_cache=use_cache)
        output.loss.backward()
        results.append((output.logits[MASK == 1], model.lm_head.weight.grad, model.model.embed_tokens.weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_a_pack_never_see_each_other(use_cache: bool) -> None:
    stock, ours = llama()
    samples = [IDS[:1, :3], IDS[1:2, :5], IDS[2:, :1]]
    position_ids = torch.cat([torch.arange(sample.shape[1]) for sample in samples])[None]
    with torch.no_grad():
        expected = torch.cat([stock(input_ids=sample).logits for sample in samples], 1)
        found = ours(input_ids=torch.cat(samples, 1), position_ids=position_ids, use_cache=use_cache).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_from_left_padded_prompts(cache: str) -> None:
    stock, ours = llama()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1], [1] * 8])
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected, found = (model.generate(input_ids=IDS, attention_mask=mask, **options) for model in (stock, ours))
    assert torch.equal(found, expected)


def test_a_sliding_window() -> None:
    stock, ours = pair(MistralForCausalLM, MistralConfig(**TEXT, sliding_window=3))
    with torch.no_grad():
        for mask in (None, MASK):
            expected, found = (model(input_ids=IDS, attention_mask=mask).logits for model in (stock, ours))
            real = slice(None) if mask is None else mask == 1
            torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    expected, found = (model.generate(IDS[:1], max_new_tokens=5, do_sample=False) for model in (stock, ours))
    assert torch.equal(found, expected)


def test_llava() -> None:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=63, image_seq_length=4
    )
    stock, ours = pair(LlavaForConditionalGeneration, config)
    ids = IDS.clone()
    ids[:, 3:7] = 63
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [1] * 8])
    pixels = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        expected, found = (
            model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits for model in (stock, ours)
        )
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kernels_run(device: str) -> None:
    stock, ours = (model.to(device) for model in llama())
    ids, mask = IDS[:2].to(device), MASK[:2].to(device)
    with torch.no_grad():
        expected = stock(input_ids=ids, attention_mask=mask).logits
        with use_backend("triton", "attention"), recorded() as launched:
            found = ours(input_ids=ids, attention_mask=mask).logits
    assert [launch.name for launch in launched] == ["_attention_fwd_kernel"] * 2
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


def test_ranges_of_masks() -> None:
    def ranges(**options) -> list:
        return range_mask(1, 4, 4, **options)[0, 0].tolist()

    assert ranges() == [[0, 1, 1], [0, 2, 1], [0, 3, 1], [0, 4, 1]]
    assert ranges(attention_mask=torch.tensor([[False, True, True, True]])) == [
        [0, 0, 0],
        [1, 2, 0],
        [1, 3, 0],
        [1, 4, 0],
    ]
    full = ranges(mask_function=lambda b, h, q, k: k >= 0)
    assert full == [[0, 4, 0]] * 4
    window = ranges(mask_function=lambda b, h, q, k: (k <= q) & (k > q - 2))
    assert window == [[0, 1, 1], [0, 2, 1], [1, 3, 1], [2, 4, 1]]
    with pytest.raises(ValueError, match="one run of keys"):
        ranges(mask_function=lambda b, h, q, k: (k <= q) & (k != 1))
    with pytest.raises(ValueError, match="never go backwards"):
        ranges(mask_function=lambda b, h, q, k: k >= 3 - q)
    long = range_mask(1, 600, 600, mask_function=lambda b, h, q, k: (k <= q) & (k > q - 300))[0, 0]
    assert long[599].tolist() == [300, 600, 1]


def test_windows_are_ranges_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    padding = torch.tensor([[False, False, True, True, True, True]])
    windows = [
        (sliding_window_causal_mask_function(2), {}),
        (sliding_window_causal_mask_function(3), {"attention_mask": padding}),
        (sliding_window_causal_mask_function(2), {"q_offset": 3}),
    ]
    evaluated = [
        range_mask(1, 3, 6, mask_function=lambda *index, plain=plain: plain(*index), **options)
        for plain, options in windows
    ]
    monkeypatch.setattr(attention_interface, "sdpa_mask", None)  # nothing may be evaluated
    for (plain, options), expected in zip(windows, evaluated, strict=True):
        found = range_mask(1, 3, 6, mask_function=plain, **options)
        for slow, fast in zip(expected[0, 0], found[0, 0], strict=True):
            assert torch.equal(slow[:2], fast[:2]) or (slow[0] == slow[1] and fast[0] == fast[1])
    others = and_masks(sliding_window_overlay(2), lambda b, h, q, k: k <= q)
    with pytest.raises(TypeError, match="not callable"):
        range_mask(1, 3, 6, mask_function=others)


def test_masks_made_by_hand() -> None:
    module = torch.nn.Module()
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    causal = torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    for mask in (causal, None):
        found, weights = attention_forward(module, q, k, k, mask)
        torch.testing.assert_close(found, expected.transpose(1, 2))
        assert weights is None
    full = torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    torch.testing.assert_close(attention_forward(module, q, k, k, None, is_causal=False)[0], full.transpose(1, 2))


def test_what_is_not_supported() -> None:
    module, q = torch.nn.Module(), torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match="no dropout"):
        attention_forward(module, q, q, q, None, dropout=0.1)
    with pytest.raises(ValueError, match="softcap"):
        attention_forward(module, q, q, q, None, softcap=30.0)
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        attention_forward(module, q, q, q, torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="one mask for all heads"):
        attention_forward(module, q, q, q, torch.ones(1, 2, 3, 3).bool())
