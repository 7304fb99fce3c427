"""Lists the methods that can take part in a comparison, and chooses among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orchestrator.config import ConfigError
from orchestrator.pruning.layerwise import prune_layerwise
from orchestrator.pruning.one_pass import prune_from_moments
from orchestrator.pruning.run_context import RunContext
from orchestrator.pruning.targets import Target
from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.errors import InputError
from slimllm_ops.methods import METHODS, Method
from slimllm_ops.models.families import Family
from slimllm_ops.stream.refinement import require_refinable

# Gaps are fractions of this method's gap.
REFERENCE = "slimllm"


@dataclass(frozen=True)
class Contestant:
    """A method in a comparison, which writes each target's model from a run's context and the dense model's moments.

    Attributes:
        name: The method's name.
        source: Whose method it is.
        prune: Writes the layers of every target.
        refine: Whether the models are refined afterwards.
    """

    name: str
    source: str
    prune: Callable[[RunContext, MomentStore, list[Target]], None]
    refine: bool = False


def exclude_unrefinable(
    chosen: Sequence[Contestant], names: Sequence[str], family: Family, note: Callable[[str], None]
) -> list[Contestant]:
    """Return the methods that work on a family: if it cannot be refined, leave out those that refine, with a note.

    Raises:
        InputError: A method that refines was asked for by name.
    """
    try:
        require_refinable(family)
    except InputError as error:
        if any(one.refine and one.name in names for one in chosen):
            raise
        note(f"{', '.join(one.name for one in chosen if one.refine)} does not take part: {error}")
        return [one for one in chosen if not one.refine]
    return list(chosen)


def choose(names: Sequence[str]) -> list[Contestant]:
    """Return the named methods, or all if none is named; `slimllm` always takes part, as the first.

    Raises:
        ConfigError: A name is unknown.
    """
    known = {one.name: one for one in contestants()}
    for name in names:
        if name not in known:
            raise ConfigError(f"method {name!r} is unknown: choose among {', '.join(known)}")
    return [one for name, one in known.items() if name in names or not names or name == REFERENCE]


def contestants() -> list[Contestant]:
    """Return every method: `slimllm`, the rows of `METHODS` with any that the user added, and refined gram."""
    rows = [one_pass(method) for method in METHODS.values()]
    return [LAYER_BY_LAYER, *rows[:1], REFINED, *rows[1:]]


def one_pass(method: Method) -> Contestant:
    """Return a row of `METHODS` as a contestant."""

    def prune(context: RunContext, store: MomentStore, targets: list[Target]) -> None:
        prune_from_moments(context, store, method, targets)

    return Contestant(method.name, method.source, prune)


def _prune_layer_by_layer(context: RunContext, store: MomentStore, targets: list[Target]) -> None:
    prune_layerwise(context, targets)


LAYER_BY_LAYER = Contestant(REFERENCE, "SlimLLM (Guo et al., ICML 2025), as published", _prune_layer_by_layer)
REFINED = replace(
    one_pass(METHODS["gram"]), name="gram-refine", source="gram, then refined towards the dense stream", refine=True
)
