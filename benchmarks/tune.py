"""Measures what training gets back after pruning: `make tune-table` writes benchmarks/results/tune.md."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import describe_machine, write_table
from benchmarks.real_model import real_model, write_blocks
from orchestrator import PruneConfig, TuneConfig, prune, tune
from orchestrator.tuning.result import TuneTotals

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TEXTS = SHARED / "data" / "wikitext2"
RESULT = ROOT / "benchmarks" / "results" / "tune.md"
HELD_OUT_BLOCKS = 24
# Words of a paragraph that `lora` learns to continue, and of its prompt.
LONG_PARAGRAPH, PROMPT = 60, 4

TITLE = "Training after pruning"
EXPLANATION = """\
Perplexity on {held_out} blocks of WikiText-2 (test), of the dense model, the pruned one and the tuned one. "Came back"
is the share of the loss beyond the dense model's that the training removed. The pruning is calibrated on the
first blocks of WikiText-2 (valid), and the training reads those after them; `lora` learns to continue the text's
paragraphs from their first words. `make tune-table` writes this file"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, how it is pruned, and the trainings that follow.

    Attributes:
        name: The model and the pruning, as the table names them.
        model: The model's directory; None for the real model.
        length: Tokens of a block.
        calibration: The number of blocks to calibrate on.
        training: The number of other blocks to train on.
        pruning: Settings of the pruning.
        trainings: Settings of each training by its name in the table.
    """

    name: str
    model: Path | None
    length: int
    calibration: int
    training: int
    pruning: dict[str, Any]
    trainings: dict[str, dict[str, Any]]


SHORT = {"steps": 100, "batch_size": 4}
METHODS: dict[str, dict[str, Any]] = {
    "`--method distil`": {"method": "distil", **SHORT},
    "`--method distil --full`": {"method": "distil", "full": True, **SHORT},
    "`--method full`": {"method": "full", **SHORT},
    "`--method lora`": {"method": "lora", **SHORT},
    "`--method blocks`": {"method": "blocks", "epochs": 1},
}
LAB = SHARED / "models" / "lab-llama-11m"
CASES = (
    Case(
        name="lab-llama-11m, `slimllm`, 50 %",
        model=LAB,
        length=256,
        calibration=128,
        training=420,
        pruning={"method": "slimllm", "sparsity": (0.5,)},
        trainings=METHODS,
    ),
    Case(
        name="lab-llama-11m, `gram --refine`, 50 %",
        model=LAB,
        length=256,
        calibration=128,
        training=420,
        pruning={"method": "gram", "refine": True, "sparsity": (0.5,)},
        trainings=METHODS,
    ),
    Case(
        name="SmolLM2-135M, `gram --refine`, 40 %",
        model=None,
        length=256,
        calibration=160,
        training=420,
        pruning={"method": "gram", "refine": True, "sparsity": (0.4,)},
        trainings={"`--method distil`": {"method": "distil", "steps": 200, "batch_size": 2}},
    ),
)


def measure(case: Case, texts: Path, work: Path) -> Iterator[tuple[str, TuneTotals, float]]:
    """Prune a case's model; yield the name, the figures and the seconds of each training."""
    model = case.model or real_model()
    calibration = write_blocks(model, texts / "valid.txt", case.calibration, case.length, work / "calibration.parquet")
    more = write_blocks(model, texts / "valid.txt", case.training, case.length, work / "more.parquet", case.calibration)
    held_out = write_blocks(model, texts / "test.txt", HELD_OUT_BLOCKS, case.length, work / "held-out.parquet")
    here = {"local": True, "tracking_uri": "none", "overwrite": True, "evaluate": (str(held_out),)}
    completions = write_completions(texts / "valid.txt", work / "completions.jsonl")
    pruned = work / "pruned"
    prune(PruneConfig(model=str(model), calibration=str(calibration), output=str(pruned), **here, **case.pruning))
    for name, settings in case.trainings.items():
        start = time.perf_counter()
        data = completions if settings["method"] == "lora" else more
        places = {"checkpoint": str(pruned), "output": str(work / "tuned"), "data": str(data)}
        result = tune(TuneConfig(**places, sequence_length=case.length, **here, **settings))
        assert result.totals is not None, "nothing was there before"
        yield name, result.totals, time.perf_counter() - start


def write_completions(text: Path, output: Path) -> Path:
    """Write a text's long paragraphs as prompts, their first words, and completions; return the file."""
    paragraphs = [words for words in map(str.split, text.read_text().splitlines()) if len(words) >= LONG_PARAGRAPH]
    rows = [{"prompt": " ".join(words[:PROMPT]), "completion": " ".join(words[PROMPT:])} for words in paragraphs]
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return output


def row_of(case: Case, name: str, totals: TuneTotals, seconds: float) -> list[str]:
    """Return a training's row."""
    ((spec, (dense, before, after)),) = totals.perplexity.items()
    share = totals.recovered_on(spec)
    shown = [f"{dense:.2f}" if dense else "", f"{before:.2f}", f"{after:.2f}", f"{share:.0%}" if share else ""]
    return [f"{case.name}, {name}", *shown, f"{totals.best_step}", f"{seconds:.0f}"]


@click.command()
@click.option("--texts", type=Path, default=TEXTS, help="Folder that holds valid.txt and test.txt.")
@click.option("--case", "chosen", type=int, multiple=True, help="Measure these cases only, numbered from 0.")
@click.option("--output", type=Path, default=RESULT)
def main(texts: Path, chosen: Sequence[int], output: Path) -> None:
    """Measure all cases, and rewrite the table after each training."""
    heading = ["", "dense", "before", "after", "came back", "best step", "seconds"]
    rows, machine = [heading], describe_machine()
    for number, case in enumerate(CASES):
        if chosen and number not in chosen:
            continue
        with tempfile.TemporaryDirectory() as work:
            for measured in measure(case, texts, Path(work)):
                rows.append(row_of(case, *measured))
                explanation = EXPLANATION.format(held_out=HELD_OUT_BLOCKS)
                write_table(output, TITLE, f"{explanation}.\n\nOne worker, on {machine}", rows)


if __name__ == "__main__":
    main()
