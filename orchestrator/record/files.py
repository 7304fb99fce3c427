"""What a run leaves beside the weights: the plan, the scores, figures, a model card, and the same in MLflow."""

import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import WorkerPlan
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs
from orchestrator.record.figures import LayerKept, ScoredUnits, draw_kept, draw_scores
from orchestrator.record.model_card import write_model_card
from orchestrator.secrets import masked_all
from orchestrator.tracking import Run
from orchestrator.version import VERSION
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import Decision, LayerPlan, Plan
from slimllm_ops.models.families import layer_shape

# The stages that pass the calibration data through the layers.
CALIBRATION_STAGES = ("layer similarities", "pruning", "calibrating", "refining")
PACKAGES = ("torch", "transformers", "ray", "mlflow", "datasets")
# Settings of one attempt at a run, which may be another at the next; MLflow knows itself where it is.
OF_AN_ATTEMPT = {"overwrite", "resume", "tracking_uri", "address"}
# Where a run goes and how it is told: nothing that it gives depends on these.
PLACES = {"output", "experiment", "run_name", "register", "shared_storage", "offload", "weights_travel"}
# Settings that name files, of which the digests tell more.
DIGESTED = {"model", "calibration", "evaluate", "moments"}
# Settings by which one model is told from another, where they are set.
TOLD_OF_A_MODEL = ("method", "refine", "ratio", "uniform", "no_bias", "model", "model_digest")
# Digits of measured figures where they are read, not computed with.
READ_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The figures of a whole run; perplexities are (dense, pruned) by specification of the held-out data."""

    parameters_before: int
    parameters_after: int
    layer_parameters_before: int
    layer_parameters_after: int
    layers_before: int
    layers_after: int
    bytes_before: int
    bytes_after: int
    perplexity: dict[str, tuple[float, float]]
    calibration_tokens: int
    seconds: dict[str, float]
    peak_memory: dict[str, int]
    read_back_error: float

    @property
    def sparsity(self) -> float:
        """Fraction of the decoder layers' parameters that is gone."""
        return 1 - self.layer_parameters_after / self.layer_parameters_before

    def recorded(self) -> dict[str, Any]:
        """Return the figures that the same run gives again: all but those of the machine and what else it did."""
        figures = asdict(self) | {"sparsity": self.sparsity}
        return {name: value for name, value in figures.items() if name not in ("seconds", "peak_memory")}

    @property
    def tokens_per_second(self) -> float:
        """Calibration tokens per second of the passes over the layers."""
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
        return metrics | self.perplexities()

    def perplexities(self) -> dict[str, float]:
        """Return the perplexities as metrics."""
        metrics: dict[str, float] = {}
        for number, (dense, pruned) in enumerate(self.perplexity.values()):
            # One held-out set is the usual case, and keeps the plain name.
            suffix = f"/{number}" if number else ""
            metrics |= {f"perplexity_before{suffix}": dense, f"perplexity_after{suffix}": pruned}
        return metrics


