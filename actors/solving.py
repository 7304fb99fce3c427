"""One solve where it runs: reads the weight of a module and calls the function that was asked for.

A process that only solves imports this module and `slimllm_ops.module_solves`: torch, but not transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from slimllm_ops.checkpoint.reading import StoredWeight
from slimllm_ops.errors import SolveError
from slimllm_ops.stream.memory import return_large_blocks

R = TypeVar("R")


@dataclass(frozen=True)
class Workbench:
    """What a solve computes with."""

    device: str
    threads: int


def solve(
    bench: Workbench, label: str, weight: StoredWeight, function: Callable[..., R], moments: Any, *arguments: Any
) -> R:
    """Call a function with a module's output weight and its moments.

    Args:
        bench: The device and threads to use.
        label: The layer and module, for errors.
        weight: Where the weight is stored.
        function: A pure function of the weight in float32, the moments and the arguments.
        moments: The module's merged moments.
        arguments: What else the function takes.

    Raises:
        SolveError: The function raised it; the message now says which module it is about.
    """
    return_large_blocks()
    torch.set_num_threads(bench.threads)
    try:
        return function(weight.read().to(bench.device, torch.float32), moments, *arguments)
    except SolveError as error:
        raise SolveError(f"{label}: {error}") from None
