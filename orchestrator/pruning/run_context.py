"""What a run has at hand while it goes, and what it is to write."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from actors.errors import ShardError, WorkerLostError
from actors.group import ShardGroup
from actors.pool import SolverPool
from orchestrator.config import PruneConfig
from orchestrator.data import TokenBlocks
from orchestrator.inputs import Inputs
from orchestrator.output.staging import Staging
from orchestrator.progress import Reporter
from orchestrator.pruning.perplexity import evaluate
from orchestrator.record.mlflow import log_layer
from orchestrator.tracking import Run
from slimllm_ops.checkpoint.commit_log import CommitLog
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import LayerPlan

T = TypeVar("T")

# A stage that loses workers so often and commits nothing between would go on doing so.
MAX_LOSSES = 3


@dataclass(frozen=True)
class Job:
    """A run's inputs, workers and places."""

    config: PruneConfig
    inputs: Inputs
    shards: ShardGroup
    pool: SolverPool
    staging: Staging
    reporter: Reporter

    @property
    def source(self) -> Checkpoint:
        """The model that is pruned."""
        return self.inputs.source

    def survive(self, stage: Callable[[], T], committed: Callable[[], int] = lambda: 0) -> T:
        """Do what may lose workers; after a loss do it again with those that there are.

        A stage takes up what is committed, so that it goes on, and what it gives does not depend on losses.

        Args:
            stage: what is done; it opens its streams itself.
            committed: how much of it is committed.

        Raises:
            ShardError: workers were lost again and again with nothing committed between, or none is left.
        """
        losses, before = 0, committed()
        while True:
            try:
                return stage()
            except WorkerLostError as lost:
                losses, before = 1 if committed() > before else losses + 1, committed()
                if losses > MAX_LOSSES:
                    raise ShardError(f"{lost} It was the {losses}th loss with nothing solved between") from lost
                self.shards.lose()
                self.reporter.warn(f"{lost} The run goes on from what is solved, once it has workers again")

    def log_layer(self, run: Run, layer: int, plan: LayerPlan) -> None:
        """Log what became of a layer, once, and tell it to who looks closely."""
        if metrics := log_layer(run, self.source, layer, plan):
            told = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.reporter.detail(f"layer {layer}{', dropped' if plan.dropped else ''}: {told}")

    def dense_perplexity(self, blocks: TokenBlocks) -> float:
        """Return the dense model's perplexity, measured once for all targets."""
        return self.perplexity(self.source, blocks, "perplexity, dense", "dense")

    def perplexity(self, model: Checkpoint, blocks: TokenBlocks, stage: str, name: str) -> float:
        """Return a model's perplexity, measured once whatever becomes of the process; `name` names the model."""
        measured = self.staging.results.once(
            f"perplexity of {name} on {blocks.spec}, {blocks.digest}",
            lambda: self.survive(lambda: evaluate(self.shards, model, blocks, self.reporter, stage)),
        )
        return float(measured)


@dataclass(frozen=True)
class Draft:
    """A checkpoint as it is written, layer by layer, and the log of what is."""

    writer: CheckpointWriter
    log: CommitLog

    @classmethod
    def open(cls, source: Checkpoint, directory: Path, log: Path) -> "Draft":
        """Begin a checkpoint, or go on with it."""
        return cls(CheckpointWriter(source, directory), CommitLog(log))

    def commit(self, plan: LayerPlan, state_TD: np.ndarray) -> None:
        """Write the next layer by its plan; `state_TD` is what it leaves of the tokens that are followed."""
        if not plan.dropped:
            self.writer.write_layer(len(self.log), plan, self.log.num_kept)
        self.log.commit(plan, state_TD)

    def commit_tensors(self, plan: LayerPlan, tensors: dict[str, Tensor], state_TD: np.ndarray) -> None:
        """Write the next layer's tensors, by their names in it; none where the layer is dropped."""
        if not plan.dropped:
            self.writer.write_tensors(self.log.num_kept, tensors)
        self.log.commit(plan, state_TD)

    def finish(self) -> Checkpoint:
        """Write everything but the layers."""
        self.writer.finish(self.log.plans)
        return Checkpoint.open(self.writer.directory)


@dataclass(frozen=True)
class Target:
    """One checkpoint to write: its sparsity (None where the paper's ratio was given), its place and its run.

    Where the model is refined, that which is refined is written elsewhere, and goes when the run is done.
    """

    sparsity: float | None
    run: Run
    pruned: Draft
    refined: Draft | None = None

    @property
    def final(self) -> Draft:
        """The checkpoint that stays."""
        return self.refined or self.pruned

    @property
    def directory(self) -> Path:
        """Where it is written."""
        return self.final.writer.directory


@contextmanager
def open_targets(config: PruneConfig, staging: Staging, source: Checkpoint, run: Run) -> Iterator[list[Target]]:
    """Give every sparsity a directory and a run: the run itself for one, a child of it for each of several."""
    sparsities: Sequence[float | None] = config.targets
    if len(sparsities) == 1:
        yield [open_target(sparsities[0], staging.directory, run, source, staging, config.refine)]
        return
    with ExitStack() as stack:
        targets = []
        for sparsity in sparsities:
            directory = staging.directory / target_name(sparsity, config)
            child = stack.enter_context(run.child(directory.name, directory / "pruning" / "metrics.jsonl"))
            targets.append(open_target(sparsity, directory, child, source, staging, config.refine))
        yield targets


def open_target(
    sparsity: float | None, directory: Path, run: Run, source: Checkpoint, staging: Staging, refine: bool
) -> Target:
    """Begin a target's checkpoint in a directory of the staging, or go on with it."""
    work = staging.solved / directory.relative_to(staging.directory)
    if not refine:
        return Target(sparsity, run, Draft.open(source, directory, work / "pruned.log"))
    return Target(
        sparsity,
        run,
        pruned=Draft.open(source, work / "pruned", work / "pruned.log"),
        refined=Draft.open(source, directory, work / "refined.log"),
    )


def target_name(sparsity: float | None, config: PruneConfig) -> str:
    """Return what a target is called in paths, runs and the registry: by its sparsity, or else the ratio."""
    if sparsity is None:
        return f"ratio-{config.ratio:g}"
    return f"sparsity-{sparsity:.2f}" if sparsity == round(sparsity, 2) else f"sparsity-{sparsity:g}"
