"""What all tests share: no downloads, fixed seeds, and the marks `gpu`, `slow` and `exhaustive`."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# Before anything imports transformers: nothing here may go looking for a model on a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

from tests.ops import interpreter
from tests.seconds import slow_cases
from tests.tiny import TEXT, VISION

# Before anything imports Triton: without a GPU its kernels run in the interpreter, where a test asks for them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        interpreter.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run the cases marked `exhaustive`, too")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--exhaustive"):
        # On a GPU all cases run: there they cost little.
        left_out = [item for item in items if item.get_closest_marker("exhaustive") and not on_a_gpu(item)]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    slow = slow_cases([item.nodeid for item in items])
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if on_a_gpu(item):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; PyTorch sees none"))


def on_a_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state, whichever tests ran before."""
    torch.manual_seed(0)
    np.random.seed(0)
    yield


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """Tiny models and batches."""
    from tests import models

    return models


@pytest.fixture(autouse=True)
def _one_quiet_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny tensors only lose time on several threads."""
    if "tiny" not in request.fixturenames:
        yield
        return
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a LLaVA with random weights; images are 28 × 28 pixels, 4 tokens.

    Its tokens are single bytes, and words with a space in front, so that answers come in several pieces.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaImageProcessorPil, PreTrainedTokenizerFast

    from llava_fast import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from llava_fast.processor.templates import TEMPLATES

    special = ["<unk>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    tokenizer.add_tokens([f" word{i}" for i in range(600)])
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATES["v1"].chat_template,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(
            **TEXT,
            vocab_size=len(tokenizer),
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=3,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny-llava")
    LlavaForConditionalGeneration(config).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
