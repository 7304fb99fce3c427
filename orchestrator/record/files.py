"""What a run leaves beside the weights: the plan, the scores, figures and a model card."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import WorkerPlan
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs
from orchestrator.record.figures import LayerKept, ScoredUnits, draw_kept, draw_scores
from orchestrator.record.model_card import write_model_card
from orchestrator.record.totals import Totals
from orchestrator.secrets import masked_all
from orchestrator.version import VERSION
from slimllm_ops.decide.plan import Decision, LayerPlan, Plan

PACKAGES = ("torch", "transformers", "ray", "mlflow", "datasets")
# Settings of one attempt at a run, which may be another at the next; MLflow knows itself where it is.
OF_AN_ATTEMPT = {"overwrite", "resume", "tracking_uri", "address"}
# Where a run goes and how it is told: nothing that it gives depends on these.
PLACES = {"output", "experiment", "run_name", "register", "shared_storage", "offload", "weights_travel"}
# Settings that name files, of which the digests tell more.
DIGESTED = {"model", "calibration", "evaluate", "moments"}


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
    """Return the versions of what results depend on, by package."""
    return {"slimllm": VERSION} | {package: version(package) for package in PACKAGES}


def _versions() -> dict[str, str]:
    return {f"{package}_version": found for package, found in versions().items()}


def write_record(
    directory: Path, params: dict[str, Any], inputs: Inputs, layers: Sequence[LayerPlan], totals: Totals
) -> None:
    """Write `pruning/` (plan, scores, figures) and the model card into a checkpoint's directory.

    The same run writes the same bytes, wherever it writes them and however fast.
    """
    pruning = directory / "pruning"
    header = {"format": 1, "params": settings_of(params), "totals": masked_all(totals.reproducible_figures())}
    Plan(header, tuple(layers)).write(pruning / "plan.json")
    pq.write_table(importance_table(layers), pruning / "importance.parquet")
    figures = pruning / "figures"
    figures.mkdir(exist_ok=True)
    kept = [LayerKept.of(inputs.source, number, layer) for number, layer in enumerate(layers)]
    draw_kept(kept, figures / "kept.png")
    draw_scores(_unit_scores(layers), figures / "scores.png")
    write_model_card(directory, inputs, params, totals)


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


def _unit_scores(layers: Sequence[LayerPlan]) -> dict[str, list[ScoredUnits]]:
    scored: dict[str, list[ScoredUnits]] = {"attention": [], "mlp": []}
    for number, layer in enumerate(layers):
        for module, decision in _modules(layer):
            scored[module].append(ScoredUnits(layer=number, scores=decision.scores, kept=decision.kept))
    return {module: units for module, units in scored.items() if units}
