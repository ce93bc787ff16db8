"""Liger's kernels are for transformers' modules: applied to our model they change nothing, and one line says so."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from liger_kernel.transformers import apply_liger_kernel_to_llava
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

ROWS = [[3, "image", 4], [2, "image", 9], [5]]


@pytest.fixture(autouse=True)
def _modules_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger also replaces classes in transformers' modules; the test ends that."""
    for module, family in ((modeling_llama, "Llama"), (modeling_mistral, "Mistral")):
        for name in ("apply_rotary_pos_emb", f"{family}RMSNorm", f"{family}MLP"):
            monkeypatch.setattr(module, name, getattr(module, name))


def forwards(model: nn.Module) -> dict[str, Any]:
    """The function that each module runs."""
    return {name: module.forward.__func__ for name, module in model.named_modules() if hasattr(module, "forward")}


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_a_model_stays_as_it_is(
    tiny: SimpleNamespace, caplog: pytest.LogCaptureFixture, kind: str, adapted: bool
) -> None:
    logging.Logger.warning_once.cache_clear()
    config = tiny.config(kind=kind)
    model = tiny.ours(config).train()
    if adapted:
        get_peft_model(model, LoraConfig(target_modules=r".*language_model.*(q_proj|up_proj)"))
    inputs = tiny.batch(config, ROWS)
    loss, before, names = model(**inputs).loss, forwards(model), repr(model)
    apply_liger_kernel_to_llava(model=model)
    apply_liger_kernel_to_llava(model=model, fused_linear_cross_entropy=False)
    assert forwards(model) == before
    assert repr(model) == names
    assert torch.equal(model(**inputs).loss, loss)
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("llava_fast")]
    assert logged == ["Liger's kernels are not applied: llava-fast's own operations are fused already"]


def test_the_argument_of_trainer(tiny: SimpleNamespace, tmp_path: Path) -> None:
    losses = []
    for use_liger_kernel in (False, True):
        model = tiny.ours(tiny.config())
        before = forwards(model)
        run = Trainer(
            model=model,
            args=TrainingArguments(
                str(tmp_path),
                use_liger_kernel=use_liger_kernel,
                max_steps=2,
                per_device_train_batch_size=1,
                eval_strategy="steps",
                eval_steps=1,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            data_collator=lambda rows: rows[0],
            train_dataset=[tiny.batch(tiny.config(), ROWS, seed=seed) for seed in (0, 1)],
            eval_dataset=[tiny.batch(tiny.config(), ROWS, seed=2)],
        )
        run.train()
        assert forwards(model) == before
        losses.append([row.get("loss", row.get("eval_loss")) for row in run.state.log_history])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5  # of two steps, two evaluations, and the line at the end
