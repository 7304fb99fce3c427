"""A run's context: its settings, inputs, workers and places, and how it survives lost workers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType

from actors.errors import ShardError, WorkerLostError
from actors.group import ShardGroup
from actors.pool import SolverPool
from actors.workers import solve_threads
from cluster import Resources, WorkerPlan, find_room
from orchestrator.config import PruneConfig
from orchestrator.data import TokenBlocks
from orchestrator.inputs import Inputs
from orchestrator.output.staging import Staging
from orchestrator.progress import Reporter
from orchestrator.pruning.backends import Backend, Growing
from orchestrator.pruning.perplexity import evaluate
from orchestrator.record.mlflow import log_layer
from orchestrator.tracking import Run
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.stream.memory import return_large_blocks

# A stage that loses workers more often than this, and commits nothing in between, ends the run.
MAX_LOSSES = 3


@dataclass
class Attempt:
    """One attempt at a stage: a context manager that catches the loss of a worker, and keeps it."""

    loss: WorkerLostError | None = field(default=None, init=False)

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, WorkerLostError):
            return False
        self.loss = error
        return True


@dataclass(frozen=True)
class RunContext:
    """A run's settings, inputs, workers and places."""

    config: PruneConfig
    inputs: Inputs
    shards: ShardGroup
    pool: SolverPool
    staging: Staging
    reporter: Reporter

    @property
    def source(self) -> Checkpoint:
        """The dense model."""
        return self.inputs.source

    def attempts(self, committed: Callable[[], int] = lambda: 0) -> Iterator[Attempt]:
        """Yield attempts at a stage until one keeps all its workers.

            for attempt in context.attempts(log.__len__):
                with attempt:
                    ...  # open the streams and continue after the last commit

        Args:
            committed: Returns how much of the stage is committed.

        Raises:
            ShardError: Workers were lost more than `MAX_LOSSES` times with no commit in between, or none is left.
        """
        losses, before = 0, committed()
        while True:
            attempt = Attempt()
            yield attempt
            if (loss := attempt.loss) is None:
                return
            losses, before = 1 if committed() > before else losses + 1, committed()
            if losses > MAX_LOSSES:
                raise ShardError(f"{loss} It was the {losses}th loss with nothing solved between") from loss
            self.shards.lose()
            self.reporter.warn(f"{loss} The run continues from earlier results once it has workers again")

    def log_layer(self, run: Run, layer: int, plan: LayerPlan) -> None:
        """Log a layer's decisions once; print them in a verbose run."""
        if metrics := log_layer(run, self.source, layer, plan):
            values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.reporter.detail(f"layer {layer}{', dropped' if plan.dropped else ''}: {values}")

    def dense_perplexity(self, blocks: TokenBlocks) -> float:
        """Return the dense model's perplexity, measured once for all targets."""
        return self.perplexity(self.source, blocks, "perplexity, dense", "dense")

    def perplexity(self, model: Checkpoint, blocks: TokenBlocks, stage: str, name: str) -> float:
        """Return a model's perplexity; a resumed run does not measure it again.

        Args:
            model: The model.
            blocks: Held-out blocks.
            stage: The name of the pass in progress lines.
            name: The model's name in the staging's results.
        """

        def measure() -> float:
            for attempt in self.attempts():
                with attempt:
                    perplexity = evaluate(self.shards, model, blocks, self.reporter, stage)
            return perplexity

        return float(self.staging.results.once(f"perplexity of {name} on {blocks.spec}, {blocks.digest}", measure))


@contextmanager
def open_session(backend: Backend, staging: Staging, reporter: Reporter) -> Iterator[Resources]:
    """Connect to a run's cluster; one that scales itself grows if it has no room for the run.

    Raises:
        ClusterError: The cluster cannot be reached.
    """
    settled = staging.settled.get("workers")
    growing = Growing(settled and WorkerPlan(**settled), reporter.note)
    with backend.session(verbose=reporter.verbose, growing=growing) as resources:
        yield resources


def settle_workers(backend: Backend, resources: Resources, staging: Staging) -> WorkerPlan:
    """Return the workers of a run; a resumed run keeps the plan that it began with, on any cluster.

    Raises:
        ClusterError: The cluster has less than the config asks for.
    """
    settled = WorkerPlan(**staging.settled.once("workers", lambda: asdict(backend.plan_workers(resources))))
    return replace(settled, weights_travel=backend.weights_travel(resources))


@contextmanager
def open_context(
    backend: Backend,
    resources: Resources,
    plan: WorkerPlan,
    config: PruneConfig,
    inputs: Inputs,
    staging: Staging,
    reporter: Reporter,
) -> Iterator[RunContext]:
    """Hold a run's workers, as many as the cluster has room for; they start with their first stream."""
    return_large_blocks()
    with (
        backend.workers(plan, find_room(resources, plan), note=reporter.note) as (workers, deliver),
        ShardGroup(
            workers,
            plan.num_workers,
            deliver=deliver,
            note=reporter.note,
            offload=config.offload,
            settle=staging.settled.once,
        ) as shards,
    ):
        pool = SolverPool(workers, deliver(inputs.source), solve_threads(plan.cpus_per_worker))
        yield RunContext(config, inputs, shards, pool, staging, reporter)
