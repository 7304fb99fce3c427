"""Solves: pure functions of one module's weight and moments, run where a processor is free.

Only a few run at a time, so the moments in flight bound the memory, however deep the model is.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

from torch import Tensor

from actors.solving import Workbench, solve
from actors.workers import Reference, Workers
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.models.families import Branch

T = TypeVar("T")
M = TypeVar("M")
R = TypeVar("R")
P = ParamSpec("P")

IN_FLIGHT = 3


class SolverPool:
    """Submits solves; results come back in the order of submission.

    Args:
        workers: Where solves run.
        checkpoint: The model whose modules are solved; every node can read it.
        threads: CPU threads of a solve.
    """

    def __init__(self, workers: Workers, checkpoint: Checkpoint, threads: int) -> None:
        self._workers = workers
        self._checkpoint = checkpoint
        self._bench = Workbench(workers.device.type, threads)

    def submit(
        self,
        function: Callable[Concatenate[Tensor, M, P], R],
        layer: int,
        branch: Branch,
        moments: Reference[M],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> Reference[R]:
        """Run a function of a module's output weight and moments.

        Args:
            function: The solve, such as `slimllm_ops.module_solves.decide_module`.
            layer: The module's layer.
            branch: The module.
            moments: Its merged moments.
            arguments: What else the function takes; by position, since they travel.
            named: Nothing.
        """
        assert not named, "a solve takes its arguments by position"
        label = f"layer {layer}, {branch.described}"
        weight = self._checkpoint.stored_weight(layer, branch.output_weight)
        return self._workers.solve(
            f"{function.__name__} {label}", solve, self._bench, label, weight, function, moments, *arguments
        )

    def put(self, moments: M) -> Reference[M]:
        """Send moments for a solve."""
        return self._workers.put(moments)

    def get(self, reference: Reference[T]) -> T:
        """Wait for a result and return it."""
        return self._workers.get([reference])[0]


def in_flight(submissions: Iterable[T]) -> Iterator[T]:
    """Yield submissions in order, a few behind the newest one, so that a few are always under way."""
    waiting: deque[T] = deque()
    for submitted in submissions:
        waiting.append(submitted)
        if len(waiting) >= IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting
