"""A run's context: its settings, inputs, workers and places, and how it survives lost workers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from actors.group import ShardGroup
from actors.pool import SolverPool
from actors.workers import Workers, solve_threads
from cluster import Resources, WorkerPlan, find_room
from orchestrator.config import PruneConfig
from orchestrator.data import TokenBlocks
from orchestrator.evaluation.asking import Ask
from orchestrator.evaluation.results import TaskAnswers
from orchestrator.inputs import Inputs
from orchestrator.output.staging import Staging
from orchestrator.progress import Reporter
from orchestrator.pruning.attempts import Attempt, attempts
from orchestrator.pruning.backends import Backend, Growing
from orchestrator.pruning.perplexity import measure_once
from orchestrator.record.mlflow import log_layer
from orchestrator.tracking import Run
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.whole import inspect_whole
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.stream.memory import return_large_blocks


@dataclass(frozen=True)
class RunContext:
    """A run's settings, inputs, workers and places; `ask` asks a model the run's tasks, if there are any."""

    config: PruneConfig
    inputs: Inputs
    shards: ShardGroup
    pool: SolverPool
    staging: Staging
    reporter: Reporter
    ask: Ask | None = None

    @property
    def source(self) -> Checkpoint:
        """The dense model."""
        return self.inputs.source

    def attempts(self, committed: Callable[[], int] = lambda: 0) -> Iterator[Attempt]:
        """Yield attempts at a stage until one keeps all its workers; see `orchestrator.pruning.attempts`."""
        return attempts(self.shards, self.reporter, committed)

    def log_layer(self, run: Run, layer: int, plan: LayerPlan) -> None:
        """Log a layer's decisions once; print them in a verbose run."""
        if metrics := log_layer(run, self.source, layer, plan):
            values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.reporter.detail(f"layer {layer}{', dropped' if plan.dropped else ''}: {values}")

    def dense_perplexity(self, blocks: TokenBlocks) -> float:
        """Return the dense model's perplexity, measured once for all targets."""
        return self.perplexity(self.source, blocks, "perplexity, dense", "dense")

    def perplexity(self, model: Checkpoint, blocks: TokenBlocks, stage: str, name: str) -> float:
        """Return a model's perplexity; a resumed run does not measure it again (see `perplexity.measure_once`)."""
        return measure_once(self.shards, self.staging, self.reporter, model, blocks, stage, name)

    def dense_answers(self) -> list[TaskAnswers]:
        """Return the dense model's answers to the run's tasks, asked once for all targets."""
        return self.answers(self.source, "dense")

    def answers(self, model: Checkpoint, name: str) -> list[TaskAnswers]:
        """Return a model's answers to the run's tasks; a resumed run does not ask again."""
        ask = self.ask
        if ask is None:
            return []
        noted = self.staging.results.once(
            f"answers of {name}",
            lambda: [asdict(one) for one in ask(self.shards, inspect_whole(model.directory), name, self.reporter)],
        )
        return [TaskAnswers(**one) for one in noted]


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


def tell_resumed(resume: bool, staging: Staging, reporter: Reporter) -> None:
    """Report whether a run that should resume has anything to resume."""
    if resume:
        found = "continuing from earlier results" if staging.resumed else "there is nothing to resume: starting"
        reporter.note(f"{found} ({staging.directory})")


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
    with open_shards(backend, resources, plan, staging, reporter, offload=config.offload) as (workers, shards):
        pool = SolverPool(workers, shards.deliver(inputs.source), solve_threads(plan.cpus_per_worker))
        yield RunContext(config, inputs, shards, pool, staging, reporter)


@contextmanager
def open_shards(
    backend: Backend, resources: Resources, plan: WorkerPlan, staging: Staging, reporter: Reporter, *, offload: bool
) -> Iterator[tuple[Workers, ShardGroup]]:
    """Hold workers, as many as the cluster has room for, and the group of their shards."""
    return_large_blocks()
    with (
        backend.workers(plan, find_room(resources, plan), note=reporter.note) as (workers, deliver),
        ShardGroup(
            workers,
            plan.num_workers,
            deliver=deliver,
            note=reporter.note,
            offload=offload,
            settle=staging.settled.once,
        ) as shards,
    ):
        yield workers, shards
