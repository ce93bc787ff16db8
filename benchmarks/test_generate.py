"""Inference of small models on a CPU, where the time between operators counts: transformers, and this model.

    prefill          a prompt of an image and text, logits of its last token, as `generate` computes them
    decoding         one token after a full context, as `generate` computes it (the cache is set back in each call)
    generate         whole `generate`, greedy, 32 new tokens after a prompt of text
    generate_image   the same after a prompt of an image and text

Two models with random weights: the built-in demo's shape, and 8 layers of width 512 with a tiny tower, so that the
language model dominates. transformers' class has its default attention (sdpa). Each case is measured with one thread
and with two. Logits, or the tokens, are verified. Shapes are (batch, tokens of prompt or context, hidden, MLP, layers,
vocabulary); FLOPs and bytes are those of the language model.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Stock

from benchmarks.harness import Call, Case, Tensors, benchmark_of, report
from benchmarks.records import ROOT
from llava_fast.drop_in import LlavaForConditionalGeneration

NEW_TOKENS = 32
BATCHES = (1, 4, 8)
TEXT_TOKENS = {"demo": 40, "wide": 64}
THREADS = {1: "one_thread", 2: "two_threads"}


@dataclass(frozen=True, eq=False)
class ThreadsCase(Case):
    threads: int = 1

    @property
    def identity(self) -> dict[str, str]:
        return {**super().identity, "op": f"{self.op}_{THREADS[self.threads]}"}


def cases(gpu: bool) -> list[Case]:
    """None on a GPU: there, whole passes are the subject of CUDA graphs."""
    if gpu:
        return []
    found: list[Case] = []
    for threads in THREADS:
        for name in TEXT_TOKENS:
            found += [prefill(name, batch, threads) for batch in BATCHES]
            found += [decoding(name, batch, threads) for batch in BATCHES]
            for images in (False, True):
                # A long prompt is mostly prefill, so one batch size shows what there is to see.
                batches = BATCHES[:1] if images and name == "wide" else BATCHES
                found += [generate(name, batch, threads, images=images) for batch in batches]
    return found


@cache
def _config(name: str) -> LlavaConfig:
    if name == "demo":
        weights = ROOT / "llava_fast" / "demo" / "weights"
        text = LlamaConfig.from_pretrained(weights / "text")
        vision = CLIPVisionConfig.from_pretrained(weights / "tower")
    else:
        text = LlamaConfig(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=4, vocab_size=32000
        )
        vision = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,
        )
    text.eos_token_id = None  # every answer has its full length
    text.vocab_size += name == "demo"  # the image token
    tokens = (vision.image_size // vision.patch_size) ** 2
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1, image_seq_length=tokens
    )


def prefill(name: str, batch: int, threads: int) -> Case:
    def call(model: torch.nn.Module, tensors: Tensors) -> Call:
        mask = torch.ones_like(tensors["input_ids"])
        return lambda: [model(**tensors, attention_mask=mask, logits_to_keep=1, use_cache=True).logits]

    new = _config(name).image_seq_length + TEXT_TOKENS[name]
    return _case("prefill", name, batch, threads, call, lambda: _prompt(name, batch, True), new)


def decoding(name: str, batch: int, threads: int) -> Case:
    config = _config(name)
    past, of_text = config.image_seq_length + TEXT_TOKENS[name], config.text_config
    layers, heads = of_text.num_hidden_layers, of_text.num_attention_heads

    def inputs() -> Tensors:
        kept = torch.randn(layers, 2, batch, heads, past, of_text.hidden_size // heads)
        return {"input_ids": torch.randint(config.image_token_id, (batch, 1)), "kept": kept}

    def call(model: torch.nn.Module, tensors: Tensors) -> Call:
        cache, kept = DynamicCache(config=config), [tuple(layer) for layer in tensors["kept"]]
        for i, layer in enumerate(kept):
            cache.update(*layer, i)
        given = {
            "input_ids": tensors["input_ids"],
            "attention_mask": torch.ones(batch, past + 1, dtype=torch.int64),
            "position_ids": torch.full((batch, 1), past),
        }

        def step() -> list[torch.Tensor]:
            for layer, (keys, values) in zip(cache.layers, kept):
                layer.keys, layer.values = keys, values
            return [model(**given, past_key_values=cache, logits_to_keep=1, use_cache=True).logits]

        return step

    return _case("decoding", name, batch, threads, call, inputs, 1, past)


def generate(name: str, batch: int, threads: int, *, images: bool) -> Case:
    def call(model: torch.nn.Module, tensors: Tensors) -> Call:
        mask = torch.ones_like(tensors["input_ids"])

        def answer() -> list[torch.Tensor]:
            tokens = model.generate(**tensors, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
            return [tokens.float()]  # exact, and so the same in every dtype

        return answer

    new = TEXT_TOKENS[name] + images * _config(name).image_seq_length
    op = "generate_image" if images else "generate"
    return _case(op, name, batch, threads, call, lambda: _prompt(name, batch, images), new, steps=NEW_TOKENS)


def _prompt(name: str, batch: int, images: bool) -> Tensors:
    """Ids, and with `images` the pixels of one image for each."""
    config = _config(name)
    ids = torch.randint(4, config.image_token_id, (batch, TEXT_TOKENS[name]))
    if not images:
        return {"input_ids": ids}
    side = config.vision_config.image_size
    image = torch.full((batch, config.image_seq_length), config.image_token_id)
    return {"input_ids": torch.cat((image, ids), 1), "pixel_values": torch.randn(batch, 3, side, side)}


@cache
def _models(name: str) -> dict[torch.dtype | str, torch.nn.Module]:
    """transformers' model, by dtype, and "ours", all with the same weights."""
    torch.manual_seed(0)
    stock = Stock(copy.deepcopy(_config(name))).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.dim() > 1:  # answers that vary need larger weights than transformers' initial ones
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    ours = LlavaForConditionalGeneration(copy.deepcopy(_config(name))).eval()
    ours.load_state_dict(stock.state_dict())
    return {torch.float32: stock, torch.float64: copy.deepcopy(stock).double(), "ours": ours}


