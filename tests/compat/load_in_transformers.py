"""Load what this library writes in other versions of transformers, and in the original LLaVA code.

    python tests/compat/load_in_transformers.py [--venvs DIR] [--llava CHECKOUT]

Saves tiny models with random weights, makes a throw-away environment for each version (with pip, on a CPU), loads the
models there and compares keys and logits. With a checkout of github.com/haotian-liu/LLaVA, the original layout is
loaded by its code. Exits with 1 when anything differs. `make` and `check` are also used by the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# Version of transformers, and what it runs with. Wheels of a plain index may bring CUDA; --torch-index chooses another.
VERSIONS = {
    "4.45.2": ["torch==2.6.0", "numpy<2"],
    "4.57.6": ["torch==2.13.0"],
    "5.23.0": ["torch==2.13.0"],
}
ORIGINAL = ("4.37.2", ["torch==2.6.0", "numpy<2", "sentencepiece", "accelerate", "einops", "requests", "protobuf"])
# The logits of one model in two versions differ by rounding only, relative to the largest.
TOLERANCE = 1e-5
IMAGE, VOCABULARY, IMAGE_TOKENS = 99, 101, 9

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "theta": {"rope_theta": 500000.0},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0}},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "bfloat16": {},
    "full": {},
    "from-original": {"vocab_size": 96},
}
ORIGINAL_CASES = ("plain", "theta", "linear-rope", "gqa", "tied", "full", "linear", "mlp3x")
# Projectors that transformers does not have.
PROJECTORS = {"linear": "linear", "mlp3x": "mlp3x_gelu"}


def make(folder: Path) -> None:
    """Write a model of each case to `folder`, in HF's layout and the original one, with inputs and logits."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig

    from llava_fast.convert import convert
    from llava_fast.drop_in import LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    # What the original code reads a config and an image processor from: other weights than those of the checkpoints.
    clip = folder / "clip"
    CLIPVisionModel(vision).save_pretrained(clip)
    weights = load_file(clip / "model.safetensors")
    weights = {f"vision_model.{name.removeprefix('vision_model.')}": weight for name, weight in weights.items()}
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 12, "width": 12},
        "size": {"shortest_edge": 12},
    }
    (clip / "preprocessor_config.json").write_text(json.dumps(image_processor))

    for name, text in {**CASES, **{key: {} for key in PROJECTORS}}.items():
        generator = torch.Generator().manual_seed(0)
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            **text,
        }
        config = LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**settings),
            image_token_index=IMAGE if name != "from-original" else 3,
            image_seq_length=IMAGE_TOKENS + (name == "full"),
            vision_feature_select_strategy="full" if name == "full" else "default",
            mm_projector_type=PROJECTORS.get(name, "mlp2x_gelu"),
        )
        model = LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        if name == "bfloat16":
            model = model.bfloat16()
        saved = folder / "hf" / name
        if name == "from-original":  # as the original code writes it: no image token, which the conversion adds
            model.save_pretrained(folder / "made", layout="original", mm_vision_tower=str(clip))
            flat = json.loads((folder / "made" / "config.json").read_text())
            del flat["image_token_index"]
            (folder / "made" / "config.json").write_text(json.dumps(flat))
            convert(folder / "made", saved, layout="hf", max_shard_size="60KB")
            model = LlavaForConditionalGeneration.from_pretrained(folder / "made")
        elif name not in PROJECTORS:
            model.save_pretrained(saved, max_shard_size="60KB")
        image_token = model.config.image_token_index
        image = torch.full((model.config.image_seq_length,), image_token)
        words = torch.randint(4, 90, (2, 12), generator=generator)
        rows = [torch.cat([row[:4], image, row[4:]]) for row in words]
        inputs = {
            "input_ids": torch.stack(rows),
            "pixel_values": torch.randn(2, 3, 12, 12, generator=generator).to(model.dtype),
        }
        with torch.no_grad():
            logits = model(**inputs).logits
        if saved.exists():
            save_file({**inputs, "logits": logits}, saved / "expected.st")
        if name in ORIGINAL_CASES:
            model.save_pretrained(folder / "original" / name, layout="original", mm_vision_tower=str(clip))
            save_file({**inputs, "logits": logits}, folder / "original" / name / "expected.st")


