"""How far a thing travels: the files and functions of llava_fast that are called on four walks.

    python tests/walks.py [--json] [--list] [WALK ...]

    image    a picture and a prompt, through the processor and a training forward pass, to the loss
    token    `generate` of two tokens about a picture: prefill and one step; token_step is the step alone
    row      training (stage projector): from opening a data file to the end of the first optimiser step, the loading of
             the model in between included; row_alone is without that loading, which no row passes through
    key      `from_pretrained`: from a key of a checkpoint to a parameter

Everything runs on a CPU with the reference backend and a tiny model with random weights. Whatever is imported is
imported before counting begins. A function is a (file, qualified name) that was called at least once; module and class
bodies, lambdas and comprehensions are not functions of their own. Only public names and the trainer's `run` are used,
so the script also runs on older versions: `PYTHONPATH=CHECKOUT python tests/walks.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LLAVA_FAST_BACKEND"] = "reference"

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

import llava_fast

PACKAGE = str(Path(llava_fast.__file__).parent) + os.sep
PROMPT = "USER: <image>\nWhat is it? ASSISTANT:"


class Count:
    """The functions of llava_fast that are called while it is on."""

    def __init__(self) -> None:
        self.functions: set[tuple[str, str]] = set()

    def on(self) -> None:
        sys.setprofile(self._profile)

    def off(self) -> None:
        sys.setprofile(None)

    def __enter__(self) -> Count:
        self.on()
        return self

    def __exit__(self, *_: object) -> None:
        self.off()

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and _is_function(code):
            self.functions.add((code.co_filename.removeprefix(PACKAGE), _qualified(code)))

    def __or__(self, other: Count) -> Count:
        both = Count()
        both.functions = self.functions | other.functions
        return both

    @property
    def files(self) -> set[str]:
        return {file for file, _ in self.functions}


def _is_function(code: CodeType) -> bool:
    """False for the bodies of modules and classes, and for lambdas, comprehensions and generator expressions."""
    return bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")


def _qualified(code: CodeType) -> str:
    return getattr(code, "co_qualname", f"{code.co_name}:{code.co_firstlineno}")  # Python 3.10 has no co_qualname


# ------------------------------------------------------------------------------------------------ a tiny model


def make_processor() -> Any:
    """Images of 28 × 28 pixels and 4 tokens; the tokens are single bytes."""
    alphabet = ["<unk>", "<s>", "</s>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return llava_fast.LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default")


def make_model(processor: Any) -> Any:
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = llava_fast.LlavaConfig(
        vision_config=CLIPVisionConfig(**small, num_attention_heads=2, image_size=28, patch_size=14),
        text_config=LlamaConfig(
            **small,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(processor.tokenizer),
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        ),
        image_token_index=3,
    )
    torch.manual_seed(0)
    return llava_fast.LlavaForConditionalGeneration(config)


def picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((40, 30))


# ------------------------------------------------------------------------------------------------- the walks


def walk_image(folder: Path) -> dict[str, Count]:
    processor = make_processor()
    model = make_model(processor).train()
    count = Count()
    image = picture()
    with count:
        inputs = processor(images=image, text=PROMPT + " a picture", return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :-8] = -100
        loss = model(**inputs, labels=labels).loss
    assert torch.isfinite(loss)
    return {"image": count}


def walk_token(folder: Path) -> dict[str, Count]:
    processor = make_processor()
    model = make_model(processor).eval()
    inputs = processor(images=picture(), text=PROMPT, return_tensors="pt")
    prefill, step = Count(), Count()

    class Streamer:
        """Is handed the prompt, then each new token: the step is what lies between the first and the second."""

        puts = 0

        def put(self, _: torch.Tensor) -> None:
            self.puts += 1
            if self.puts == 2:
                step.on()

        def end(self) -> None:
            step.off()

    with prefill:
        model.generate(**inputs, streamer=Streamer(), do_sample=False, max_new_tokens=2)
    return {"token": prefill | step, "token_step": step}


def walk_row(folder: Path) -> dict[str, Count]:
    from llava_fast.train import trainer
    from llava_fast.train.recipe import load_recipe

    processor = make_processor()
    make_model(processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    picture().save(folder / "picture.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A picture."}]
    rows = [{"id": str(i), "image": "picture.png", "conversations": turns} for i in range(4)]
    (folder / "data.json").write_text(json.dumps(rows))
    keys = {
        "stage": "projector", "model": "model", "data": "data.json", "image_folder": ".", "output_dir": "out",
        "dtype": "fp32", "global_batch_size": 2, "per_device_batch_size": 2, "max_steps": 1, "learning_rate": 0.001,
        "workers": 0,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    paths = [f"{key}={folder / keys[key]}" for key in ("model", "data", "image_folder", "output_dir")]
    recipe = load_recipe(folder / "recipe.yaml", paths)

    row, loading = Count(), Count()
    place = getattr(trainer, "stages", trainer)
    open_data, prepare_model = trainer.LlavaDataset.__init__, place.prepare_model

    def opening(*args: Any, **kwargs: Any) -> None:
        row.on()
        open_data(*args, **kwargs)

    def preparing(*args: Any, **kwargs: Any) -> Any:
        loading.on()
        try:
            return prepare_model(*args, **kwargs)
        finally:
            row.on()

    class FirstStep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            row.off()

    trainer.LlavaDataset.__init__, place.prepare_model = opening, preparing
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.run(recipe, [FirstStep()])
    finally:
        row.off()
        trainer.LlavaDataset.__init__, place.prepare_model = open_data, prepare_model
    return {"row": row | loading, "row_alone": row}


def walk_key(folder: Path) -> dict[str, Count]:
    make_model(make_processor()).save_pretrained(folder / "model")
    count = Count()
    with count:
        llava_fast.LlavaForConditionalGeneration.from_pretrained(folder / "model")
    return {"key": count}


WALKS: dict[str, Callable[[Path], dict[str, Count]]] = {
    "image": walk_image,
    "token": walk_token,
    "row": walk_row,
    "key": walk_key,
}


def walks(names: list[str] | None = None) -> dict[str, Count]:
    """The count of each walk that is asked for, all of them by default."""
    transformers.logging.disable_progress_bar()
    for module in pkgutil.walk_packages(llava_fast.__path__, "llava_fast."):
        if not module.name.endswith(".__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    counts: dict[str, Count] = {}
    for name in names or WALKS:
        with tempfile.TemporaryDirectory() as folder:
            counts.update(WALKS[name](Path(folder)))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("walk", nargs="*", help=f"of {', '.join(WALKS)}; all by default")
    parser.add_argument("--json", action="store_true", help="print counts, files and functions as JSON")
    parser.add_argument("--list", action="store_true", help="print the functions, by file")
    asked = parser.parse_args()
    if unknown := set(asked.walk) - set(WALKS):
        parser.error(f"no walk {', '.join(sorted(unknown))}; there are {', '.join(WALKS)}")
    counts = walks(asked.walk)
    if asked.json:
        print(json.dumps({name: _as_json(count) for name, count in counts.items()}, indent=1))
        return
    print(f"{'walk':<12}{'files':>6}{'functions':>11}")
    for name, count in counts.items():
        print(f"{name:<12}{len(count.files):>6}{len(count.functions):>11}")
    if asked.list:
        for name, count in counts.items():
            print(f"\n{name}")
            for file, names in _by_file(count).items():
                print(f"  {file}\n    {', '.join(names)}")


def _by_file(count: Count) -> dict[str, list[str]]:
    return {file: sorted(name for f, name in count.functions if f == file) for file in sorted(count.files)}


def _as_json(count: Count) -> dict[str, Any]:
    return {"files": len(count.files), "functions": len(count.functions), "called": _by_file(count)}


if __name__ == "__main__":
    main()
