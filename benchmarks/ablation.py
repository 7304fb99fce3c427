"""Measures what each step from SlimLLM to `gram` is worth: `make ablation` writes benchmarks/results/ablation.md.

It prunes three small models at two of the paper's settings each. All models of a column use the same calibration
tokens, and have as many parameters as the published method leaves. The rows are contestants like any other; those that
are no method of the package are composed here from its steps.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from benchmarks.budgets import SCALES, gram_that_spends, spend_by_scale
from benchmarks.machine import describe_machine, write_table
from orchestrator.comparison.compare import Comparison, compare
from orchestrator.comparison.contestants import LAYER_BY_LAYER, REFINED, Contestant, one_pass
from orchestrator.config import CompareConfig
from orchestrator.pruning.layerwise import prune_layerwise
from orchestrator.pruning.one_pass import Ranked, rank_modules, write_models
from orchestrator.pruning.run_context import RunContext
from orchestrator.pruning.targets import Target
from slimllm_ops.allocate.budget import Candidate
from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.methods import METHODS
from slimllm_ops.models.pair import Pair
from slimllm_ops.moments.ranking import Ranking

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
RESULT = ROOT / "benchmarks" / "results" / "ablation.md"

TITLE = "What each step from SlimLLM to gram is worth"
EXPLANATION = """\
Gap to the dense model's held-out loss, as a fraction of the gap that the published SlimLLM leaves, at the same
parameter count. Percentages are of all parameters, embeddings included. `make ablation` writes this file."""


@dataclass(frozen=True)
class Setting:
    """A column of the table: a model and the paper's settings."""

    model: str
    tokens: str
    ratio: float
    pruned_layers: int
    alpha: float


# Small models first: the last one takes most of the time.
SETTINGS = (
    Setting("stories260k-mha", "stories260k", 0.25, 4, 10.0),
    Setting("stories260k-mha", "stories260k", 0.55, 3, 7.0),
    Setting("babyllama-mha", "babyllama", 0.25, 4, 10.0),
    Setting("babyllama-mha", "babyllama", 0.55, 3, 7.0),
    Setting("lab-llama-11m", "lab", 0.25, 6, 10.0),
    Setting("lab-llama-11m", "lab", 0.55, 7, 7.0),
)


class PublishedChoice:
    """SlimLLM as published, and two variants that reuse its choices."""

    def __init__(self) -> None:
        self._layers: list[LayerPlan] = []

    def prune(self, context: RunContext, store: MomentStore, targets: list[Target]) -> None:
        """Prune as published, and remember the decisions."""
        prune_layerwise(context, targets)
        self._layers = targets[0].pruned.log.plans

    def refit(self, context: RunContext, store: MomentStore, targets: list[Target]) -> None:
        """Keep what the paper keeps, but recover by least squares from the dense model's moments, in one pass."""
        self._write(context, store, targets, lambda ranking, decision: _order_of(decision) if decision else ranking)

    def eliminate(self, context: RunContext, store: MomentStore, targets: list[Target]) -> None:
        """Keep as many units in each module as the paper does, but choose them by elimination."""
        self._write(context, store, targets, lambda ranking, decision: ranking)

    def _write(
        self,
        context: RunContext,
        store: MomentStore,
        targets: list[Target],
        rank: Callable[[Ranking, Decision | None], Ranking],
    ) -> None:
        decisions = [Pair(layer.attention, layer.mlp) for layer in self._layers]
        counts = [decision.num_removed if decision else 0 for pair in decisions for decision in pair]
        method = replace(METHODS["gram"], spend=lambda candidates, target: counts)

        def reorder(candidate: Candidate, decision: Decision | None) -> Candidate:
            return replace(candidate, ranking=rank(candidate.ranking, decision))

        dense = rank_modules(context, store, method)
        candidates = [one.join(decided, reorder) for one, decided in zip(dense.candidates, decisions, strict=True)]
        write_models(context, store, Ranked(method, candidates, context.inputs.form), targets)


