"""What the form of a pruned model costs in perplexity: `python -m benchmarks.forms`.

lab-llama-11m, both methods, 20 and 40 % of the decoder layers: free, with alike layers, with channels by multiples,
without new biases, and all of these together, which is what a stock class takes; by gram also where layers may go. Each
uniform checkpoint is exported to a stock class, which checks that it computes the same to the last bit.
"""

import tempfile
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
SPARSITIES = (0.2, 0.4)
FORMS: dict[str, dict[str, Any]] = {
    "free": {},
    "uniform": {"uniform": True},
    "channels by 32": {"multiple_of": 32},
    "no bias": {"no_bias": True},
    "uniform, channels by 32, no bias": {"uniform": True, "multiple_of": 32, "no_bias": True},
}
METHODS: dict[str, dict[str, Any]] = {
    "slimllm": {"method": "slimllm"},
    "gram": {"method": "gram"},
    "gram, refined": {"method": "gram", "refine": True},
}
# Of gram's forms alone.
LAYERS_GO: dict[str, dict[str, Any]] = {
    "layers may go": {"drop_layers": True},
    "uniform, layers may go": {"drop_layers": True, "uniform": True},
}


@click.command()
@click.option("--output", type=Path, default=ROOT / "benchmarks" / "results" / "forms.md")
def main(output: Path) -> None:
    """Prune in every form by every method, and write the table."""
    rows = [["method, form", *(f"{sparsity:.0%}" for sparsity in SPARSITIES), "layers left", "stock class"]]
    with tempfile.TemporaryDirectory() as folder:
        for method, settings in METHODS.items():
            forms = FORMS if settings["method"] == "slimllm" else FORMS | LAYERS_GO
            for form, shapes in forms.items():
                result = _prune(Path(folder) / f"{method}, {form}", **settings, **shapes)
                if len(rows) == 1:
                    rows.append(["dense", *[f"{_perplexities(result)[0][0]:.2f}"] * 2, "", "LlamaForCausalLM"])
                pruned = [f"{after:.2f}" for _, after in _perplexities(result)]
                layers = ", ".join(str(model.totals.layers_after) for model in result.models)
                rows.append([f"{method}, {form}", *pruned, layers, _stock_class(result)])
                print(*rows[-1], sep=" | ", flush=True)
                write_table(output, "Perplexity of lab-llama-11m by form", describe_machine(), rows)


def _prune(output: Path, **settings: Any) -> PruneResult:
    tokens = SHARED / "golden" / "tokens"
    return prune(
        PruneConfig(
            model=str(SHARED / "models" / "lab-llama-11m"),
            calibration=str(tokens / "lab.calibration.parquet"),
            evaluate=(str(tokens / "lab.heldout.parquet"),),
            output=str(output),
            sparsity=SPARSITIES,
            tracking_uri=f"sqlite:///{output.parent}/mlflow.db",
            **settings,
        )
    )


def _perplexities(result: PruneResult) -> list[tuple[float, float]]:
    """Return the perplexity before and after, for every sparsity."""
    return [next(iter(model.totals.perplexity.values())) for model in result.models]


def _stock_class(result: PruneResult) -> str:
    """Return the stock class that takes every model of a run."""
    try:
        for model in result.models:
            export_stock(model.output, None, overwrite=True)
    except InputError:
        return "none"
    return ", ".join(sorted({stock_form(Checkpoint.open(model.output)).architecture for model in result.models}))


if __name__ == "__main__":
    main()
