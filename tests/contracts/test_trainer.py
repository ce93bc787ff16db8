"""transformers' own Trainer with our model and with theirs: the same losses, the same best step, the same weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from llava_fast import LlavaForConditionalGeneration

ROWS = [[3, "image", 4], [2, "image", 9], [6, "image", 5], [4, "image", 2], [7, "image", 8], [9, "image", 3]]


class Rows(torch.utils.data.Dataset):
    """Samples of different lengths, with one image each."""

    def __init__(self, tiny: SimpleNamespace, seed: int) -> None:
        batch = tiny.batch(tiny.config(), ROWS, seed=seed)
        self.rows = [{name: value[0] for name, value in tiny.single(batch, i).items()} for i in range(len(ROWS))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A padded batch, as collators for transformers' LLaVA make it."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
    return {**padded, "pixel_values": torch.stack([row["pixel_values"] for row in rows])}


def trainer(
    tiny: SimpleNamespace, model: Any, folder: Path, parts: dict[str, Any] | None = None, **arguments: Any
) -> Trainer:
    settings = {
        "learning_rate": 0.02,
        "max_steps": 8,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "load_best_model_at_end": True,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **settings),
        data_collator=collate,
        train_dataset=Rows(tiny, 0),
        eval_dataset=Rows(tiny, 1),
        **(parts or {}),
    )


def logged(run: Trainer) -> list[tuple[str, float]]:
    """Losses and gradient norms of the steps, losses and metrics of the evaluations."""
    return [
        (name, value)
        for row in run.state.log_history
        for name, value in sorted(row.items())
        if name in ("step", "loss", "grad_norm", "eval_loss", "eval_right")
    ]


def assert_logged_alike(ours: Trainer, theirs: Trainer) -> None:
    actual, expected = logged(ours), logged(theirs)
    assert [name for name, _ in actual] == [name for name, _ in expected]
    assert [value for _, value in actual] == pytest.approx([value for _, value in expected], rel=1e-5)


def best_step(run: Trainer) -> str:
    return Path(run.state.best_model_checkpoint).name


def assert_same_weights(model: Any, expected: Any) -> None:
    for (name, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_losses_and_best_model(tiny: SimpleNamespace, tmp_path: Path) -> None:
    runs = []
    for name, model in zip(("ours", "theirs"), tiny.pair(tiny.config()), strict=True):
        runs.append(trainer(tiny, model, tmp_path / name))
        runs[-1].train()
    ours, theirs = runs
    assert best_step(ours) == best_step(theirs) != "checkpoint-8"  # or reloading it would change nothing
    assert [name for name, _ in logged(ours)].count("eval_loss") == 4
    assert_logged_alike(ours, theirs)
    # transformers 5 does not find the weights of its own LLaVA again, and only warns; ours are those of the best step.
    assert_same_weights(ours.model, LlavaForConditionalGeneration.from_pretrained(ours.state.best_model_checkpoint))
    assert ours.evaluate()["eval_loss"] == ours.state.best_metric


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_run_is_the_run_that_went_on(tiny: SimpleNamespace, tmp_path: Path, tied: bool) -> None:
    config = tiny.config({"tie_word_embeddings": tied})
    whole = trainer(tiny, tiny.ours(config), tmp_path, load_best_model_at_end=False, eval_strategy="no")
    whole.train()
    again = trainer(tiny, tiny.ours(config, seed=5), tmp_path, load_best_model_at_end=False, eval_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(again.model, whole.model)


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: int | None = None) -> torch.Tensor:
    """A loss of the user's own, from the logits."""
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def right(found: EvalPrediction) -> dict[str, float]:
    labels = found.label_ids[:, 1:]
    return {"right": float((found.predictions[0].argmax(-1)[:, :-1] == labels)[labels != -100].mean())}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"label_smoothing_factor": 0.1}, {}),
        ({"neftune_noise_alpha": 5.0}, {}),
        ({"gradient_checkpointing": True}, {}),
        ({"train_sampling_strategy": "group_by_length"}, {}),
        ({}, {"compute_loss_func": own_loss}),
        ({}, {"compute_metrics": right}),
        ({}, {"peft_config": LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|up_proj)")}),
    ],
    ids=["smoothing", "noise", "checkpointing", "by length", "own loss", "metrics", "LoRA"],
)
def test_settings(tiny: SimpleNamespace, tmp_path: Path, arguments: dict, parts: dict) -> None:
    runs = []
    few = {"max_steps": 3, "eval_steps": 3, "load_best_model_at_end": False, "save_strategy": "no", "optim": "sgd"}
    for model in tiny.pair(tiny.config()):
        torch.manual_seed(0)
        trained = get_peft_model(model, parts["peft_config"]) if "peft_config" in parts else model
        given = {name: part for name, part in parts.items() if name != "peft_config"}
        runs.append(trainer(tiny, trained, tmp_path, **few, **arguments, parts=given))
        runs[-1].train()
    assert_logged_alike(*runs)


def test_predictions(tiny: SimpleNamespace, tmp_path: Path) -> None:
    found = []
    for model in tiny.pair(tiny.config()):
        run = trainer(tiny, model, tmp_path, load_best_model_at_end=False)
        found.append(run.predict(run.eval_dataset))
    ours, theirs = found
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=1e-6)
    assert (ours.label_ids == theirs.label_ids).all()
    real = ours.label_ids != -100
    for actual, expected in zip(ours.predictions, theirs.predictions, strict=True):
        assert actual.shape == expected.shape
        if actual.shape[:2] == real.shape:  # the logits; those of padding have no meaning
            actual, expected = actual[real], expected[real]
        assert abs(actual - expected).max() <= 1e-5 * abs(expected).max()
