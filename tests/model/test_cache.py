"""Static caches that keys are rotated into, and the int8 cache: in generation, against transformers' own."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MistralConfig,
    StaticCache,
)
from transformers.cache_utils import Cache

from llava_fast.backend import use_backend
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.model.cache import Int8Cache
from llava_fast.ops._launch import recorded
from tests import tiny as tiny_sizes

NEW = 5
# Weights so large that answers depend on the prompt.
TEXT = LlamaConfig(**tiny_sizes.TEXT, vocab_size=64, initializer_range=0.1)
WITH_KERNELS = ("attention", "rotary", "cache_write", "int8_attention")


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**tiny_sizes.VISION)
    config = LlavaConfig(vision_config=vision, text_config=TEXT, image_token_index=63, image_seq_length=4)
    return LlavaForConditionalGeneration(config).eval()


def prompt() -> dict[str, torch.Tensor]:
    """Two prompts, the first padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (2, 12), generator=generator)
    ids[:, 3:7] = 63
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    pixels = torch.randint(0, 256, (2, 28, 28, 3), generator=generator, dtype=torch.uint8)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def generate(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], cache: Cache
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens [B, NEW] and the logits of each."""
    output = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, -NEW:], torch.stack(output.logits, 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_static_cache_answers_as_a_dynamic_one(model, kernels: bool, device: str) -> None:
    model, inputs = model.to(device), {name: x.to(device) for name, x in prompt().items()}
    with use_backend("reference"):
        expected, expected_logits = generate(model, inputs, DynamicCache())
    cache = StaticCache(config=model.config, max_cache_len=17)
    with use_backend("triton", *WITH_KERNELS) if kernels else use_backend("reference"), recorded() as launched:
        found, logits = generate(model, inputs, cache)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    layers = len(model.model.language_model.layers)
    writes = sum(launch.name == "_cache_write_kernel" for launch in launched)
    assert writes == (NEW * layers if kernels else 0)
    assert int(cache.get_seq_length()) == 12 + NEW - 1


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_decoding_compiles_in_one_graph(model, kind: str, kernels: bool) -> None:
    model, inputs, slots = model.cpu(), prompt(), 17
    logits = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step = torch.compile(model.forward, backend="aot_eager", fullgraph=True) if compiled else model.forward
        cache = (
            StaticCache(config=model.config, max_cache_len=slots) if kind == "float" else Int8Cache(model.config, slots)
        )
        with torch.no_grad(), use_backend("triton", *WITH_KERNELS) if kernels else use_backend("reference"):
            steps = [model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits]
            mask = inputs["attention_mask"]
            for _ in range(3):
                mask = torch.cat((mask, mask[:, -1:]), 1)
                output = step(
                    input_ids=steps[-1].argmax(-1),
                    attention_mask=torch.nn.functional.pad(mask, (0, slots - mask.shape[1])),
                    position_ids=mask.sum(1, keepdim=True) - 1,
                    past_key_values=cache,
                    use_cache=True,
                )
                steps.append(output.logits)
        logits[compiled] = torch.cat(steps, 1)
    torch.testing.assert_close(logits[True], logits[False])
    # The cache fills without a graph for each length.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Nudged(DynamicCache):
    """A cache whose keys and values can be moved: gradients of the nudges tell what an error in each of them does."""

    def __init__(self) -> None:
        super().__init__()
        self.nudges: list[tuple[torch.Tensor, torch.Tensor]] = []  # (nudge, what is nudged)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        moved = []
        for x in super().update(key_states, value_states, layer_idx, *args, **kwargs):
            nudge = torch.zeros_like(x, requires_grad=True)
            self.nudges.append((nudge, x.detach()))
            moved.append(x + nudge)
        return tuple(moved)


def test_logits_are_off_by_what_rounding_explains(model) -> None:
    """To first order an error of the logits is Σ gradient · rounding error, and a rounding error has the variance
    scale² / 12: three standard deviations, of all logits together."""
    inputs, token = prompt(), torch.tensor([[5], [9]])
    cached: dict[type, Cache] = {Nudged: Nudged(), Int8Cache: Int8Cache(model.config, 14)}
    logits = {}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    for kind, cache in cached.items():
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
        if kind is Nudged:
            cache.nudges.clear()
        with torch.set_grad_enabled(kind is Nudged):
            output = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits[kind] = output.logits[:, -1]
    variance = torch.zeros_like(logits[Nudged])
    nudges = [nudge for nudge, _ in cached[Nudged].nudges]
    for j in range(variance.shape[1]):
        for gradient, (_, x) in zip(
            torch.autograd.grad(logits[Nudged][:, j].sum(), nudges, retain_graph=True), cached[Nudged].nudges
        ):
            step = x.abs().amax(-1, keepdim=True) / 127
            variance[:, j] += ((gradient * step) ** 2).sum((1, 2, 3)) / 12
    error = (logits[Int8Cache] - logits[Nudged].detach()) / variance.detach().sqrt()
    assert float((error**2).mean().sqrt()) <= 3
    assert float(error.abs().max()) > 0.01, "nothing was rounded"


@pytest.mark.parametrize("kernels", [True, False])
def test_an_int8_cache_answers_like_a_float_one(model, kernels: bool) -> None:
    expected, expected_logits = generate(model, prompt(), DynamicCache())
    with use_backend("triton", *WITH_KERNELS) if kernels else use_backend("reference"), recorded() as launched:
        found, logits = generate(model, prompt(), Int8Cache(model.config, 17))
    # The first token comes from keys and values as they were; the next from quantised ones.
    torch.testing.assert_close(logits[:, 0], expected_logits[:, 0], rtol=1e-4, atol=1e-4)
    assert logits.isfinite().all()
    assert not torch.equal(logits[:, 1], expected_logits[:, 1])
    assert (found == expected).float().mean() >= 0.8
    names = {launch.name for launch in launched}
    assert names >= {"_cache_write_kernel", "_decode_attention_kernel"} if kernels else not names


def test_padding_on_the_left_changes_nothing(model) -> None:
    inputs = prompt()
    together, logits = generate(model, inputs, Int8Cache(model.config, 17))
    alone, alone_logits = generate(
        model, {name: x[:1, 2:] if x.dim() == 2 else x[:1] for name, x in inputs.items()}, Int8Cache(model.config, 15)
    )
    assert torch.equal(together[:1], alone)
    torch.testing.assert_close(logits[:1], alone_logits, rtol=1e-3, atol=1e-3)


def test_a_prompt_in_two_parts_sees_the_first_dequantised(model) -> None:
    ids = prompt()["input_ids"].clamp(max=59)
    with torch.no_grad():
        whole = model(input_ids=ids, past_key_values=Int8Cache(model.config, 12), use_cache=True).logits
        cache = Int8Cache(model.config, 12)
        model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True).logits
        spread = whole.std()
        cache.reset()
        again = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    assert (rest - whole[:, 5:]).abs().max() < 0.2 * spread
    assert torch.equal(again, whole)


def test_attention_weights_and_rows_of_an_int8_cache(model) -> None:
    ids = prompt()["input_ids"].clamp(max=59)
    cache = Int8Cache(model.config, 14)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        output = model(input_ids=ids[:, :2], past_key_values=cache, use_cache=True, output_attentions=True)
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 2))


@pytest.mark.parametrize("kind", [StaticCache, Int8Cache])
def test_transformers_own_model_takes_it(kind: type) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(TEXT).eval()
    inputs = {name: prompt()[name] for name in ("input_ids", "attention_mask")}
    expected, expected_logits = generate(model, inputs, DynamicCache())
    found, logits = generate(model, inputs, kind(config=TEXT, max_cache_len=17))
    assert (found == expected).float().mean() >= 0.8
    assert (logits - expected_logits)[:, :2].abs().max() < 0.1 * expected_logits.std()


def test_what_it_takes_and_how_it_moves(model) -> None:
    cache = Int8Cache(model.config, 12)
    with torch.no_grad():
        model(**prompt(), past_key_values=cache, use_cache=True)
    layer = cache.layers[0]
    sizes = [x.numel() * x.element_size() for x in (layer.keys, layer.values, layer.key_scales, layer.value_scales)]
    assert sum(sizes) == 2 * 2 * 12 * 2 * (layer.keys.shape[-1] + 4)  # rows, heads, slots, keys and values
    keys, scales = layer.keys.clone(), layer.key_scales.clone()
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.keys, keys[[1, 1]])
    assert torch.equal(layer.key_scales, scales[[1, 1]])


def test_no_sliding_window() -> None:
    with pytest.raises(ValueError, match="sliding_window is 7"):
        Int8Cache(MistralConfig(sliding_window=7), 12)
