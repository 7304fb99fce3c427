"""What a run does about losses that do not end."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from actors.errors import ShardError, WorkerLostError
from actors.group import ShardGroup
from actors.placement import Placement
from actors.pool import SolverPool
from actors.serving import shared_files
from orchestrator import PruneConfig
from orchestrator.inputs import Inputs, load_inputs
from orchestrator.output.staging import Staging
from orchestrator.progress import Reporter
from orchestrator.pruning.run_context import MAX_LOSSES, Job


@contextmanager
def job_of(inputs: Inputs, told: io.StringIO) -> Iterator[Job]:
    """A job whose workers have not started, since nothing was sent to them."""
    with (
        Placement(1, 1, 0.0) as placement,
        shared_files() as deliver,
        ShardGroup(placement, deliver, print) as shards,
    ):
        pool = SolverPool(deliver(inputs.source), placement)
        yield Job(PruneConfig(), inputs, shards, pool, Staging(Path("nowhere")), Reporter(Console(file=told)))


@pytest.fixture
def inputs(gqa_model: Path, token_file: Path) -> Inputs:
    return load_inputs(PruneConfig(model=str(gqa_model), calibration=str(token_file)))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("progress", "attempts"), [(0, MAX_LOSSES + 1), (1, 10)])
def test_losses_are_survived_as_long_as_something_is_committed_between(
    inputs: Inputs, progress: int, attempts: int
) -> None:
    tried, told = [], io.StringIO()

    def stage() -> str:
        tried.append(progress)
        if len(tried) < 10:
            raise WorkerLostError("a worker died.")
        return "done"

    with job_of(inputs, told) as job:
        if progress:
            assert job.survive(stage, lambda: sum(tried)) == "done"
        else:
            with pytest.raises(ShardError, match=r"a worker died. It was the 4th loss with nothing solved between"):
                job.survive(stage, lambda: sum(tried))
    assert len(tried) == attempts
    assert told.getvalue().count("goes on from what is solved") == attempts - 1
