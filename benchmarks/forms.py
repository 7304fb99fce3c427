"""Measures what each form of a pruned model costs in perplexity: `python -m benchmarks.forms`.

It prunes lab-llama-11m by both methods at 20 and 40 %. The forms are free, equal layers, channels in multiples, no new
biases, and the last three together, which fits a stock class; then heads in multiples, as many heads in all layers, and
protected layers. `gram` may also drop layers. Each checkpoint that fits a stock class is exported to it, which checks
that it computes the same to the last bit.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import describe_machine, write_table
from orchestrator import PruneConfig, prune
from orchestrator.exports.stock import export_stock
from orchestrator.pipeline import PruneResult
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import InputError
from slimllm_ops.stock import stock_form

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TOKENS = SHARED / "golden" / "tokens"
FORMS: dict[str, dict[str, Any]] = {
    "free": {},
    "uniform": {"uniform": True},
    "channels by 32": {"multiple_of": 32},
    "no bias": {"no_bias": True},
    "uniform, channels by 32, no bias": {"uniform": True, "multiple_of": 32, "no_bias": True},
    "heads by 2": {"heads_multiple_of": 2},
    "tensor parallelism over 2": {"for_tp": 2},
    "uniform heads": {"uniform_heads": True},
    "uniform heads, channels by 32, no bias": {"uniform_heads": True, "multiple_of": 32, "no_bias": True},
    "first and last layer whole": {"keep_layers": (0, -1)},
    "at most half of a layer": {"max_layer_sparsity": 0.5},
}
METHODS: dict[str, dict[str, Any]] = {
    "slimllm": {"method": "slimllm"},
    "gram": {"method": "gram"},
    "gram, refined": {"method": "gram", "refine": True},
}
# Forms that only gram has.
LAYERS_GO: dict[str, dict[str, Any]] = {
    "layers may go": {"drop_layers": True},
    "uniform, layers may go": {"drop_layers": True, "uniform": True},
}


@click.command()
@click.option("--model", type=Path, default=SHARED / "models" / "lab-llama-11m")
@click.option("--calibration", type=Path, default=TOKENS / "lab.calibration.parquet")
@click.option("--evaluate", type=Path, default=TOKENS / "lab.heldout.parquet")
@click.option("--sparsity", "sparsities", type=float, multiple=True, default=(0.2, 0.4), help="Repeatable.")
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, default=list(METHODS))
@click.option("--form", "forms", type=click.Choice([*FORMS, *LAYERS_GO]), multiple=True, default=[*FORMS, *LAYERS_GO])
@click.option("--output", type=Path, default=ROOT / "benchmarks" / "results" / "forms.md")
def main(
    model: Path,
    calibration: Path,
    evaluate: Path,
    sparsities: tuple[float, ...],
    methods: Sequence[str],
    forms: Sequence[str],
    output: Path,
) -> None:
    """Prune by every method in every form, and write the table."""
    rows = [["method, form", *(f"{sparsity:.0%}" for sparsity in sparsities), "layers left", "stock class"]]
    common = {
        "model": str(model),
        "calibration": str(calibration),
        "evaluate": (str(evaluate),),
        "sparsity": sparsities,
    }
    with tempfile.TemporaryDirectory() as folder:
        for method, form in _cases(methods, forms):
            settings = common | METHODS[method] | (FORMS | LAYERS_GO)[form]
            result = _prune(Path(folder), f"{method}, {form}", settings)
            if len(rows) == 1:
                dense = [f"{before:.2f}" for before, _ in _perplexities(result)]
                rows.append(["dense", *dense, "", Checkpoint.open(model).config.architectures[0]])
            pruned = [f"{after:.2f}" for _, after in _perplexities(result)]
            layers = ", ".join(str(one.totals.layers_after) for one in result.models)
            rows.append([f"{method}, {form}", *pruned, layers, _stock_class(result)])
            print(*rows[-1], sep=" | ", flush=True)
            write_table(output, f"Perplexity of {model.name} by form", describe_machine(), rows)


def _cases(methods: Sequence[str], forms: Sequence[str]) -> list[tuple[str, str]]:
    """Return the method and form of each row; only gram removes whole layers."""
    return [
        (method, form)
        for method in methods
        for form in forms
        if form not in LAYERS_GO or METHODS[method]["method"] == "gram"
    ]


def _prune(folder: Path, name: str, settings: dict[str, Any]) -> PruneResult:
    return prune(PruneConfig(output=str(folder / name), local=True, tracking_uri="none", **settings))


def _perplexities(result: PruneResult) -> list[tuple[float, float]]:
    """Return the perplexity before and after pruning, for every sparsity."""
    return [next(iter(model.totals.perplexity.values())) for model in result.models]


def _stock_class(result: PruneResult) -> str:
    """Return the stock classes that a run's models fit, or "none" if a model fits no class."""
    try:
        for model in result.models:
            export_stock(model.output, None, overwrite=True)
    except InputError:
        return "none"
    return ", ".join(sorted({stock_form(Checkpoint.open(model.output)).architecture for model in result.models}))


if __name__ == "__main__":
    main()
