"""What a calibration pass leaves of each layer: the elimination path of its modules, and the power of its states."""

from dataclasses import dataclass

from slimllm_ops.moments.ranking import Ranking


@dataclass(frozen=True)
class ModulePath:
    """A module's elimination path, and the variance of its output, tr(W^T C W)."""

    ranking: Ranking
    output_variance: float


@dataclass(frozen=True)
class LayerPaths:
    """The paths of a decoder layer's modules, and what the layer does as a whole.

    Attributes:
        attention: The path of its heads.
        mlp: The path of its channels.
        stream_power: E|h|^2 of the layer's output.
        change: E|h_out - h_in|^2, the error of a model without the layer; None where it was not measured.
    """

    attention: ModulePath
    mlp: ModulePath
    stream_power: float
    change: float | None = None
