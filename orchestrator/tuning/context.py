"""The context of a training: its settings, inputs, machines and places; and how its models are measured."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from actors.group import ShardGroup
from cluster import Resources, WorkerPlan
from orchestrator.data.blocks import TokenBlocks
from orchestrator.output.staging import Staging
from orchestrator.progress import Reporter
from orchestrator.pruning.backends import Backend
from orchestrator.pruning.perplexity import measure_once
from orchestrator.pruning.run_context import open_shards
from orchestrator.tracking import Run
from orchestrator.tuning.config import TuneConfig
from orchestrator.tuning.inputs import TuneInputs
from slimllm_ops.checkpoint.reading import Checkpoint


@dataclass(frozen=True)
class Measured:
    """Perplexities on a text: of the dense model (None if it takes no part), before the training, and after it."""

    dense: float | None
    before: float
    after: float

    def losses(self) -> tuple[float | None, float, float]:
        """Return the losses in nats per token."""
        return None if self.dense is None else math.log(self.dense), math.log(self.before), math.log(self.after)


@dataclass(frozen=True)
class TuneContext:
    """A training's settings, inputs, machines and places."""

    config: TuneConfig
    inputs: TuneInputs
    backend: Backend
    resources: Resources
    workers: WorkerPlan
    staging: Staging
    run: Run
    reporter: Reporter

    @property
    def alone(self) -> bool:
        """Whether Ray ends with this program, or there is none."""
        return self.config.local or self.resources.local

    @contextmanager
    def shards(self) -> Iterator[ShardGroup]:
        """Hold workers that pass a model layer by layer."""
        arguments = (self.backend, self.resources, self.workers, self.staging, self.reporter)
        with open_shards(*arguments, offload=self.config.offload) as (_, shards):
            yield shards

    def measure(self, shards: ShardGroup, written: Checkpoint, blocks: TokenBlocks) -> Measured:
        """Measure the models on a text; a resumed run measures none again."""
        inputs = self.inputs

        def perplexity(name: str, model: Checkpoint, digest: str | None) -> float:
            stage, known_as = f"perplexity, {name}", f"{name} {digest}"
            return measure_once(shards, self.staging, self.reporter, model, blocks, stage, known_as)

        dense = None if inputs.dense is None else perplexity("dense", inputs.dense, inputs.dense_digest)
        before = perplexity("before", inputs.checkpoint, inputs.digest)
        return Measured(dense, before, perplexity("after", written, written.digest()))

    def measure_held_out(self, shards: ShardGroup) -> dict[str, Measured]:
        """Measure the models, the written one among them, on each held-out text."""
        written = Checkpoint.open(self.staging.directory)
        return {blocks.spec: self.measure(shards, written, blocks) for blocks in self.inputs.held_out}
