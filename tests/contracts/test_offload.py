"""accelerate's offloading to CPU and disk: the logits and answers of the whole model, as with transformers' model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

from llava_fast import LlavaForConditionalGeneration

CLASSES = (LlavaForConditionalGeneration, transformers.LlavaForConditionalGeneration)


def cpu(cls: type, model: Any, saved: Path, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def disk(cls: type, model: Any, saved: Path, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


def all_on_disk(cls: type, model: Any, saved: Path, folder: Path) -> Any:
    return cls.from_pretrained(saved, device_map={"": "disk"}, offload_folder=folder)


def mostly_on_disk(cls: type, model: Any, saved: Path, folder: Path) -> Any:
    """Room for half of the weights."""
    room = sum(parameter.nbytes for parameter in model.parameters()) // 2
    return cls.from_pretrained(saved, device_map="auto", max_memory={"cpu": room}, offload_folder=folder)


def dispatched(cls: type, model: Any, saved: Path, folder: Path) -> Any:
    """Names of files are transformers', but those of tensors are the model's own for `load_checkpoint_and_dispatch`."""
    file = folder / "weights.bin"
    torch.save({name: weight.clone() for name, weight in model.state_dict().items()}, file)
    with accelerate.init_empty_weights():
        empty = cls(model.config)
    placed = {"": "disk"}
    return accelerate.load_checkpoint_and_dispatch(empty, str(file), placed, offload_folder=folder).eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("offload", [cpu, disk, all_on_disk, mostly_on_disk, dispatched])
def test_an_offloaded_model_computes_the_same(offload: Callable, tied: bool, tiny, tmp_path):
    config = tiny.config(tie_word_embeddings=tied)
    inputs = tiny.prompt(tiny.batch(config, [["image", 3], [2, "image", 4]], side="left"))
    models = dict(zip(CLASSES, tiny.pair(config)))
    with torch.no_grad():
        expected = models[LlavaForConditionalGeneration](**inputs).logits
    answer = models[LlavaForConditionalGeneration].generate(**inputs, generation_config=tiny.greedy(max_new_tokens=4))
    for cls, model in models.items():
        saved, folder = tmp_path / cls.__module__, tmp_path / f"{cls.__module__}-offload"
        folder.mkdir()
        model.save_pretrained(saved)
        placed = offload(cls, model, saved, folder)
        assert any(parameter.is_meta for parameter in placed.parameters())
        with torch.no_grad():
            tiny.assert_near(placed(**inputs).logits, expected, what=cls.__module__)
        said = placed.generate(**inputs, generation_config=tiny.greedy(max_new_tokens=4))
        assert said.sequences.equal(answer.sequences), cls
