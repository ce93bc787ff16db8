"""TRL's SFTTrainer with our model and processor, and with transformers' of the same files."""

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
from trl import SFTConfig, SFTTrainer

import llava_fast


def conversations() -> Dataset:
    """Pictures of several sizes, with questions and answers of several lengths."""
    random = np.random.default_rng(0)
    rows = []
    for i, size in enumerate([(28, 28), (40, 31), (28, 50), (33, 28)]):
        question = [{"type": "image"}, {"type": "text", "text": "What is this?" + " And why?" * i}]
        answer = [{"type": "text", "text": " word1 word2" * (4 - i)}]
        picture = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"images": [picture], "messages": messages})
    return Dataset.from_list(rows)


def losses(package: Any, checkpoint: Path, folder: Path, peft_config: Any = None, **settings: Any) -> list[float]:
    """Loss, gradient norm, entropy and token accuracy of two steps and an evaluation."""
    rows = conversations()
    trainer = SFTTrainer(
        model=package.LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32),
        processing_class=package.LlavaProcessor.from_pretrained(checkpoint),
        train_dataset=rows,
        eval_dataset=rows.select([0, 3]),
        peft_config=peft_config,
        args=SFTConfig(
            str(folder),
            max_length=None,
            max_steps=2,
            learning_rate=0.1,
            optim="sgd",  # Adam would enlarge the rounding of gradients near zero
            per_device_train_batch_size=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **settings,
        ),
    )
    trainer.train()
    assert len(trainer.state.log_history) == 4  # two steps, an evaluation, and the line at the end
    timed = ("runtime", "per_second")
    return [
        value
        for row in trainer.state.log_history
        for name, value in sorted(row.items())
        if name not in ("learning_rate", "total_flos") and not name.endswith(timed)
    ]


SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without checkpointing": {"gradient_checkpointing": False},
    "LoRA": {"peft_config": LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|up_proj)")},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "dft loss": {"loss_type": "dft"},
    "Liger": {"use_liger_kernel": True},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated")
def test_losses(tiny: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings = SETTINGS[name]
    for kernel in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # Liger replaces them; the test ends that
        monkeypatch.setattr(modeling_llama, kernel, getattr(modeling_llama, kernel))
    theirs = {key: value for key, value in settings.items() if key != "use_liger_kernel"}  # its kernels need a GPU
    torch.manual_seed(0)
    expected = losses(transformers, tiny_checkpoint, tmp_path, **theirs)
    torch.manual_seed(0)
    actual = losses(llava_fast, tiny_checkpoint, tmp_path, **settings)
    assert actual == pytest.approx(expected, rel=1e-5)
