"""How a stage survives lost workers: it is attempted again, and continues after its last commit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from actors.errors import ShardError, WorkerLostError
from actors.group import ShardGroup
from orchestrator.progress import Reporter

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


# Yields attempts at a stage, given what returns how much of the stage is committed.
Attempts = Callable[[Callable[[], int]], Iterator[Attempt]]


def attempts(shards: ShardGroup, reporter: Reporter, committed: Callable[[], int] = lambda: 0) -> Iterator[Attempt]:
    """Yield attempts at a stage until one keeps all its workers.

        for attempt in attempts(shards, reporter, log.__len__):
            with attempt:
                ...  # open the streams and continue after the last commit

    Args:
        shards: The shards that the stage runs on.
        reporter: Tells of losses.
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
        shards.lose()
        reporter.warn(f"{loss} The run continues from earlier results once it has workers again")
