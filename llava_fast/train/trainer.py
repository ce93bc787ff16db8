"""Training of LLaVA's stages with transformers' Trainer; `run(recipe)` is the entry point.

The Trainer and accelerate provide launching, sharding, mixed precision, accumulation and resuming. This file adds
packed batches grouped by modality and length, an evaluation loss averaged over tokens, and checkpoints in the layout
that `from_pretrained` reads. What each stage trains is in `stages.py`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import EvalLoopOutput

from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.processor.processor import LlavaProcessor
from llava_fast.processor.templates import get_template
from llava_fast.train import checkpoints, stages
from llava_fast.train.data import LlavaDataset
from llava_fast.train.recipe import DataSource, Recipe, RecipeError
from llava_fast.train.sampler import FilledUp, GroupedSampler, PackedCollator

logger = logging.getLogger(__name__)


class TrainResult(TypedDict):
    """The result of `run`."""

    output_dir: Path  # a full model and its processor; with stage lora the adapter is in output_dir/adapter
    steps: int  # optimiser steps in total, those before a resume included
    train_loss: float  # mean over the steps of this call
    eval_loss: float | None  # per supervised token, after the last step
    log_history: list[dict[str, float]]
    counts: dict[str, int]  # counts of `rows.Report`: samples, dropped_fully_masked ...
    tokens: int  # tokens of this call, image tokens included, over all devices
    seconds: float  # wall clock of the training loop, evaluations and checkpoints included
    tokens_per_s: float


def run(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> TrainResult:
    """Train by a recipe and write a model to `recipe.output_dir` that `from_pretrained` loads.

    With stage lora that model has the adapter merged in; the adapter itself is in `output_dir/adapter`,
    and checkpoints are adapters that refer to `recipe.model`.

    Raises:
        RecipeError: for a bad key, file or sample; nothing has been written then.
        AlreadyFinished: if the run to be resumed has finished; nothing has been written then.
        CheckpointError: if a checkpoint or the model could not be written; earlier checkpoints stay complete.
    """
    recipe.check_files()
    checkpoint = recipe.checkpoint()
    with _one_line_errors():
        manifest = checkpoints.read_manifest(checkpoint) if checkpoint else None
        if checkpoint is not None and manifest is not None:
            checkpoints.check_settings(recipe, checkpoint, manifest["made_from"]["settings"])
        arguments = training_arguments(recipe)
        set_seed(recipe.seed)
        processor = load_processor(recipe)
        train, validation = load_data(recipe, processor)
        model = stages.prepare_model(recipe, processor, checkpoint)
        made_from = checkpoints.made_from(recipe, train.lengths, model)
        if checkpoint is not None and manifest is not None:
            checkpoints.check_same(recipe, checkpoint, made_from, manifest["made_from"])
            with checkpoints.reading(checkpoint):
                state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            checkpoints.check_unfinished(recipe, made_from, manifest["made_from"], state)
        bidirectional = getattr(model.config, "image_attention", "causal") == "bidirectional"
        trainer = LlavaTrainer(
            recipe=recipe,
            made_from=made_from,
            progress=manifest["progress"] if manifest else {},
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=PackedCollator(processor, bidirectional_images=bidirectional),
            processing_class=processor,
            callbacks=list(callbacks),
        )
        if arguments.should_save:
            checkpoints.clean(recipe.output_dir)
    started = time.perf_counter()
    try:
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        trainer.close_progress_bar()
    seconds = time.perf_counter() - started
    history = trainer.state.log_history
    evaluated = {entry["step"] for entry in history if "eval_loss" in entry}
    if validation is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    trainer.save_result()
    tokens = trainer.count_tokens()
    return TrainResult(
        output_dir=recipe.output_dir,
        steps=trainer.state.global_step,
        train_loss=output.training_loss,
        eval_loss=next((entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry), None),
        log_history=history,
        counts=trainer.counts(),
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
    )


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's arguments; FSDP and DeepSpeed come from `accelerate launch`, through the environment."""
    if recipe.dtype == "fp16" and not torch.cuda.is_available():
        raise RecipeError("dtype: fp16 needs a GPU for its loss scaling, use bf16 or fp32 here")
    _check_trackers(recipe)
    accumulation = recipe.accumulation(int(os.environ.get("WORLD_SIZE", "1")))
    # The recipe overrides the mixed precision in the config file of `accelerate launch`.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if recipe.dtype == "fp32" else recipe.dtype
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation" if "activation_checkpointing" in known else "gradient"  # renamed in transformers 5.23
    checkpointing: dict[str, Any] = {
        f"{name}_checkpointing": recipe.gradient_checkpointing,
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
    }
    arguments = TrainingArguments(
        output_dir=str(recipe.output_dir),
        per_device_train_batch_size=recipe.per_device_batch_size,
        per_device_eval_batch_size=recipe.per_device_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.scheduler,
        warmup_steps=recipe.warmup_ratio,  # a value below 1 is a share of all steps
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.dtype == "bf16",
        fp16=recipe.dtype == "fp16",
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # log a loss of NaN as NaN
        eval_strategy="steps" if recipe.eval_steps else "no",
        eval_steps=recipe.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 500,
        save_total_limit=recipe.save_total_limit,
        seed=recipe.seed,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # the collator needs keys that are not arguments of forward
        label_names=["labels"],
        ddp_find_unused_parameters=False,  # text-only batches keep the projector in the graph
        report_to=recipe.report_to,
        **checkpointing,
    )
    # One device per process: DataParallel cannot split a pack. For several devices use torchrun.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _check_trackers(recipe: Recipe) -> None:
    """RecipeError for a tracker that transformers does not know, or whose package is not installed."""
    trackers = [recipe.report_to] if isinstance(recipe.report_to, str) else recipe.report_to
    for tracker in trackers:
        if tracker not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            several = "; give several as a list, [tensorboard, wandb]" if "," in tracker else ""
            raise RecipeError(
                f"report_to: {tracker!r} is not one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}{several}"
            )
        if tracker in INTEGRATION_TO_CALLBACK and tracker not in get_available_reporting_integrations():
            raise RecipeError(f"report_to: {tracker} is not installed; pip install it, or set report_to=none")


