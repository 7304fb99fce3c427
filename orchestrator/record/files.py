"""Writes the files that go with a checkpoint's weights: the plan, the scores, figures and a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.completion import REPORT_FILE
from orchestrator.inputs import Inputs
from orchestrator.record.figures import LayerKept, ScoredUnits, draw_kept, draw_scores
from orchestrator.record.model_card import write_model_card
from orchestrator.record.params import settings_of
from orchestrator.record.totals import Totals
from orchestrator.reports.page import write_report
from orchestrator.reports.values import Sources, run_of
from orchestrator.secrets import masked_all, uris_masked
from slimllm_ops.decide.plan import Decision, LayerPlan, Plan
from slimllm_ops.files import written_whole


def write_record(
    directory: Path, params: dict[str, Any], inputs: Inputs, layers: Sequence[LayerPlan], totals: Totals
) -> None:
    """Write `pruning/` (plan, scores, figures, report) and the model card into a checkpoint's directory.

    The same run writes the same bytes, whatever its output directory and speed, but for the report: it has the seconds.
    """
    pruning = directory / "pruning"
    header = {
        "format": 1,
        "params": settings_of(params),
        "totals": masked_all(totals.reproducible_figures(), uris_masked),
    }
    plan = Plan(header, tuple(layers))
    plan.write(pruning / "plan.json")
    with written_whole(pruning / "importance.parquet") as partial:
        pq.write_table(importance_table(layers), partial)
    figures = pruning / "figures"
    figures.mkdir(exist_ok=True)
    kept = [LayerKept.of(inputs.source, number, layer) for number, layer in enumerate(layers)]
    draw_kept(kept, figures / "kept.png")
    draw_scores(_unit_scores(layers), figures / "scores.png")
    write_model_card(directory, inputs, params, totals)
    write_report(pruning / REPORT_FILE, Sources(runs=(run_of(plan, totals.seconds),)))


def importance_table(layers: Sequence[LayerPlan]) -> pa.Table:
    """Return a table with a row per unit of every pruned module: layer, module, unit, score (its importance), kept."""
    schema = pa.schema(
        [
            ("layer", pa.int32()),
            ("module", pa.string()),
            ("unit", pa.int32()),
            ("score", pa.float64()),
            ("kept", pa.bool_()),
        ]
    )
    # Built by columns: Python rows for each channel of a large model would take more memory than a layer.
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
