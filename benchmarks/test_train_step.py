"""One whole training step, forward and backward: transformers, transformers with Liger, and this model.

LLaVA's two stages: `train_step_projector` (everything else frozen) and `train_step_full` (language model and projector;
the tower is frozen in both). A sample is an image of 576 tokens without labels and a labelled answer. `hf_rows` is
transformers with a two-line change: index the labelled rows before the head. Loss and gradients are verified; memory
includes gradients, but not weights. The optimiser is not measured, as it is the same for all.

On a CPU the tower is tiny, so that the language model of the given shape (samples, tokens, hidden, MLP, layers,
vocabulary) dominates: with an MLP of LLaVA-1.5-7B's proportions, and with a narrow one, so that the head is a larger
share of the work. On a GPU it is LLaVA-1.5-7B with 8 of the 32 layers.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Stock

from benchmarks.harness import Call, Case, Tensors, benchmark_of, report
from benchmarks.records import DEVICE
from llava_fast.drop_in import LlavaForConditionalGeneration

try:
    from liger_kernel.transformers import apply_liger_kernel_to_llava
except ImportError:
    apply_liger_kernel_to_llava = None

IMAGE_TOKENS = 576
STAGES = ("projector", "full")


@dataclass(frozen=True)
class Size:
    """Sizes of batch and model. `text` tokens of each sample are labelled."""

    samples: int
    text: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    tower: tuple[int, int, int, int]  # width, MLP, layers, heads
    image_tokens: int = IMAGE_TOKENS

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text


@dataclass(frozen=True, eq=False)
class StepCase(Case):
    """A case whose call includes backward, for the trained parameters."""

    @property
    def identity(self) -> dict[str, str]:
        return {**super().identity, "direction": "forward+backward"}


def cases(gpu: bool) -> list[Case]:
    if gpu:
        sizes = [Size(4, 256, 4096, 11008, 8, 32, 32000, (1024, 4096, 24, 16))]
    else:
        sizes = [Size(1, 64, 512, intermediate, 8, 4, 32000, (64, 128, 2, 2)) for intermediate in (512, 1376)]
    return [step_case(stage, size, torch.bfloat16 if gpu else torch.float32) for stage in STAGES for size in sizes]


def step_case(stage: str, size: Size, dtype: torch.dtype) -> Case:
    def inputs() -> Tensors:
        input_ids = torch.randint(0, size.vocabulary - 1, (size.samples, size.tokens))
        input_ids[:, : size.image_tokens] = size.vocabulary - 1
        labels = input_ids.clone()
        labels[:, : size.image_tokens] = -100
        side = _config(size).vision_config.image_size
        pixels = torch.randn(size.samples, 3, side, side)
        return {"input_ids": input_ids.to(DEVICE), "labels": labels.to(DEVICE), "pixels": pixels.to(DEVICE, dtype)}

    def reference(pixels: torch.Tensor, **others: torch.Tensor) -> list[torch.Tensor]:
        if pixels.dtype == dtype:
            model = stock()
        else:  # the float64 reference
            model = copy.deepcopy(stock()).to(pixels.dtype)
        return _provider(model, _loss)({"pixels": pixels, **others})()

    @cache
    def stock() -> Stock:
        torch.manual_seed(0)
        return _freeze(Stock(_config(size)).to(DEVICE, dtype).train(), stage)

    def ours() -> LlavaForConditionalGeneration:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(_config(size))
        return _freeze(_with_weights_of(model, stock()).train(), stage)

    def liger() -> Stock:
        with torch.device("meta"):
            model = Stock(_config(size))
        model = _with_weights_of(model, stock())
        apply_liger_kernel_to_llava(model=model)
        return _freeze(model.train(), stage)

    providers = {
        "hf": lambda tensors: _provider(stock(), _loss)(tensors),
        "hf_rows": lambda tensors: _provider(stock(), _loss_of_rows)(tensors),
    }
    if DEVICE.type == "cuda":
        providers["compile"] = lambda tensors: _provider(stock(), torch.compile(_loss))(tensors)
        if apply_liger_kernel_to_llava is not None:
            providers["liger"] = lambda tensors: _provider(liger(), _loss)(tensors)
    providers["triton" if DEVICE.type == "cuda" else "reference"] = lambda tensors: _provider(ours(), _packed_loss)(
        {**tensors, "rows": F.pad(tensors["labels"][:, 1:] != -100, (0, 1)).flatten().nonzero()[:, 0]}
    )
    flops, passes = _work(stage, size)
    return StepCase(
        op=f"train_step_{stage}",
        shape=(size.samples, size.tokens, size.hidden, size.intermediate, size.layers, size.vocabulary),
        dtype=dtype,
        backward=False,
        inputs=inputs,
        reference=reference,
        providers=providers,
        bytes_moved=passes * _weights(size) * dtype.itemsize,
        flops=flops,
        capturable=False,
    )


def _config(size: Size) -> LlavaConfig:
    width, intermediate, layers, heads = size.tower
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=14 * round(size.image_tokens**0.5),
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            vocab_size=size.vocabulary,
        ),
        image_token_index=size.vocabulary - 1,
        image_seq_length=size.image_tokens,
    )


def _freeze(model: torch.nn.Module, stage: str) -> torch.nn.Module:
    model.requires_grad_(stage == "full")
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def _with_weights_of(model: torch.nn.Module, stock: Stock) -> torch.nn.Module:
    """The model sharing the weights of `stock`; buffers derived from the config are computed again."""
    model = model.to_empty(device=DEVICE)
    model.load_state_dict(stock.state_dict(), assign=True)
    model.model.language_model.rotary_emb = stock.model.language_model.rotary_emb
    if hasattr(model.model.vision_tower.embeddings, "position_ids"):
        model.model.vision_tower.embeddings.position_ids = stock.model.vision_tower.embeddings.position_ids
    return model


def _provider(model: torch.nn.Module, loss_of: Callable) -> Callable[[Tensors], Call]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def provider(tensors: Tensors) -> Call:
        def call() -> list[torch.Tensor]:
            with torch.enable_grad():
                loss = loss_of(model, **tensors)
            return [loss.detach(), *torch.autograd.grad(loss, trained)]

        return call

    return provider


def _loss(model, input_ids, labels, pixels):
    return model(input_ids=input_ids, labels=labels, pixel_values=pixels, use_cache=False).loss


def _packed_loss(model, input_ids, labels, pixels, rows):
    """The loss with the arguments that this library's collator provides."""
    return model(input_ids=input_ids, labels=labels, pixel_values=pixels, target_rows=rows, use_cache=False).loss


