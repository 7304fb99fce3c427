"""The methods as they take part in a comparison, and which of them do."""

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

# Every gap is a fraction of this method's.
REFERENCE = "slimllm"


@dataclass(frozen=True)
class Contestant:
    """A method that takes part: it writes every target's model from a run's context and the dense model's moments.

    Attributes:
        name: what it is called.
        source: whose method it is.
        prune: writes the layers of every target.
        refine: whether the models are refined after that.
    """

    name: str
    source: str
    prune: Callable[[RunContext, MomentStore, list[Target]], None]
    refine: bool = False


def exclude_unrefinable(
    chosen: Sequence[Contestant], names: Sequence[str], family: Family, note: Callable[[str], None]
) -> list[Contestant]:
    """Return what takes part on a family: where that cannot be refined, what refines stays out, and a note says so.

    Raises:
        InputError: what refines was asked for by its name.
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
    """Return what takes part, by name: `slimllm` first, and all there is where no name is given.

    Raises:
        ConfigError: a name is unknown.
    """
    known = {one.name: one for one in contestants()}
    for name in names:
        if name not in known:
            raise ConfigError(f"method {name!r} is unknown: choose among {', '.join(known)}")
    return [one for name, one in known.items() if name in names or not names or name == REFERENCE]


def contestants() -> list[Contestant]:
    """Return every method: `slimllm`, the rows of `METHODS`, a user's own among them, and gram refined."""
    rows = [one_pass(method) for method in METHODS.values()]
    return [LAYER_BY_LAYER, *rows[:1], REFINED, *rows[1:]]


def one_pass(method: Method) -> Contestant:
    """Return a row of `METHODS` as it takes part."""

    def prune(context: RunContext, store: MomentStore, targets: list[Target]) -> None:
        prune_from_moments(context, store, method, targets)

    return Contestant(method.name, method.source, prune)


def _prune_layer_by_layer(context: RunContext, store: MomentStore, targets: list[Target]) -> None:
    prune_layerwise(context, targets)


LAYER_BY_LAYER = Contestant(REFERENCE, "SlimLLM (Guo et al., ICML 2025), as published", _prune_layer_by_layer)
REFINED = replace(
    one_pass(METHODS["gram"]), name="gram-refine", source="gram, then refined towards the dense stream", refine=True
)