def _case(
    op: str,
    name: str,
    batch: int,
    threads: int,
    call: Callable[[torch.nn.Module, Tensors], Call],
    inputs: Callable[[], Tensors],
    new: int,
    past: int = 0,
    steps: int = 1,
) -> Case:
    """A case of `new` tokens after `past`, and `steps` - 1 more tokens after these."""

    def reference(**tensors: torch.Tensor) -> list[torch.Tensor]:
        wide = any(tensor.dtype == torch.float64 for tensor in tensors.values())
        return list(call(_models(name)[torch.float64 if wide else torch.float32], tensors)())

    text = _config(name).text_config
    layer = text.hidden_size * (4 * text.hidden_size + 3 * text.intermediate_size)
    head = text.vocab_size * text.hidden_size
    tokens = new + steps - 1
    seen = tokens * past + tokens * (tokens + 1) // 2
    products = text.num_hidden_layers * (layer * tokens + 2 * text.hidden_size * seen) + head * steps
    return ThreadsCase(
        op=op,
        shape=(batch, past or new, text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size),
        dtype=torch.float32,
        backward=False,
        inputs=inputs,
        reference=reference,
        providers={
            "hf": lambda tensors: call(_models(name)[torch.float32], tensors),
            "reference": lambda tensors: call(_models(name)["ours"], tensors),
        },
        bytes_moved=4 * steps * (text.num_hidden_layers * layer + head),
        flops=2 * batch * products,
        threads=threads,
    )


if CASES := cases(gpu=torch.cuda.is_available()):

    @benchmark_of(CASES)
    def test_generate(benchmark, case: ThreadsCase, provider: str):
        with _threads(case.threads):
            report(benchmark, case, provider)


@contextmanager
def _threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
