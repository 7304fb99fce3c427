"""The results of calibration for each layer: its modules' elimination paths, and measurements of it as a whole."""

from dataclasses import dataclass

from slimllm_ops.moments.ranking import Ranking


@dataclass(frozen=True)
class ModulePath:
    """A module's elimination path, and the variance of its output, tr(W^T C W)."""

    ranking: Ranking
    output_variance: float


@dataclass(frozen=True)
class LayerPaths:
    """The elimination paths of a decoder layer's modules, and measurements of the layer as a whole.

    Attributes:
        attention: The path of its heads.
        mlp: The path of its channels.
        stream_power: E|h|^2 of the layer's output.
        change: E|h_out - h_in|^2, the error if the whole layer is removed; None if not measured.
    """

    attention: ModulePath
    mlp: ModulePath
    stream_power: float
    change: float | None = None