def check(folder: Path) -> dict[str, str]:
    """What is wrong, by case, when this version of transformers loads the HF checkpoints in `folder`."""
    from transformers import LlavaForConditionalGeneration

    def load(path: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
        return LlavaForConditionalGeneration.from_pretrained(path, torch_dtype="auto", output_loading_info=True)

    return {path.name: _differences(path, load, lambda inputs: inputs) for path in sorted((folder / "hf").iterdir())}


def check_original(folder: Path) -> dict[str, str]:
    """The same for the original layout and the original code."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    def load(path: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
        return LlavaLlamaForCausalLM.from_pretrained(path, torch_dtype="auto", output_loading_info=True)

    def inputs_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # One mark for each image, which the code replaces by features.
        rows = [
            torch.cat([row[row != IMAGE][:4], torch.tensor([-200]), row[row != IMAGE][4:]])
            for row in inputs["input_ids"]
        ]
        return {"input_ids": torch.stack(rows), "images": inputs["pixel_values"]}

    return {path.name: _differences(path, load, inputs_of) for path in sorted((folder / "original").iterdir())}


def _differences(path: Path, load: Any, inputs_of: Any) -> str:
    inputs = load_file(path / "expected.st")
    expected = inputs.pop("logits")
    model, info = load(path)
    problems = [
        f"{what} {sorted(map(str, info[what]))[:4]}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        # position_ids is a buffer that old CLIPs derive.
        if [key for key in info[what] if "position_ids" not in str(key)]
    ]
    with torch.no_grad():
        logits = model.eval()(**inputs_of(inputs)).logits
    if logits.dtype != expected.dtype and expected.dtype != torch.bfloat16:
        problems.append(f"logits are {logits.dtype}")
    # In bfloat16 two implementations round differently; a wrong weight is off by far more.
    tolerance = 0.05 if expected.dtype == torch.bfloat16 else TOLERANCE
    error = float((logits.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not error <= tolerance:
        problems.append(f"logits are off by {error:.2g}")
    return "; ".join(problems)


def environment(folder: Path, version: str, requirements: list[str], index: str | None) -> Path:
    """The Python of an environment with this version of transformers, made if it is not there."""
    python = folder / f"v{version}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        extra = ["--extra-index-url", index] if index else []
        wanted = [*requirements, f"transformers=={version}", "safetensors", "pillow"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *extra, *wanted], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, help="keep the environments here, and use those that are here")
    parser.add_argument("--llava", type=Path, help="checkout of the original code")
    parser.add_argument("--torch-index", help="further package index, for PyTorch without CUDA")
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check-original", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for folder, checker in ((arguments.check, check), (arguments.check_original, check_original)):
        if folder is not None:
            print(json.dumps(checker(folder)))
            return 0

    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder)
        runs = [(version, needs, "--check", {}) for version, needs in VERSIONS.items()]
        if arguments.llava:
            runs.append((*ORIGINAL, "--check-original", {"PYTHONPATH": str(arguments.llava.resolve())}))
        for version, requirements, flag, extra in runs:
            venvs = (arguments.venvs or folder / "venvs").resolve()
            python = environment(venvs, version, requirements, arguments.torch_index)
            done = subprocess.run(
                [python, __file__, flag, folder],
                env={**os.environ, "HF_HUB_OFFLINE": "1", **extra},
                capture_output=True,
                text=True,
            )
            print(f"transformers {version}{', the original code' if extra else ''}")
            if done.returncode:
                print(done.stderr[-2000:])
                failed = True
                continue
            for name, problems in json.loads(done.stdout.splitlines()[-1]).items():
                print(f"  {name:<14} {problems or 'same keys, same logits'}")
                failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