def load_processor(recipe: Recipe) -> LlavaProcessor:
    """The recipe's processor, or the model's, with the recipe's image aspect and conversation style."""
    folder = recipe.processor or recipe.model
    if folder is None:
        processor = LlavaProcessor.assemble(*recipe.assembled_from)
    else:
        processor = LlavaProcessor.from_pretrained(folder)
    processor.pad_to_square = recipe.image_aspect == "pad"
    # Save the chat template of the training style; the style for captions (`plain`) has none, so the old one is kept.
    processor.chat_template = get_template(recipe.template).chat_template or processor.chat_template
    return processor


def load_data(recipe: Recipe, processor: LlavaProcessor) -> tuple[LlavaDataset, LlavaDataset | None]:
    """The training dataset, and the validation dataset if the recipe has one."""

    def read(sources: list[DataSource]) -> LlavaDataset:
        return LlavaDataset(
            sources,
            None,
            processor,
            recipe.template,
            recipe.max_length,
            on_error=recipe.on_error,
            max_errors=recipe.max_errors,
            seed=recipe.seed,
            cache=recipe.cache,
        )

    train = read(recipe.sources())
    if isinstance(recipe.validation, float):
        return train.split(recipe.validation, recipe.seed)
    if recipe.validation is None:
        return train, None
    return train, read([recipe.validation_source()])


def _own_rates(recipe: Recipe) -> list[tuple[str, str, float]]:
    """(recipe key, module, learning rate) of each part of the model that has a rate of its own."""
    rates = [
        ("projector_learning_rate", stages.PROJECTOR, recipe.projector_learning_rate),
        ("vision_learning_rate", stages.TOWER, recipe.vision_learning_rate),
    ]
    return [(key, module, rate) for key, module, rate in rates if rate is not None]


