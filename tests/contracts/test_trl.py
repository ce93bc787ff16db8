"""TRL's trainers with our model and processor, and with transformers' of the same files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers.models.llama import modeling_llama
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import llava_fast

LORA = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|up_proj)")


def said(role: str, *content: Any) -> list[dict[str, Any]]:
    """One message; content is texts, and a type of its own for the picture."""
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    return [{"role": role, "content": parts}]


def rows() -> Dataset:
    """Pictures of several sizes, with questions and answers of several lengths, good and bad."""
    random = np.random.default_rng(0)
    made = []
    for i, (width, height) in enumerate([(28, 28), (40, 31), (28, 50), (33, 28)]):
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        question = said("user", {"type": "image"}, "What is this?" + " And why?" * i)
        chosen, rejected = said("assistant", " word1 word2" * (4 - i)), said("assistant", " word3" * (i + 1))
        made.append({"images": [picture], "prompt": question, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(made)


def logged(kind: Any, arguments: Any, package: Any, checkpoint: Path, folder: Path, **given: Any) -> list[float]:
    """All numbers that two steps log, but times and learning rates."""
    torch.manual_seed(0)
    settings = given.pop("settings", {})
    trainer = kind(
        model=load(package, checkpoint),
        processing_class=package.LlavaProcessor.from_pretrained(checkpoint),
        args=arguments(
            str(folder),
            max_steps=2,
            learning_rate=0.1,
            optim="sgd",  # Adam would enlarge the rounding of gradients near zero
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **settings,
        ),
        **given,
    )
    trainer.train()
    ignored = ("learning_rate", "total_flos", "step_time", "runtime", "per_second")
    return [
        value for row in trainer.state.log_history for name, value in sorted(row.items()) if not name.endswith(ignored)
    ]


def load(package: Any, checkpoint: Path) -> Any:
    return package.LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)


SFT: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without checkpointing": {"gradient_checkpointing": False},
    "LoRA": {"peft_config": LORA},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "dft loss": {"loss_type": "dft"},
    "Liger": {"use_liger_kernel": True},
}


@pytest.mark.parametrize("name", SFT)
@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated")
def test_sft(tiny: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for kernel in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # Liger replaces them; the test ends that
        monkeypatch.setattr(modeling_llama, kernel, getattr(modeling_llama, kernel))
    train = rows().map(lambda row: {"messages": row["prompt"] + row["chosen"]}).select_columns(["images", "messages"])
    found = []
    for package in (transformers, llava_fast):
        settings = {"max_length": None, "eval_strategy": "steps", "eval_steps": 2, **SFT[name]}
        if package is transformers:
            settings.pop("use_liger_kernel", None)  # on their model its kernels run, which needs a GPU
        given = {"peft_config": settings.pop("peft_config", None), "train_dataset": train, "eval_dataset": train}
        found.append(logged(SFTTrainer, SFTConfig, package, tiny_checkpoint, tmp_path, settings=settings, **given))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert len(found[0]) > 20


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
def test_dpo(tiny: Any, tiny_checkpoint: Path, tmp_path: Path, peft_config: LoraConfig | None) -> None:
    """Without LoRA the reference model must be given: TRL would load it as transformers' class."""
    found = []
    for package in (transformers, llava_fast):
        given = {"peft_config": peft_config, "train_dataset": rows()}
        given["ref_model"] = load(package, tiny_checkpoint) if peft_config is None else None
        settings = {"max_length": None}
        found.append(logged(DPOTrainer, DPOConfig, package, tiny_checkpoint, tmp_path, settings=settings, **given))
    # Rewards are small differences of log-probabilities of about 50.
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-5)
    assert len(found[0]) > 20


def test_grpo(tiny: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(str(completion)) % 7) for completion in completions]

    found = []
    for package in (transformers, llava_fast):
        given = {"train_dataset": rows().select_columns(["images", "prompt"]), "reward_funcs": reward}
        settings = {"num_generations": 2, "max_completion_length": 8}
        found.append(logged(GRPOTrainer, GRPOConfig, package, tiny_checkpoint, tmp_path, settings=settings, **given))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert len(found[0]) > 20
