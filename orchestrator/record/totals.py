"""Gathers the figures of a whole run: parameters, bytes, perplexity, seconds and memory."""

from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.evaluation.results import TaskResult
from orchestrator.inputs import Inputs
from slimllm_ops.checkpoint.reading import Checkpoint

# The stages that pass the calibration data through the layers.
CALIBRATION_STAGES = ("layer similarities", "pruning", "calibrating", "refining")


@dataclass(frozen=True)
class HeldOut:
    """The size of a held-out text: how many tokens were evaluated, and the length of the blocks they stood in."""

    tokens: int
    block_length: int

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens in blocks of {self.block_length:,}"


def evaluated(inputs: Inputs) -> dict[str, HeldOut]:
    """Return the sizes of a run's held-out texts by their specification."""
    return {one.spec: HeldOut(one.num_tokens, one.input_ids_BT.shape[1]) for one in inputs.held_out}


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The figures of a whole run.

    Perplexities are (dense, pruned) by specification of the held-out data; `evaluated` has the sizes of the data.
    `tasks` has the (dense, pruned) result for each metric of each task.
    """

    parameters_before: int
    parameters_after: int
    layer_parameters_before: int
    layer_parameters_after: int
    layers_before: int
    layers_after: int
    bytes_before: int
    bytes_after: int
    perplexity: dict[str, tuple[float, float]]
    evaluated: dict[str, HeldOut]
    tasks: tuple[tuple[TaskResult, TaskResult], ...]
    calibration_tokens: int
    seconds: dict[str, float]
    peak_memory: dict[str, int]
    read_back_error: float

    @property
    def sparsity(self) -> float:
        """The fraction of the decoder layers' parameters that was removed."""
        return 1 - self.layer_parameters_after / self.layer_parameters_before

    def reproducible_figures(self) -> dict[str, Any]:
        """Return the figures that a repeated run gives again: all but seconds and memory."""
        figures = asdict(self) | {"sparsity": self.sparsity}
        return {name: value for name, value in figures.items() if name not in ("seconds", "peak_memory")}

    @property
    def tokens_per_second(self) -> float:
        """The calibration tokens per second of the passes over the layers."""
        passes = [self.seconds[stage] for stage in CALIBRATION_STAGES if stage in self.seconds]
        return self.calibration_tokens / sum(passes) if passes else 0.0

    def metrics(self) -> dict[str, float]:
        """Return the totals as metrics without a step."""
        metrics = {
            "sparsity": self.sparsity,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "layer_parameters_before": self.layer_parameters_before,
            "layer_parameters_after": self.layer_parameters_after,
            "layers_before": self.layers_before,
            "layers_after": self.layers_after,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "tokens_per_second": self.tokens_per_second,
            "read_back_error": self.read_back_error,
        }
        metrics |= {f"seconds/{stage.replace(',', '')}": value for stage, value in self.seconds.items()}
        metrics |= {f"peak_memory_bytes/{kind}": value for kind, value in self.peak_memory.items()}
        return metrics | self.measured() | self._evaluated_sizes()

    def measured(self) -> dict[str, float]:
        """Return the perplexities and the tasks as metrics."""
        metrics: dict[str, float] = {}
        for number, (dense, pruned) in enumerate(self.perplexity.values()):
            suffix = metric_suffix(number)
            metrics |= {f"perplexity_before{suffix}": dense, f"perplexity_after{suffix}": pruned}
        for first, after in self.tasks:
            metrics |= {f"{after.metric_name}_before": first.value, f"{after.metric_name}_after": after.value}
        return metrics

    def _evaluated_sizes(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for number, size in enumerate(self.evaluated.values()):
            suffix = metric_suffix(number)
            metrics |= {f"evaluated_tokens{suffix}": size.tokens, f"evaluated_block_length{suffix}": size.block_length}
        return metrics


def metric_suffix(number: int) -> str:
    """Return the suffix of a held-out set's metrics; the first set, usually the only one, has the plain names."""
    return f"/{number}" if number else ""


def count_parameters(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return how many parameters a checkpoint has in total, and how many in its decoder layers."""
    layers = [name for layer in range(checkpoint.num_layers) for name in checkpoint.layer_names(layer)]
    return checkpoint.num_parameters(list(checkpoint.files)), checkpoint.num_parameters(layers)


def count_totals(
    inputs: Inputs,
    pruned: Checkpoint,
    perplexity: dict[str, tuple[float, float]],
    tasks: tuple[tuple[TaskResult, TaskResult], ...],
    seconds: dict[str, float],
    peak_memory: dict[str, int],
    read_back_error: float,
) -> Totals:
    """Gather the figures of a run after its checkpoint is written."""
    before, layers_before = count_parameters(inputs.source)
    after, layers_after = count_parameters(pruned)
    return Totals(
        parameters_before=before,
        parameters_after=after,
        layer_parameters_before=layers_before,
        layer_parameters_after=layers_after,
        layers_before=inputs.source.num_layers,
        layers_after=pruned.num_layers,
        bytes_before=inputs.source.num_bytes(),
        bytes_after=pruned.num_bytes(),
        perplexity=perplexity,
        evaluated=evaluated(inputs),
        tasks=tasks,
        calibration_tokens=inputs.calibration.num_tokens,
        seconds=dict(seconds),
        peak_memory=peak_memory,
        read_back_error=read_back_error,
    )