def _loss_of_rows(model, input_ids, labels, pixels):
    hidden = model.model(input_ids=input_ids, pixel_values=pixels, use_cache=False).last_hidden_state
    rows = labels[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden[:, :-1][rows]).float(), labels[:, 1:][rows])


def _weights(size: Size) -> int:
    per_layer = size.hidden * (4 * size.hidden + 3 * size.intermediate)
    width = size.tower[0]
    return size.layers * per_layer + size.vocabulary * size.hidden + size.hidden * (size.hidden + width)


def _work(stage: str, size: Size) -> tuple[int, int]:
    """FLOPs of language model, projector and labelled head; how many times all weights or their gradients are moved."""
    products = 3 if stage == "full" else 2  # forward, gradient of the input, of the weight
    layer = size.hidden * (4 * size.hidden + 3 * size.intermediate)
    rows = 2 * size.hidden * size.hidden + 3 * size.hidden * size.intermediate  # of the last layer, if labelled
    tokens, labelled = size.samples * size.tokens, size.samples * size.text
    linear = size.layers * layer * tokens - rows * (tokens - labelled) + size.vocabulary * size.hidden * labelled
    projector = size.hidden * (size.tower[0] + size.hidden) * size.samples * size.image_tokens
    # Two products forward and five backward for every pair of tokens that see each other; of the last layer, if read.
    seen = size.tokens * (size.tokens + 1) // 2
    unread = size.image_tokens * (size.image_tokens + 1) // 2
    attention = 7 * size.hidden * size.samples * (size.layers * seen - unread)
    return 2 * (products * linear + 3 * projector + attention), products


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_train_step(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)