def count_parameters(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return how many parameters a checkpoint has in all, and in its decoder layers."""
    layers = [name for layer in range(checkpoint.num_layers) for name in checkpoint.layer_names(layer)]
    return checkpoint.num_parameters(list(checkpoint.files)), checkpoint.num_parameters(layers)


def count_totals(
    inputs: Inputs,
    pruned: Checkpoint,
    perplexity: dict[str, tuple[float, float]],
    seconds: dict[str, float],
    peak_memory: dict[str, int],
    read_back_error: float,
) -> Totals:
    """Gather the figures of a run whose checkpoint is written."""
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
        calibration_tokens=inputs.calibration.num_tokens,
        seconds=dict(seconds),
        peak_memory=peak_memory,
        read_back_error=read_back_error,
    )


def run_params(config: PruneConfig, inputs: Inputs, workers: WorkerPlan) -> dict[str, Any]:
    """Return what the run was asked to do and what it ran on: enough to repeat it, and without secrets."""
    asked = {name: value for name, value in asdict(config).items() if value is not None and name not in OF_AN_ATTEMPT}
    found = {
        "model": config.model or inputs.name,
        "model_digest": inputs.source_digest,
        "calibration": inputs.calibration.spec,
        "calibration_digest": inputs.calibration.digest,
        "evaluate": ", ".join(blocks.spec for blocks in inputs.held_out),
        "sparsity": ", ".join(f"{sparsity:g}" for sparsity in config.targets if sparsity is not None) or None,
        "python_version": platform.python_version(),
        **_versions(),
        **asdict(workers),
    }
    return masked_all(asked | found)


def settings_of(params: dict[str, Any]) -> dict[str, Any]:
    """Return what of a run's parameters may bear on what it gives."""
    return {name: value for name, value in params.items() if name not in PLACES}


def what_is_asked(config: PruneConfig, inputs: Inputs) -> dict[str, Any]:
    """Return what the result depends on: a run that is resumed must have the same."""
    settings = {name: value for name, value in asdict(config).items() if name not in OF_AN_ATTEMPT | PLACES | DIGESTED}
    return settings | {
        "sparsity": config.targets,
        "model_digest": inputs.source_digest,
        "calibration_digest": inputs.calibration.digest,
        "evaluate_digests": [blocks.digest for blocks in inputs.held_out],
        **_versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what results depend on, by package. A run without Ray or MLflow may lack them."""
    found = {"slimllm": VERSION}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _versions() -> dict[str, str]:
    return {f"{package}_version": found for package, found in versions().items()}


def log_inputs(run: Run, params: dict[str, Any], inputs: Inputs) -> None:
    """Log the parameters and the digests of the data, before anything is computed."""
    run.log_params({name: value for name, value in params.items() if value is not None})
    calibration = inputs.calibration
    _log_dataset(
        run, "calibration", calibration.spec, calibration.digest, calibration.num_blocks, calibration.block_length
    )
    for blocks in inputs.held_out:
        _log_dataset(run, "evaluation", blocks.spec, blocks.digest, *blocks.input_ids_BT.shape)


def _log_dataset(
    run: Run,
    context: Literal["calibration", "evaluation"],
    spec: str,
    digest: str,
    num_blocks: int,
    length: int,
) -> None:
    run.log_dataset(Path(spec).name, digest, context, spec, num_blocks, length)


def log_layer(run: Run, source: Checkpoint, layer: int, plan: LayerPlan) -> dict[str, float]:
    """Log a layer's metrics, with step = layer, and return them; none if an earlier attempt at the run logged them."""
    if layer in run.logged_steps:
        return {}
    metrics = _layer_metrics(source, layer, plan)
    run.log_metrics(metrics, step=layer)
    return metrics


def _layer_metrics(source: Checkpoint, layer: int, plan: LayerPlan) -> dict[str, float]:
    shape = layer_shape(source.config, layer)
    kept = _layer_kept(source, layer, plan)
    metrics: dict[str, float] = {
        "heads_kept": kept.heads_kept,
        "key_value_heads_kept": kept.heads_kept * shape.num_key_value_heads // shape.num_attention_heads,
        "channels_kept": kept.channels_kept,
        "attention_relative_error": _relative_error(plan.attention),
        "mlp_relative_error": _relative_error(plan.mlp),
    }
    # Only the paper's method measures similarities and follows ratios.
    if plan.similarity is not None and plan.ratio is not None:
        metrics |= {"cosine": plan.similarity, "ratio": plan.ratio}
    if plan.relative_change is not None:
        metrics["relative_change"] = plan.relative_change
    if plan.mlp is not None and source.family.mlp.reading.experts is not None:
        metrics["idle_experts"] = len(plan.mlp.idle_experts)
    return metrics


def write_record(
    directory: Path, params: dict[str, Any], inputs: Inputs, layers: Sequence[LayerPlan], totals: Totals
) -> None:
    """Write `pruning/` (plan, scores, figures) and the model card into a checkpoint's directory.

    The same run writes the same bytes, wherever it writes them and however fast.
    """
    pruning = directory / "pruning"
    header = {"format": 1, "params": settings_of(params), "totals": masked_all(totals.recorded())}
    Plan(header, tuple(layers)).write(pruning / "plan.json")
    pq.write_table(importance_table(layers), pruning / "importance.parquet")
    figures = pruning / "figures"
    figures.mkdir(exist_ok=True)
    kept = [_layer_kept(inputs.source, number, layer) for number, layer in enumerate(layers)]
    draw_kept(kept, figures / "kept.png")
    draw_scores(_scored(layers), figures / "scores.png")
    write_model_card(directory, inputs, params, totals)


def log_record(
    run: Run, directory: Path, inputs: Inputs, target: str, params: dict[str, Any], totals: Totals
) -> str | None:
    """Log the totals, the record's files and the checkpoint; return the logged model's URI.

    Args:
        run: The target's.
        directory: The checkpoint.
        inputs: What was pruned.
        target: What the target is called, which becomes the alias of the checkpoint if that is registered.
        params: What the checkpoint was made by.
        totals: What came of it.
    """
    description = describe(inputs.name, params["method"], totals)
    run.log_metrics(totals.metrics())
    run.log_note(description)
    run.log_artifacts(directory / "pruning", to="pruning")
    told = {
        "sparsity": params["sparsity"] or round(totals.sparsity, READ_DIGITS),
        "parameters": totals.parameters_after,
    }
    return run.log_checkpoint(
        directory,
        f"{inputs.name}-{target}",
        told | {name: params[name] for name in TOLD_OF_A_MODEL if params.get(name)},
        measured={name: round(value, READ_DIGITS) for name, value in totals.perplexities().items()},
        alias=target,
        description=description,
    )


def describe(name: str, method: str, totals: Totals) -> str:
    """Return what was done to a model and what it cost, in a line."""
    # The registry's table shows some thirty characters: those by which versions are told apart come first.
    costs = [
        f"perplexity {pruned:.2f} (dense {dense:.2f}) on {Path(data).name}"
        for data, (dense, pruned) in totals.perplexity.items()
    ]
    return "; ".join([*costs, f"{name} pruned by {totals.sparsity:.1%} with {method}"])


def importance_table(layers: Sequence[LayerPlan]) -> pa.Table:
    """Return a row per unit of every pruned module: layer, module, unit, score, kept."""
    schema = pa.schema(
        [
            ("layer", pa.int32()),
            ("module", pa.string()),
            ("unit", pa.int32()),
            ("score", pa.float64()),
            ("kept", pa.bool_()),
        ]
    )
    # By columns: a row for each channel of a large model would outweigh a layer.
    parts = [
        pa.table(
            {
                "layer": np.full(decision.num_units, number),
                "module": [module] * decision.num_units,
                "unit": np.arange(decision.num_units),
                "score": np.array(decision.scores),
                "kept": np.isin(np.arange(decision.num_units), decision.kept),
            },
            schema=schema,
        )
        for number, layer in enumerate(layers)
        for module, decision in _modules(layer)
    ]
    return pa.concat_tables([schema.empty_table(), *parts])


def _modules(layer: LayerPlan) -> list[tuple[str, Decision]]:
    modules = (("attention", layer.attention), ("mlp", layer.mlp))
    return [(name, decision) for name, decision in modules if decision is not None]


def _layer_kept(source: Checkpoint, layer: int, plan: LayerPlan) -> LayerKept:
    shape = layer_shape(source.config, layer)
    group = shape.num_attention_heads // shape.num_key_value_heads
    return LayerKept(
        layer=layer,
        heads_kept=0 if plan.dropped else _num_kept(plan.attention, shape.num_key_value_heads) * group,
        heads_total=shape.num_attention_heads,
        channels_kept=0 if plan.dropped else _num_kept(plan.mlp, shape.num_channels),
        channels_total=shape.num_channels,
    )


def _num_kept(decision: Decision | None, whole: int) -> int:
    return whole if decision is None else len(decision.kept)


def _scored(layers: Sequence[LayerPlan]) -> dict[str, list[ScoredUnits]]:
    scored: dict[str, list[ScoredUnits]] = {"attention": [], "mlp": []}
    for number, layer in enumerate(layers):
        for module, decision in _modules(layer):
            scored[module].append(ScoredUnits(layer=number, scores=decision.scores, kept=decision.kept))
    return {module: units for module, units in scored.items() if units}


def _relative_error(decision: Decision | None) -> float:
    return 0.0 if decision is None else decision.relative_error
