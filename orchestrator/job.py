"""What a run has at hand while it goes, and what it is to write."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from actors.group import ShardGroup
from actors.pool import SolverPool
from orchestrator.config import PruneConfig
from orchestrator.data import TokenBlocks
from orchestrator.evaluation import evaluate
from orchestrator.inputs import Inputs
from orchestrator.progress import Reporter
from orchestrator.tracking import Run
from slimllm_ops.checkpoint import Checkpoint
from slimllm_ops.writer import CheckpointWriter


@dataclass(frozen=True)
class Job:
    """A run's inputs, workers and places."""

    config: PruneConfig
    inputs: Inputs
    shards: ShardGroup
    pool: SolverPool
    staging: Path
    reporter: Reporter
    _dense: dict[str, float] = field(default_factory=dict)

    def dense_perplexity(self, blocks: TokenBlocks) -> float:
        """Return the dense model's perplexity, measured once for all targets."""
        if blocks.spec not in self._dense:
            self._dense[blocks.spec] = evaluate(self.shards, self.source, blocks, self.reporter, "perplexity, dense")
        return self._dense[blocks.spec]

    @property
    def source(self) -> Checkpoint:
        """The model that is pruned."""
        return self.inputs.source


@dataclass(frozen=True)
class Target:
    """One checkpoint to write: its sparsity (None where the paper's ratio was given), its place and its run."""

    sparsity: float | None
    directory: Path
    run: Run
    writer: CheckpointWriter


@dataclass(frozen=True)
class Probe:
    """Some tokens' ids (T,) and hidden states (T, D) before the first pruned layer and after each."""

    ids_T: np.ndarray
    states_TD: list[np.ndarray]


@contextmanager
def open_targets(
    sparsities: Sequence[float | None], staging: Path, source: Checkpoint, run: Run
) -> Iterator[list[Target]]:
    """Give every sparsity a directory and a run: the run itself for one, a child of it for each of several."""
    if len(sparsities) == 1:
        yield [Target(sparsities[0], staging, run, CheckpointWriter(source, staging))]
        return
    with ExitStack() as stack:
        targets = []
        for sparsity in sparsities:
            assert sparsity is not None, "a ratio is one target"
            name = target_name(sparsity)
            directory = staging / name
            child = stack.enter_context(run.child(name, directory / "pruning" / "metrics.jsonl"))
            targets.append(Target(sparsity, directory, child, CheckpointWriter(source, directory)))
        yield targets


def target_name(sparsity: float) -> str:
    """Return what a target is called in paths and runs."""
    return f"sparsity-{sparsity:.2f}" if sparsity == round(sparsity, 2) else f"sparsity-{sparsity:g}"