class LlavaTrainer(Trainer):
    """transformers' Trainer for packed LLaVA batches."""

    def __init__(self, *, recipe: Recipe, made_from: dict[str, Any], progress: dict[str, Any], **kwargs: Any) -> None:
        base = kwargs["model"].get_base_model() if recipe.stage == "lora" else kwargs["model"]
        self.samples: LlavaDataset = kwargs["train_dataset"]
        self.validation: LlavaDataset | None = kwargs["eval_dataset"]
        arguments, n_filler = kwargs["args"], 0
        if arguments.world_size > 1:
            per_pass = arguments.world_size * arguments.per_device_train_batch_size
            kwargs["train_dataset"] = filled_up = FilledUp(self.samples, per_pass)
            n_filler = len(filled_up) - len(self.samples)
        super().__init__(**kwargs)
        # The Trainer has put use_cache=False in the config; do not save it, `compute_loss` passes it instead.
        vars(base.config).pop("use_cache", None)
        self.recipe = recipe
        self.made_from = made_from
        self.progress = progress
        self.vision_tower = base.model.vision_tower
        self.sampler = GroupedSampler(
            self.samples, recipe.group_by, recipe.per_device_batch_size, recipe.global_batch_size, recipe.seed, n_filler
        )
        self._n_tokens = 0
        self._eval_sums = torch.zeros(2)
        sharding = str(self.accelerator.distributed_type).rpartition(".")[2]
        self.sharding = sharding if sharding in ("FSDP", "DEEPSPEED") else "none"
        if progress and progress["sharding"] != self.sharding:
            raise RecipeError(f"resume: sharding is {self.sharding}, the checkpoint's was {progress['sharding']}")
        self._save_dtype: torch.dtype | None = None
        self.add_callback(_Hooks(self))

    # Data

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GroupedSampler:
        return self.sampler

    # Optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser; projector and vision tower get groups of their own if they have their own rates."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        trained, own = model or self.model, _own_rates(self.recipe)
        assert trained is not None
        parts = {
            id(parameter): part
            for name, parameter in trained.named_parameters()
            for part, module, _ in own
            if module in name.split(".")
        }
        # Groups at `learning_rate` come first: the Trainer logs the rate of the first group.
        optimizer.param_groups[:] = [
            {**group, "params": params, "lr": lr}
            for part, _, lr in [(None, "", self.recipe.learning_rate), *own]
            for group in optimizer.param_groups
            if (params := [parameter for parameter in group["params"] if parts.get(id(parameter)) == part])
        ]
        return optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # If resumed from the checkpoint of the last step, the Trainer would run one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def restore_progress(self) -> None:
        """Restore the sum of losses since the last log entry, which the Trainer does not save."""
        if self.progress:
            self._globalstep_last_logged = self.progress["logged_step"]
            self._tr_loss += self.progress["loss_since"]
            self._total_loss_scalar -= self.progress["loss_since"]  # train_loss covers only the steps of this call
            if self.progress["processes"] != self.args.world_size:
                logger.warning(
                    f"the checkpoint was written by {self.progress['processes']} process(es), this is a run of "
                    f"{self.args.world_size}: the order of samples is the same, dropout is not"
                )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss: a sum over this pack, divided by the number of supervised tokens of the whole optimiser step."""
        if self.recipe.vision_learning_rate is None:
            self.vision_tower.eval()  # the Trainer has just called model.train()
        self._n_tokens += inputs["input_ids"].numel()
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        # Filler samples at the end of an epoch have no labels: their loss and gradients are zero.
        return super().compute_loss(model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        dataset = self.validation if eval_dataset is None else eval_dataset
        if isinstance(dataset, LlavaDataset) and self.args.world_size > 1:
            dataset = FilledUp(dataset, self.args.world_size * self.args.per_device_eval_batch_size)
        return super().get_eval_dataloader(dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's loop, with the loss averaged over supervised tokens instead of batches."""
        self._eval_sums = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        assert output.metrics is not None
        loss, n_tokens = self.accelerator.reduce(self._eval_sums).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(n_tokens, 1)
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        one = torch.ones((), device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, use_cache=False, num_items_in_batch=one).loss.float()
        n_tokens = inputs["labels"][..., 1:].ne(-100).sum()
        self._eval_sums += torch.stack([loss, n_tokens.float()])
        return loss / n_tokens.clamp(min=1), None, None

    # Saving

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.recipe.output_dir / checkpoints.UNFINISHED)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """The Trainer's checkpoint, written in `.unfinished` and renamed once all processes have written."""
        step = self.state.global_step
        target = self.recipe.output_dir / f"checkpoint-{step}"
        progress = {
            "processes": self.args.world_size,
            "sharding": self.sharding,
            "logged_step": self._globalstep_last_logged,
            "loss_since": self.accelerator.reduce(self._tr_loss, "mean").item(),
        }
        unfinished = Path(self._get_output_dir()) / target.name
        with checkpoints.writing(target, unfinished):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.seal(unfinished, self.made_from, progress)
                checkpoints.publish(unfinished, target)
                checkpoints.rotate(self.recipe.output_dir, step, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The model's weights were already loaded in `prepare_model`; names on disk differ from those in memory.
        # Only FSDP loads its own sharded files.
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self._save_dtype is not None and self.args.should_save:
            assert self.model is not None
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {name: tensor.to("cpu", self._save_dtype) for name, tensor in state_dict.items()}
        super()._save(output_dir, state_dict)

    def save_result(self) -> None:
        """Write the trained model, in the recipe's dtype, and its processor, and move them to `output_dir`."""
        folder = Path(self._get_output_dir()) / "model"
        with checkpoints.writing(self.recipe.output_dir, folder):
            if self.args.should_save:  # a run that was killed between its last checkpoint and this has more than these
                checkpoints.rotate(self.recipe.output_dir, self.state.global_step, self.args.save_total_limit)
            if self.recipe.stage == "lora":
                adapter = folder / "adapter"
                self.save_model(str(adapter))
                if self.args.should_save:  # merge from the saved files, which do not depend on the sharding
                    merged = LlavaForConditionalGeneration.from_pretrained(adapter, dtype=torch.float32)
                    merged.to(stages.DTYPES[self.recipe.dtype]).save_pretrained(folder)
                    assert isinstance(self.processing_class, LlavaProcessor)
                    self.processing_class.save_pretrained(folder)
            else:
                self._save_dtype = stages.DTYPES[self.recipe.dtype]
                self.save_model(str(folder))
            if self.args.should_save:
                (folder / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
                self.state.save_to_json(str(folder / "trainer_state.json"))
                checkpoints.publish_model(folder, self.recipe.output_dir)
        self.accelerator.wait_for_everyone()

    # Reporting

    def close_progress_bar(self) -> None:
        """Close the progress bar, which the Trainer leaves open if training fails."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs:  # one schedule scales all learning rates
            scale = logs["learning_rate"] / self.recipe.learning_rate
            logs |= {key: rate * scale for key, _, rate in _own_rates(self.recipe)}
        super().log(logs, start_time)

    def counts(self) -> dict[str, int]:
        """Counts of the data files' rows, by name; see `rows.Report`."""
        counts = dict(self.samples.report.items())
        if self.validation is not None:
            counts |= {f"validation_{name}": n for name, n in self.validation.report.items()}
        return counts

    def count_tokens(self) -> int:
        """Tokens of this `train` call, over all devices."""
        n_tokens = torch.tensor(self._n_tokens, device=self.args.device)
        return int(self.accelerator.reduce(n_tokens))


class _Hooks(TrainerCallback):
    """Logs the sample counts at the start, and sets the sampler's epoch, also after a resume."""

    def __init__(self, trainer: LlavaTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.restore_progress()
        self.trainer.log(dict[str, float](self.trainer.counts()))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.sampler.epoch = int((state.epoch or 0) + 1e-6)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn errors about the recipe's files into a `RecipeError` of one line."""
    try:
        yield
    except RecipeError:
        raise
    except (ValueError, OSError) as error:
        raise RecipeError(" ".join(str(error).split())) from error
