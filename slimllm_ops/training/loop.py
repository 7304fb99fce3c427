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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from slimllm_ops.errors import InputError
from slimllm_ops.training.job import Session, TrainingJob
from slimllm_ops.training.losses import IGNORED, cross_entropy
from slimllm_ops.training.outcome import LOSS, STEP
from slimllm_ops.training.sequences import Sequences, stacked
from slimllm_ops.training.student import read_student, read_teacher

TEACHER_LOSS = "teacher_loss"
# What a checkpoint of the trainer says of its steps.
STATE = "trainer_state.json"
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
    latest = session.latest()
    if latest is not None and _is_over(state := TrainerState.load_from_json(str(latest / STATE)), job):
        return _ended(state, job, None)
    # Of transformers about its own names, from peft.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    teacher = None if job.teacher is None else read_teacher(job.teacher, job)
    with TemporaryDirectory() as folder:
        trainer = TuningTrainer(job, session, read_student(job), teacher, Path(folder))
        if job.sharded and not trainer.is_fsdp_enabled:
            raise InputError("the parameters cannot be sharded here, since FSDP needs GPUs: leave fsdp out")
        trainer.train(resume_from_checkpoint=None if latest is None else str(latest))
    return _ended(trainer.state, job, trainer.diverged_at)


def _ended(state: TrainerState, job: TrainingJob, diverged_at: int | None) -> dict[str, Any]:
    """Return what an `Outcome` says of a training, besides its checkpoints."""
    return {
        "steps": state.global_step,
        "losses": _validation_losses(state),
        "teacher_loss": next((entry[TEACHER_LOSS] for entry in state.log_history if TEACHER_LOSS in entry), None),
        "diverged_at": diverged_at,
        "peak_memory": torch.cuda.max_memory_allocated() if job.on_gpu else None,
    }


def _is_over(state: TrainerState, job: TrainingJob) -> bool:
    """Return whether all steps are done, or the last evaluations were no better than one before them."""
    losses = _validation_losses(state)
    best = min(losses, key=lambda step: losses[step])
    return state.global_step >= job.steps or sum(step > best for step in losses) >= job.patience


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
            data_collator=stacked,
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
            read = self._prepare_inputs(stacked([sequences[index % len(sequences)]]))
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
        if _is_over(state, self._job):
            control.should_training_stop = True

    def _rate(self, step: int) -> float:
        """Return the tokens per second since the last call, padding included."""
        now, (before, first) = time.perf_counter(), self._told
        self._told = (now, step)
        length = self._trainer.sequences[0]["input_ids"].numel()
        return (step - first) * self._job.batch_size * length / max(now - before, 1e-9)


# The values in the trainer's log that we record.
_TOLD = ("loss", "learning_rate", "grad_norm", LOSS, TEACHER_LOSS, "gpu_memory_bytes")


def _validation_losses(state: TrainerState) -> dict[int, float]:
    """Return the validation loss of each step that was evaluated."""
    return {int(entry["step"]): entry[LOSS] for entry in state.log_history if LOSS in entry}


def _without_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


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
