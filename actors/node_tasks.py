"""Questions to nodes of a Ray cluster: one task on each node, with a time limit."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

T = TypeVar("T")


def ask_nodes(
    nodes: Sequence[str], question: Callable[..., T], *arguments: Any, gpus: float, seconds: float
) -> dict[str, T | str]:
    """Run a function on all nodes at once; return each answer, or the reason why there is none.

    Args:
        nodes: Ray's names of the nodes.
        question: The function.
        arguments: Its arguments.
        gpus: The share of a GPU that it takes.
        seconds: How long to wait.
    """
    remote = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(question)
    asked = {
        node: remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments)
        for node in nodes
    }
    deadline = time.monotonic() + seconds
    return {node: _answer(reference, deadline) for node, reference in asked.items()}


def _answer(reference: Any, deadline: float) -> Any:
    try:
        return ray.get(reference, timeout=max(deadline - time.monotonic(), 0.0))
    except GetTimeoutError:
        ray.cancel(reference, force=True)
        return "it did not answer in time"
    # A worker that cannot import a package, a node that is lost.
    except (RayError, ImportError) as error:
        return next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)[:200]
