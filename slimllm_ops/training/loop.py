"""Trains a model with transformers' `Trainer`: gradient accumulation, data parallelism and resuming are its own.

    run_training        read the models and the data, train, and return how it ended
    TuningTrainer       the trainer, with our losses and an evaluation that is the same for any number of workers
    Watching            what happens after each step: metrics, checkpoints, early stopping

The loss of a step is the sum over the tokens that count in all workers' sequences, divided by their number. So a step
does not depend on how many workers share it.

Shapes: b sequences of T tokens.
"""

import math
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from slimllm_ops.errors import InputError
from slimllm_ops.stream.padding import PADDING
from slimllm_ops.training.job import LoRA, Session, TrainingJob, read_data
from slimllm_ops.training.losses import IGNORED, cross_entropy
from slimllm_ops.training.outcome import LOSS, STEP

TEACHER_LOSS = "teacher_loss"
WARM_UP = 0.1
LARGEST_GRADIENT = 1.0


def run_training(job: TrainingJob, session: Session) -> dict[str, Any]:
    """Train a job's student; return what an `Outcome` says besides its checkpoints.

    Args:
        job: The job.
        session: Where metrics and checkpoints go, and what to continue from.
    """
    torch.set_num_threads(job.threads)
    disable_progress_bar()
    # Of transformers about its own names, from peft.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    teacher = None if job.teacher is None else _read_model(job.teacher, job).requires_grad_(False).eval()
    with TemporaryDirectory() as folder:
        trainer = TuningTrainer(job, session, _student(job), teacher, Path(folder))
        if job.sharded and not trainer.is_fsdp_enabled:
            raise InputError("the parameters cannot be sharded here, since FSDP needs GPUs: leave fsdp out")
        latest = session.latest()
        trainer.train(resume_from_checkpoint=None if latest is None else str(latest))
    history = trainer.state.log_history
    return {
        "steps": trainer.state.global_step,
        "losses": _validation_losses(trainer.state),
        "teacher_loss": next((entry[TEACHER_LOSS] for entry in history if TEACHER_LOSS in entry), None),
        "diverged_at": trainer.diverged_at,
        "peak_memory": torch.cuda.max_memory_allocated() if job.on_gpu else None,
    }


def _student(job: TrainingJob) -> nn.Module:
    """Return the model to train: all of it, or its adapters."""
    model = _read_model(job.student, job)
    if job.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model if job.lora is None else add_adapters(model, job.lora, job.seed)


