"""The checkpoints that a run writes: one for each sparsity, layer by layer, with a log of committed layers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from orchestrator.config import PruneConfig
from orchestrator.output.staging import Staging
from orchestrator.tracking import Run
from slimllm_ops.checkpoint.commit_log import CommitLog
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import LayerPlan


@dataclass(frozen=True)
class Draft:
    """A checkpoint that a run writes layer by layer, and the log of its committed layers."""

    writer: CheckpointWriter
    log: CommitLog

    @classmethod
    def open(cls, source: Checkpoint, directory: Path, log: Path) -> "Draft":
        """Begin a checkpoint, or continue one."""
        return cls(CheckpointWriter(source, directory), CommitLog(log))

    def commit(self, plan: LayerPlan, state_TD: np.ndarray) -> None:
        """Write the next layer by its plan; `state_TD` holds the states of the probed tokens after it."""
        if not plan.dropped:
            self.writer.write_layer(len(self.log), plan, self.log.num_kept)
        self.log.commit(plan, state_TD)

    def commit_tensors(self, plan: LayerPlan, tensors: dict[str, Tensor], state_TD: np.ndarray) -> None:
        """Write the next layer's tensors, by their names in the layer; a dropped layer has none."""
        if not plan.dropped:
            self.writer.write_tensors(self.log.num_kept, tensors)
        self.log.commit(plan, state_TD)

    def finish(self) -> Checkpoint:
        """Write everything but the layers."""
        self.writer.finish(self.log.plans)
        return Checkpoint.open(self.writer.directory)


@dataclass(frozen=True)
class Target:
    """One checkpoint to write: its sparsity (None if the config has the paper's ratio), its drafts and its run.

    With refinement, the draft before it is temporary: it disappears when the run is done.
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
        """The directory of the checkpoint."""
        return self.final.writer.directory


@contextmanager
def open_targets(config: PruneConfig, staging: Staging, source: Checkpoint, run: Run) -> Iterator[list[Target]]:
    """Yield a target for each sparsity; a single one uses the run itself, each of several has a child run."""
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
    """Begin a target's checkpoint in a directory of the staging, or continue it."""
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
    """Return a target's name in paths, runs and the registry: its sparsity, or else the ratio."""
    if sparsity is None:
        return f"ratio-{config.ratio:g}"
    return f"sparsity-{sparsity:.2f}" if sparsity == round(sparsity, 2) else f"sparsity-{sparsity:g}"
