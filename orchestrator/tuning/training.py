"""Trains a checkpoint as a whole, by `distil`, `lora` or `full`: builds the job, runs it, and shows its progress."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from cluster import WorkerPlan
from orchestrator.config import ConfigError
from orchestrator.progress import Reporter
from orchestrator.tuning.config import DISTIL, TuneConfig
from orchestrator.tuning.context import TuneContext
from orchestrator.tuning.inputs import TuneInputs
from slimllm_ops.decide.plan import LayerPlan, Plan
from slimllm_ops.errors import InputError
from slimllm_ops.models.families import Branch
from slimllm_ops.training.job import LoRA, TrainingJob, write_data
from slimllm_ops.training.local import Tell, fit_here
from slimllm_ops.training.losses import cross_entropy, divergence
from slimllm_ops.training.outcome import LOSS, Outcome

# How many evaluations a training has, if their distance is not given.
EVALUATIONS = 10
# The folders of the data.
DATA, VALIDATION = "data", "validation"


def train(context: TuneContext) -> Outcome:
    """Train the checkpoint; continue if the staging has an unfinished training.

    Raises:
        ConfigError: The batch cannot be shared by the workers.
        InputError: Nothing can be trained.
        ShardError: Workers were lost too often.
    """
    # Workers have other working directories.
    workers, folder = context.workers, context.staging.solved.absolute() / "training"
    # Only checkpoints are results.
    job = _job(context.config, context.inputs, context.staging.work.absolute() / "data", workers)
    with _watched(job, context) as tell:
        if context.config.local:
            return fit_here(job, folder / "checkpoints", tell)
        # Imports Ray Train, which takes seconds.
        from actors.training import Share, fit_on_ray

        share = Share(workers.num_workers, workers.cpus_per_worker, workers.gpus_per_worker)
        return fit_on_ray(job, folder, tell, share, alone=context.alone)


def _job(config: TuneConfig, inputs: TuneInputs, folder: Path, workers: WorkerPlan) -> TrainingJob:
    """Return the job, after writing its data."""
    for name, examples in ((DATA, inputs.data), (VALIDATION, inputs.validation)):
        write_data(folder / name, examples.input_ids_BT, examples.counted_BT)
    steps = config.steps_for(len(inputs.data.input_ids_BT))
    return TrainingJob(
        student=inputs.checkpoint.directory,
        teacher=None if inputs.teacher is None else inputs.teacher.directory,
        loss=divergence if config.method == DISTIL else cross_entropy,
        lora=LoRA(config.rank, config.alpha, trained_modules(inputs)) if config.with_adapters else None,
        data=folder / DATA,
        validation=folder / VALIDATION,
        steps=steps,
        batch_size=shared_batch(config, workers.num_workers),
        micro_batch_size=config.micro_batch_size,
        learning_rate=config.peak_learning_rate,
        evaluate_every=config.evaluate_every or max(1, steps // EVALUATIONS),
        patience=config.patience,
        seed=config.seed % (1 << 32),
        on_gpu=workers.gpus_per_worker > 0,
        gradient_checkpointing=config.gradient_checkpointing,
        sharded=config.fsdp,
        threads=workers.cpus_per_worker,
    )


def shared_batch(config: TuneConfig, num_workers: int) -> int:
    """Return the sequences of a step.

    Raises:
        ConfigError: The workers cannot share them equally.
    """
    batch, at_once = config.sequences_per_step, config.micro_batch_size
    if batch % (num_workers * at_once):
        raise ConfigError(
            f"batch_size {batch} cannot be shared by {num_workers} workers with {at_once} sequences at once: pass a "
            f"multiple of {num_workers * at_once}, or other --workers"
        )
    return batch


def trained_modules(inputs: TuneInputs) -> tuple[str, ...]:
    """Return the full names of the projections that were pruned; of all projections without a plan.

    Raises:
        InputError: There is none that takes adapters.
    """
    checkpoint = inputs.checkpoint
    attention, mlp = checkpoint.family.branches
    layers = _kept_layers(inputs.plan) if inputs.plan else [None] * checkpoint.num_layers
    names = []
    for number, layer in enumerate(layers):
        for branch, decision in ((attention, layer and layer.attention), (mlp, layer and layer.mlp)):
            if layer is None or decision is not None:
                names += [checkpoint.layer_prefix(number) + name for name in _projections(branch)]
    if not names:
        raise InputError(
            f"no projection of {checkpoint.directory} was pruned that takes LoRA's adapters (experts take none): "
            f"pass --full with --method {DISTIL}, or --method full"
        )
    return tuple(names)


def _kept_layers(plan: Plan) -> list[LayerPlan | None]:
    return [layer for layer in plan.layers if not layer.dropped]


def _projections(branch: Branch) -> list[str]:
    """Return the names of a branch's linear maps, relative to the layer."""
    return [] if branch.has_experts else [*branch.inputs, branch.output]


@contextmanager
def _watched(job: TrainingJob, context: TuneContext) -> Iterator[Tell]:
    """Yield what takes the metrics of each step: it logs them once, and moves the progress on."""
    data, run, reporter = context.inputs.data, context.run, context.reporter
    tokens = job.batch_size * data.num_tokens // len(data.input_ids_BT)
    progress = _Progress(reporter, job.steps, tokens)

    def tell(step: int, metrics: dict[str, float]) -> None:
        # A step that is done again after a loss of workers gives the same metrics again.
        if step > progress.reached or LOSS in metrics:
            if step not in run.logged_steps:
                run.log_metrics(metrics, step=step)
            progress.reach(step)
        if LOSS in metrics:
            reporter.detail(f"step {step}: held-out loss {metrics[LOSS]:.4f}")

    with closing(progress):
        yield tell


class _Progress:
    """The progress of a training.

    Attributes:
        reached: The last step that was done.
    """

    def __init__(self, reporter: Reporter, steps: int, tokens: int) -> None:
        self._reporter, self._steps, self._tokens = reporter, steps, tokens
        self._shown: Generator[int] | None = None
        self.reached = 0

    def reach(self, step: int) -> None:
        """Show that a step is done; the first step that is told is the first of this attempt."""
        if self._shown is None and step:
            self._shown = self._reporter.steps("training", "step", self._steps, self._tokens, first=step - 1)
            next(self._shown)
            self.reached = step - 1
        while self._shown is not None and self.reached < step:
            next(self._shown, None)
            self.reached += 1

    def close(self) -> None:
        """End the display."""
        if self._shown is not None:
            self._shown.close()