def add_adapters(model: PreTrainedModel, lora: LoRA, seed: int) -> nn.Module:
    """Return a model with untrained adapters, whose other parameters are frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.modules), bias="none", task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def _read_model(directory: Path, job: TrainingJob) -> PreTrainedModel:
    """Return a model: in float32 if all its parameters are trained or the worker has no GPU, else in bfloat16."""
    whole = job.lora is None and directory == job.student
    dtype = torch.bfloat16 if job.on_gpu and not whole else torch.float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False)
    model.config.use_cache = False
    # The trainer moves the student.
    return cast(PreTrainedModel, nn.Module.to(model, "cuda")) if job.on_gpu and directory == job.teacher else model


class Sequences(Dataset):
    """The sequences of a data set's folder, as the trainer reads them."""

    def __init__(self, folder: Path) -> None:
        self._ids_BT, self._counted_BT = read_data(folder)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._ids_BT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sequence: its ids, its mask and its labels (T)."""
        ids_T, counted_T = self._ids_BT[index], self._counted_BT[index]
        held_T = ids_T != PADDING
        read = {
            "input_ids": np.where(held_T, ids_T, 0),
            "attention_mask": held_T,
            "labels": np.where(counted_T, ids_T, IGNORED),
        }
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in read.items()}


class TuningTrainer(Trainer):
    """Transformers' trainer with the loss of a job.

    Attributes:
        diverged_at: The step whose loss was not finite; None if all were.
    """

    def __init__(
        self, job: TrainingJob, session: Session, student: nn.Module, teacher: nn.Module | None, folder: Path
    ) -> None:
        self._job, self._session, self._teacher = job, session, teacher
        self.diverged_at: int | None = None
        self.sequences, self._held_out = Sequences(job.data), Sequences(job.validation)
        super().__init__(
            model=student,
            args=_arguments(job, session.world_size, folder),
            train_dataset=self.sequences,
            eval_dataset=self._held_out,
            data_collator=_stacked,
            callbacks=[Watching(job, session, self)],
        )
        self.remove_callback(PrinterCallback)
        # The loss is divided by the tokens of the whole step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch; those of a step, averaged over the workers, add up to the step's loss."""
        assert num_items_in_batch is not None, "the trainer counts the tokens of each step"
        labels_bT, read = inputs["labels"], _without_labels(inputs)
        teacher_bTV = None
        if self._teacher is not None:
            with torch.no_grad():
                teacher_bTV = self._teacher(**read, use_cache=False).logits
        total = self._job.loss(model(**read, use_cache=False).logits, teacher_bTV, labels_bT)
        return total * self._session.world_size / num_items_in_batch

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """Return the mean loss per held-out token, in nats, of the student and, at first, of the teacher."""
        metrics = {LOSS: self._validation_loss(self.model_wrapped)}
        if self._teacher is not None and self.state.global_step == 0:
            metrics[TEACHER_LOSS] = self._validation_loss(self._teacher)
        if self.args.device.type == "cuda":
            metrics["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _validation_loss(self, model: nn.Module) -> float:
        sequences = self._held_out
        training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        # Every worker makes as many passes, since those of a sharded model wait for each other.
        for first in range(0, len(sequences), self._session.world_size):
            index = first + self._session.rank
            read = self._prepare_inputs(_stacked([sequences[index % len(sequences)]]))
            with self.compute_loss_context_manager():
                logits = model(**_without_labels(read), use_cache=False).logits
            if index < len(sequences):
                counted = (read["labels"][:, 1:] != IGNORED).sum()
                total += torch.stack([cross_entropy(logits, None, read["labels"]), counted]).double().cpu()
        model.train(training)
        summed = self.accelerator.reduce(total.to(self.args.device), reduction="sum")
        return float(summed[0] / summed[1])


class Watching(TrainerCallback):
    """Passes a trainer's metrics and checkpoints on, and ends the training when the validation loss stops falling."""

    def __init__(self, job: TrainingJob, session: Session, trainer: TuningTrainer) -> None:
        self._job, self._session, self._trainer = job, session, trainer
        self._told = (time.perf_counter(), 0)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        """Record the metrics of a step; end the training if one is not finite, as it is in every worker."""
        metrics = {name: float(value) for name, value in named["logs"].items() if name in _TOLD}
        if not all(map(math.isfinite, metrics.values())):
            self._trainer.diverged_at = self._trainer.diverged_at or state.global_step
            control.should_training_stop = True
        if "loss" in metrics:
            metrics["tokens_per_second"] = self._rate(state.global_step)
        if metrics and self._session.rank == 0:
            self._session.log(state.global_step, metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        """Keep a checkpoint, and end the training if the last ones were no better."""
        if self._trainer.diverged_at is not None:
            return
        losses, folder = _validation_losses(state), get_last_checkpoint(args.output_dir)
        assert folder is not None, "the trainer has just written one"
        self._session.save(Path(folder), {STEP: state.global_step, LOSS: losses[state.global_step]})
        best = min(losses, key=lambda step: losses[step])
        if sum(step > best for step in losses) >= self._job.patience:
            control.should_training_stop = True

    def _rate(self, step: int) -> float:
        """Return the tokens per second since the last call, padding included."""
        now, (before, first) = time.perf_counter(), self._told
        self._told = (now, step)
        length = self._trainer.sequences[0]["input_ids"].numel()
        return (step - first) * self._job.batch_size * length / max(now - before, 1e-9)


# What is recorded of what the trainer logs.
_TOLD = ("loss", "learning_rate", "grad_norm", LOSS, TEACHER_LOSS, "gpu_memory_bytes")


def _validation_losses(state: TrainerState) -> dict[int, float]:
    """Return the validation loss of each step that was evaluated."""
    return {int(entry["step"]): entry[LOSS] for entry in state.log_history if LOSS in entry}


def _without_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _stacked(sequences: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return sequences as a batch, without the places that are padding in all of them."""
    longest = max(int(one["attention_mask"].sum()) for one in sequences)
    return {name: torch.stack([one[name][:longest] for one in sequences]) for name in sequences[0]}


def _arguments(job: TrainingJob, world_size: int, folder: Path) -> TrainingArguments:
    """Return the trainer's own settings."""
    sharding: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if job.sharded else {}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=job.steps,
        per_device_train_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=job.batch_size // (job.micro_batch_size * world_size),
        learning_rate=job.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(WARM_UP * job.steps),
        weight_decay=0.0,
        max_grad_norm=LARGEST_GRADIENT,
        average_tokens_across_devices=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=job.evaluate_every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=job.evaluate_every,
        save_total_limit=1,
        seed=job.seed,
        bf16=job.on_gpu,
        use_cpu=not job.on_gpu,
        **sharding,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=job.on_gpu,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
