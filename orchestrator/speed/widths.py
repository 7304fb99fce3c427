"""Says which widths of a model's layers cost speed, and which multiples would not, from times of matrix products."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from statistics import fmean

from transformers import PretrainedConfig

from slimllm_ops.models.families import family_of, head_dim, layer_shape

# The multiples to try, of channels and of key/value heads.
CHANNEL_MULTIPLES = (1, 8, 16, 32, 64, 128)
HEAD_MULTIPLES = (1, 2, 4)
# How many different widths of a model are timed; more take long and tell little more.
MOST_WIDTHS = 8
# A multiple is as good as the best one if it takes this share longer at most.
TOLERANCE = 0.03

# Returns the seconds of a multiply-accumulate for each width.
TimeWidths = Callable[[tuple[int, ...]], Mapping[int, float]]


@dataclass(frozen=True)
class Kind:
    """The units of one kind that a model's layers keep.

    Attributes:
        units: What they are called.
        option: The option of `prune` that keeps multiples of them.
        counts: How many of them the layers have, each number once.
        width: The width of one unit.
        multiples: The multiples that the option takes for this model.
    """

    units: str
    option: str
    counts: tuple[int, ...]
    width: int
    multiples: tuple[int, ...]

    def widths(self, multiple: int) -> list[int]:
        """Return the width of each number of units, rounded up to a multiple."""
        return [self.width * multiple * ceil(count / multiple) for count in self.counts]


@dataclass(frozen=True)
class Sweep:
    """What the widths of a model cost.

    Attributes:
        model: The model's name.
        kind: The units.
        costs: The time of a multiply-accumulate for each multiple, in that of the best one.
        widths: The same for each width that was timed.
    """

    model: str
    kind: Kind
    costs: dict[int, float]
    widths: dict[int, float]

    @property
    def advice(self) -> str:
        """What to prune with."""
        kind, cost = self.kind, self.costs[1]
        best = next(multiple for multiple, one in self.costs.items() if one <= 1 + TOLERANCE)
        if best == 1:
            return f"{self.model}: its numbers of {kind.units} cost no speed as they are"
        pairs = zip(kind.widths(1), kind.widths(best), strict=True)
        ratios = {pair: self.widths[pair[0]] / self.widths[pair[1]] for pair in pairs}
        width, rounded = max(ratios, key=lambda pair: ratios[pair])
        return (
            f"{self.model}: layer widths such as {width:,} take {ratios[width, rounded]:.2f} x the time of {rounded:,} "
            f"for the same work, and all of them {cost:.2f} x that of the best: prune with {kind.option} {best}"
        )


def sweep_widths(model: str, config: PretrainedConfig, time_widths: TimeWidths) -> list[Sweep]:
    """Time the widths of a model's layers beside rounded ones, and return what each multiple costs.

    Raises:
        CheckpointError: The family is unknown.
    """
    return [_sweep(model, kind, time_widths) for kind in kinds_of(config)]


def kinds_of(config: PretrainedConfig) -> tuple[Kind, ...]:
    """Return the channels and the key/value heads of a model's layers, if there are multiples of them to try.

    Raises:
        CheckpointError: The family is unknown.
    """
    shapes = [layer_shape(config, layer) for layer in range(config.num_hidden_layers)]
    channels = _some(shape.intermediate_size for shape in shapes)
    groups = _some(shape.num_key_value_heads for shape in shapes)
    # Pruning leaves the query heads of a key/value head together, and the dense model's numbers in the config.
    dense_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_width = config.num_attention_heads // dense_heads * head_dim(config)
    dense_channels = getattr(config, family_of(config).intermediate_size)
    kinds = (
        Kind("channels", "--multiple-of", channels, 1, _dividing(dense_channels, CHANNEL_MULTIPLES)),
        Kind("key/value heads", "--heads-multiple-of", groups, head_width, _dividing(dense_heads, HEAD_MULTIPLES)),
    )
    return tuple(kind for kind in kinds if kind.counts and len(kind.multiples) > 1)


def _sweep(model: str, kind: Kind, time_widths: TimeWidths) -> Sweep:
    widths = sorted({width for multiple in kind.multiples for width in kind.widths(multiple)})
    seconds = time_widths(tuple(widths))
    means = {multiple: fmean(seconds[width] for width in kind.widths(multiple)) for multiple in kind.multiples}
    best, fastest = min(means.values()), min(seconds.values())
    costs = {multiple: mean / best for multiple, mean in means.items()}
    return Sweep(model, kind, costs, {width: one / fastest for width, one in seconds.items()})


def _some(counts: Iterable[int]) -> tuple[int, ...]:
    """Return the different numbers above 0, at most `MOST_WIDTHS` of them, evenly chosen."""
    different = sorted({count for count in counts if count})
    step = max(1, ceil(len(different) / MOST_WIDTHS))
    return tuple(different[::step])


def _dividing(whole: int, multiples: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(multiple for multiple in multiples if whole % multiple == 0)
