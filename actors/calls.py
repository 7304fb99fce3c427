"""Names the calls of shards, and says which worker holds which shard."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slimllm_ops.models.families import Branch


@dataclass(frozen=True)
class Share:
    """One shard of a stream: the worker that holds it, and its name there."""

    worker: int
    stream: str


@dataclass(frozen=True)
class SharedStream:
    """A stream spread over shards; a short text does not give every shard a share."""

    shares: list[Share]
    num_tokens: int


def label_of(step: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """Return what Ray's dashboard and messages call a step: its name, its layer and its module."""
    places = [f"layer {one}" if isinstance(one, int) else one.described for one in arguments if _is_place(one)]
    return ", ".join([*places, step.__name__])


def _is_place(argument: Any) -> bool:
    return isinstance(argument, int | Branch) and not isinstance(argument, bool)