def _order_of(decision: Decision) -> Ranking:
    """Return an order that starts with the units that a decision removed."""
    order = sorted(range(decision.num_units), key=lambda unit: unit in decision.kept)
    return Ranking(tuple(order), (0.0,) * len(order))


def rows() -> list[tuple[str, Contestant]]:
    """Return the table's rows: the name and the contestant of each."""
    published = PublishedChoice()
    budgets = [
        (f"budget over all layers, divided by {name}", gram_that_spends(spend_by_scale(scale)))
        for name, scale in SCALES.items()
    ]
    named = [
        ("SlimLLM, published", replace(LAYER_BY_LAYER, prune=published.prune)),
        ("FLAP's metric and bias compensation", one_pass(METHODS["flap"])),
        ("paper's choice + full least squares, one pass", Contestant("", "", published.refit)),
        ("paper's counts + elimination order, one pass", Contestant("", "", published.eliminate)),
        *budgets,
        ("elimination and budget by the loss, 1/2 e^T F e (`gram`)", one_pass(METHODS["gram"])),
        ("`gram --refine`", REFINED),
    ]
    # Contestants need distinct names; the first keeps the published method's.
    return [named[0]] + [(name, replace(one, name=f"row-{n}")) for n, (name, one) in enumerate(named[1:], start=1)]


def measure(setting: Setting, contestants: Sequence[Contestant], shared: Path, work: Path) -> Comparison:
    """Run all contestants of a column."""
    tokens = shared / "golden" / "tokens"
    config = CompareConfig(
        model=str(shared / "models" / setting.model),
        ratio=setting.ratio,
        pruned_layers=setting.pruned_layers,
        alpha=setting.alpha,
        calibration=str(tokens / f"{setting.tokens}.calibration.parquet"),
        evaluate=(str(tokens / f"{setting.tokens}.heldout.parquet"),),
        local=True,
        output=str(work / f"{setting.model}-{setting.ratio:g}"),
        tracking_uri="none",
    )
    return compare(config, chosen=contestants)


def tabulate(names: Sequence[str], columns: dict[Setting, Comparison]) -> list[list[str]]:
    """Return the table's rows, the heading first."""
    heading, table = [""], [["dense (loss)"], ["SlimLLM, published (loss)"], *([name] for name in names)]
    for setting, comparison in columns.items():
        dense, *models = comparison.rows
        heading.append(f"{setting.model}, ratio {setting.ratio:g} ({1 - models[0].parameters / dense.parameters:.0%})")
        gaps = [f"{row.gap:.3f}" if row.gap < 1 else f"{row.gap:.2f}" for row in models]
        for line, cell in zip(table, [f"{dense.loss:.4f}", f"{models[0].loss:.4f}", *gaps], strict=True):
            line.append(cell)
    return [heading, *table]


@click.command()
@click.argument("models", nargs=-1)
@click.option("--ratio", "ratios", type=float, multiple=True, help="Measure only columns with this ratio; repeatable.")
@click.option("--shared", type=Path, default=SHARED, help="Folder that holds models/ and golden/tokens/.")
@click.option("--output", type=Path, default=RESULT)
def main(models: tuple[str, ...], ratios: tuple[float, ...], shared: Path, output: Path) -> None:
    """Measure all columns, or only those of MODELS, and rewrite the table after each."""
    settings = [
        one for one in SETTINGS if one.model in (models or [one.model]) and one.ratio in (ratios or [one.ratio])
    ]
    if not settings:
        raise click.UsageError(
            f"no column matches {', '.join(models)}: choose from {', '.join({s.model: 0 for s in SETTINGS})}"
        )
    start = time.perf_counter()
    columns: dict[Setting, Comparison] = {}
    with tempfile.TemporaryDirectory() as work:
        for setting in settings:
            named = rows()
            columns[setting] = measure(setting, [contestant for _, contestant in named], shared, Path(work))
            spent = f"{(time.perf_counter() - start) / 60:.0f} minutes, one worker, on {describe_machine()}"
            write_table(output, TITLE, f"{EXPLANATION}\n\n{spent}", tabulate([n for n, _ in named], columns))


if __name__ == "__main__":
    main()
