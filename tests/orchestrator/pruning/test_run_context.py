"""A stage that loses workers is retried as long as it commits something between losses."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from actors.errors import ShardError, WorkerLostError
from actors.group import ShardGroup
from actors.local import LocalWorkers
from actors.pool import SolverPool
from cluster import ClusterError, Node, Resources, WorkerPlan
from orchestrator import PruneConfig
from orchestrator.inputs import Inputs, load_inputs
from orchestrator.output.staging import Staging
from orchestrator.progress import Reporter
from orchestrator.pruning.attempts import MAX_LOSSES
from orchestrator.pruning.backends import backend_of
from orchestrator.pruning.run_context import RunContext, settle_workers


def context_of(inputs: Inputs, printed: io.StringIO) -> RunContext:
    """A context whose workers have not started, since nothing was sent to them."""
    workers = LocalWorkers(1, 1)
    shards, pool = ShardGroup(workers, 1), SolverPool(workers, inputs.source, threads=1)
    return RunContext(PruneConfig(), inputs, shards, pool, Staging(Path("nowhere")), Reporter(Console(file=printed)))


@pytest.fixture
def inputs(gqa_model: Path, token_file: Path) -> Inputs:
    return load_inputs(PruneConfig(model=str(gqa_model), calibration=str(token_file)), print)


@pytest.mark.parametrize(("progress", "attempts"), [(0, MAX_LOSSES + 1), (1, 10)])
def test_losses_are_survived_as_long_as_something_is_committed_between(
    inputs: Inputs, progress: int, attempts: int
) -> None:
    tried: list[int] = []
    printed, finished = io.StringIO(), False

    def stage() -> None:
        nonlocal finished
        for attempt in context_of(inputs, printed).attempts(lambda: sum(tried)):
            with attempt:
                tried.append(progress)
                if len(tried) < 10:
                    raise WorkerLostError("a worker died.")
                finished = True

    if progress:
        stage()
    else:
        with pytest.raises(ShardError, match=r"a worker died. It was the 4th loss with nothing solved between"):
            stage()
    assert finished == bool(progress)
    assert len(tried) == attempts
    assert printed.getvalue().count("continues from earlier results") == attempts - 1


def test_other_errors_end_the_stage(inputs: Inputs) -> None:
    tried = []

    def stage() -> None:
        for attempt in context_of(inputs, io.StringIO()).attempts():
            with attempt:
                tried.append(attempt)
                raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        stage()
    assert len(tried) == 1


def test_a_resumed_run_keeps_its_workers_on_a_cluster_that_has_room_for_fewer(tmp_path: Path) -> None:
    staging, backend = Staging(tmp_path), backend_of(PruneConfig(workers=3))
    staging.work.mkdir()
    whole, smaller = Resources((Node(4, 0), Node(4, 0)), local=False), Resources((Node(2, 0),), local=True)
    with pytest.raises(ClusterError, match="3 workers of 0 GPUs were asked for, the cluster has room for 2"):
        settle_workers(backend, smaller, staging)
    assert settle_workers(backend, whole, staging) == WorkerPlan(3, 2, 0.0, weights_travel=True)
    assert settle_workers(backend, smaller, staging) == WorkerPlan(3, 2, 0.0, weights_travel=False)
