"""Solves on Ray: pure functions of one module's moments, run wherever a processor is free.

A bounded number is under way, so that the moments in flight bound the memory, whatever the depth of the model.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch

from actors.placement import Placement
from actors.waiting import get_in_order
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.paths import ModulePath
from slimllm_ops.decide.plan import Decision
from slimllm_ops.errors import SolveError
from slimllm_ops.methods import Method
from slimllm_ops.models.families import Branch
from slimllm_ops.module_solves import decide_module, eliminate_module, rank_module
from slimllm_ops.moments.observation import Observed
from slimllm_ops.moments.ranking import Ranking
from slimllm_ops.stream.memory import return_large_blocks

IN_FLIGHT = 3


@dataclass(frozen=True)
class Workbench:
    """Where a solve finds its weights, and what it may use."""

    checkpoint: Checkpoint
    device: str
    threads: int


class SolverPool:
    """Submits solves; results come back in the order of submission.

    Args:
        checkpoint: the model whose moments are solved, as every node can read it.
        placement: where they run.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement) -> None:
        self._placement = placement
        self._bench = ray.put(Workbench(checkpoint, placement.device, placement.threads_per_solve))

    def eliminate(self, layer: int, branch: Branch, observed: ray.ObjectRef, num_units: int) -> ray.ObjectRef:
        """Eliminate a module from its merged moments; refers to its path and its output's variance."""
        return self._submit(_eliminate, layer, branch, observed, num_units)

    def rank(
        self,
        layer: int,
        branch: Branch,
        observed: ray.ObjectRef,
        num_units: int,
        method: Method,
    ) -> ray.ObjectRef:
        """Rank a module's units by a method; refers to a `Ranking`."""
        return self._submit(_rank, layer, branch, observed, num_units, method)

    def decide(
        self,
        layer: int,
        branch: Branch,
        observed: ray.ObjectRef,
        method: Method,
        ranking: Ranking,
        removals: list[int],
    ) -> ray.ObjectRef:
        """Decide a module at several numbers of units removed; refers to a list of decisions."""
        return self._submit(_decide, layer, branch, observed, method, ranking, removals)

    def _submit(self, solve: Callable[..., Any], layer: int, branch: Branch, *arguments: Any) -> ray.ObjectRef:
        # A solve is a pure function: one that is lost with its node is run again.
        remote = ray.remote(max_retries=3)(solve)
        # What Ray's dashboard and its trace call it.
        name = f"{solve.__name__.lstrip('_')} {_described(layer, branch)}"
        options = self._placement.solve_options()
        return remote.options(name=name, **options).remote(self._bench, layer, branch, *arguments)


def results(submissions: Iterable[tuple[ray.ObjectRef, ...]]) -> Iterator[list[Any]]:
    """Yield the results of submissions in order; a further one is made only when an earlier one is done."""
    waiting: deque[tuple[ray.ObjectRef, ...]] = deque()
    for refs in submissions:
        waiting.append(refs)
        if len(waiting) >= IN_FLIGHT:
            yield get_in_order(list(waiting.popleft()))
    while waiting:
        yield get_in_order(list(waiting.popleft()))


def _eliminate(bench: Workbench, layer: int, branch: Branch, observed: Observed, num_units: int) -> ModulePath:
    with _named_in_errors(layer, branch):
        return eliminate_module(_weight(bench, layer, branch), observed, num_units)


def _rank(bench: Workbench, layer: int, branch: Branch, observed: Observed, num_units: int, method: Method) -> Ranking:
    with _named_in_errors(layer, branch):
        return rank_module(_weight(bench, layer, branch), observed, num_units, method)


def _decide(
    bench: Workbench,
    layer: int,
    branch: Branch,
    observed: Observed,
    method: Method,
    ranking: Ranking,
    removals: list[int],
) -> list[Decision | None]:
    with _named_in_errors(layer, branch):
        return decide_module(_weight(bench, layer, branch), observed, method, ranking, removals)


@contextmanager
def _named_in_errors(layer: int, branch: Branch) -> Iterator[None]:
    try:
        yield
    except SolveError as error:
        raise SolveError(f"{_described(layer, branch)}: {error}") from None


def _weight(bench: Workbench, layer: int, branch: Branch) -> torch.Tensor:
    """Read the output projection's weight onto the device that this task was given."""
    return_large_blocks()
    torch.set_num_threads(bench.threads)
    return bench.checkpoint.read_weight(layer, branch.output_weight).to(bench.device, torch.float32)


def _described(layer: int, branch: Branch) -> str:
    return f"layer {layer}, {branch.described}"
