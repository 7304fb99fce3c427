"""Measures every method on a real model: `make truth` writes benchmarks/results/truth.md.

The other tables use models of a few million parameters. What holds there need not hold here: this table decides.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.budgets import SCALES, gram_that_spends, spend_by_scale, spend_on_channels_evenly
from benchmarks.machine import describe_machine, write_table
from benchmarks.real_model import real_model, write_blocks
from orchestrator.comparison.compare import Comparison, compare
from orchestrator.comparison.contestants import LAYER_BY_LAYER, REFINED, Contestant, one_pass
from orchestrator.config import CompareConfig
from slimllm_ops.methods import METHODS

ROOT = Path(__file__).parents[1]
TEXTS = ROOT.parent / "shared" / "data" / "wikitext2"
RESULT = ROOT / "benchmarks" / "results" / "truth.md"
LENGTH, CALIBRATION_BLOCKS, HELD_OUT_BLOCKS = 1024, 40, 24

TITLE = "Every method on a real model"
EXPLANATION = """\
SmolLM2-135M-Instruct: perplexity on {held_out} x {length} tokens of WikiText-2 (test) after calibration on
{calibration} x {length} (valid), and the gap to the dense model's loss as a fraction of the gap that SlimLLM leaves.
Sparsity is the fraction of the parameters in the decoder layers. `make truth` writes this file"""


def rows() -> list[tuple[str, Contestant]]:
    """Return the table's rows: the name and the contestant of each."""
    powers = "the stream's and the output's to the powers of .75 and .25"
    named = [
        ("`slimllm`", LAYER_BY_LAYER),
        *((f"`{name}`", one_pass(METHODS[name])) for name in ("flap", "fasp")),
        (f"`gram`, errors divided by {powers}", gram_that_spends(spend_by_scale(SCALES[powers]))),
        ("`gram`, the same share of every MLP's channels, no heads", gram_that_spends(spend_on_channels_evenly)),
        ("`gram`", one_pass(METHODS["gram"])),
        ("`gram --refine`", REFINED),
    ]
    return [named[0]] + [(name, replace(one, name=f"row-{n}")) for n, (name, one) in enumerate(named[1:], start=1)]


def measure(model: Path, texts: Path, contestants: Sequence[Contestant], sparsity: float, work: Path) -> Comparison:
    """Run all contestants at a sparsity."""
    calibration = write_blocks(model, texts / "valid.txt", CALIBRATION_BLOCKS, LENGTH, work / "calibration.parquet")
    held_out = write_blocks(model, texts / "test.txt", HELD_OUT_BLOCKS, LENGTH, work / "held-out.parquet")
    config = CompareConfig(
        model=str(model),
        sparsity=(sparsity,),
        calibration=str(calibration),
        evaluate=(str(held_out),),
        local=True,
        output=str(work / f"{sparsity:g}"),
        tracking_uri="none",
    )
    return compare(config, chosen=contestants)


def tabulate(names: Sequence[str], columns: dict[float, Comparison]) -> list[list[str]]:
    """Return the table's rows, the heading first."""
    heading, table = [""], [["dense"], *([name] for name in names)]
    for sparsity, comparison in columns.items():
        heading += [f"{sparsity:.0%}: perplexity", f"{sparsity:.0%}: gap"]
        dense, *models = comparison.rows
        cells = [("", dense), *((f"{row.gap:.2f}", row) for row in models)]
        for line, (gap, row) in zip(table, cells, strict=True):
            line += [f"{row.perplexity:.2f}", gap]
    return [heading, *table]


@click.command()
@click.option("--model", type=Path, help="Another model; by default, SmolLM2-135M-Instruct from the registry.")
@click.option("--texts", type=Path, default=TEXTS, help="Folder that holds valid.txt and test.txt.")
@click.option("--sparsity", "sparsities", type=float, multiple=True, default=(0.2, 0.4))
@click.option("--output", type=Path, default=RESULT)
def main(model: Path | None, texts: Path, sparsities: tuple[float, ...], output: Path) -> None:
    """Measure all rows, and rewrite the table after each sparsity."""
    start, named = time.perf_counter(), rows()
    explanation = EXPLANATION.format(length=LENGTH, calibration=CALIBRATION_BLOCKS, held_out=HELD_OUT_BLOCKS)
    columns: dict[float, Comparison] = {}
    with tempfile.TemporaryDirectory() as work:
        for sparsity in sparsities:
            contestants = [contestant for _, contestant in named]
            columns[sparsity] = measure(model or real_model(), texts, contestants, sparsity, Path(work))
            spent = f"{(time.perf_counter() - start) / 60:.0f} minutes, one worker, on {describe_machine()}"
            write_table(output, TITLE, f"{explanation}.\n\n{spent}", tabulate([name for name, _ in named], columns))


if __name__ == "__main__":
    main()
