"""Measures what each method is worth on real models, tuned and not: `make results` writes the README's table.

Every step is done once: its models and figures stay in a folder, so a run that was cut off goes on where it stopped.
Remove the folder to measure anew.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import describe_machine, write_table
from benchmarks.real_model import cache_folder, real_model, write_blocks
from orchestrator import BenchConfig, EvaluateConfig, PruneConfig, TuneConfig, bench, evaluate, prune, tune
from orchestrator.evaluation.results import TextResult
from orchestrator.output.notes import Notes
from orchestrator.record.figures import draw_perplexity_over_sparsity

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TEXTS = SHARED / "data" / "wikitext2"
RESULT = ROOT / "benchmarks" / "results" / "headline.md"
FIGURE = ROOT / "docs" / "images" / "headline.png"

SPARSITIES = (0.2, 0.4)
METHODS: dict[str, dict[str, Any]] = {
    "slimllm": {"method": "slimllm"},
    "flap": {"method": "flap"},
    "slimgpt": {"method": "slimgpt"},
    "gram": {"method": "gram"},
    "gram --refine": {"method": "gram", "refine": True},
}
# Tokens of a training's sequences, and their number: they follow the calibration blocks in the same text.
TRAINING_LENGTH, TRAINING_SEQUENCES = 256, 400
PROMPT, ROUNDS = 384, 5

TITLE = "Every method on real models, tuned and not"
EXPLANATION = """\
Perplexity and KL(dense || pruned), in nats per token, on WikiText-2 (test), after calibration on the start of
WikiText-2 (valid). "Tuned" is `slimllm tune` with its defaults but for the steps: it distils the dense model, on the
text after the calibration blocks: {training}.
Speed-up is that of a prompt of {prompt} tokens on the CPU, MB those of the weights. Seconds are those of the whole
command; a pruning's are divided by its number of models. `make results` writes this file and the figure"""
HEADINGS = (
    *("model", "sparsity", "method", "perplexity", "KL", "tuned: perplexity", "tuned: KL"),
    *("speed-up", "MB", "seconds to prune", "to tune"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and the texts and steps it gets.

    Attributes:
        name: The model's name.
        model: Returns the model's directory.
        length: Tokens of a block to calibrate and evaluate on.
        calibration: The number of blocks to calibrate on.
        held_out: The number of blocks to evaluate on.
        training: Settings of the trainings.
    """

    name: str
    model: Callable[[], Path]
    length: int
    calibration: int
    held_out: int
    training: dict[str, Any]

    @property
    def training_told(self) -> str:
        """The trainings' steps in words."""
        steps, size = self.training["steps"], self.training["batch_size"]
        return f"{steps} steps of {size} x {TRAINING_LENGTH} tokens for {self.name}"


CASES = (
    Case(
        name="lab-llama-11m",
        model=lambda: SHARED / "models" / "lab-llama-11m",
        length=256,
        calibration=128,
        held_out=96,
        training={"steps": 100, "batch_size": 4},
    ),
    Case(
        name="SmolLM2-135M-Instruct",
        model=real_model,
        length=1024,
        calibration=40,
        held_out=24,
        training={"steps": 25, "batch_size": 2},
    ),
)


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What one model is worth: its perplexity, KL divergence to the dense model in nats per token, and bytes."""

    perplexity: float
    divergence: float
    num_bytes: int


class Study:
    """Makes and measures the models of a case, each once.

    Args:
        case: The case.
        texts: The folder of valid.txt and test.txt.
        work: The folder that keeps the models and figures.
    """

    def __init__(self, case: Case, texts: Path, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.case, self.work, self.notes = case, work, Notes(work / "notes.json")
        self.dense = case.model()
        start = case.calibration * case.length // TRAINING_LENGTH
        valid, test = texts / "valid.txt", texts / "test.txt"
        self.calibration = write_blocks(self.dense, valid, case.calibration, case.length, work / "calibration.parquet")
        self.held_out = write_blocks(self.dense, test, case.held_out, case.length, work / "held-out.parquet")
        self.training = write_blocks(
            self.dense, valid, TRAINING_SEQUENCES, TRAINING_LENGTH, work / "training.parquet", start
        )

    def prune(self, method: str) -> float:
        """Prune the model to every sparsity; return the seconds for each."""

        def run() -> None:
            settings = {"model": str(self.dense), "calibration": str(self.calibration), "sparsity": SPARSITIES}
            prune(PruneConfig(**settings, output=str(self.work / method), **self._here(), **METHODS[method]))

        return self._timed(f"prune by {method}", run) / len(SPARSITIES)

    def tune(self, method: str, sparsity: float) -> float:
        """Tune a pruned model; return the seconds."""

        def run() -> None:
            places = {"checkpoint": str(self.pruned(method, sparsity)), "output": str(self.tuned(method, sparsity))}
            lengths = {"sequence_length": TRAINING_LENGTH, **self.case.training}
            tune(TuneConfig(**places, data=str(self.training), **lengths, **self._here()))

        return self._timed(f"tune {method} at {sparsity}", run)

    def measure(self, name: str, models: Sequence[Path]) -> list[Worth]:
        """Return what the dense model and others are worth."""

        def run() -> list[dict[str, Any]]:
            places = tuple(map(str, (self.dense, *models)))
            settings = {"data": (str(self.held_out),), "output": str(self.work / "evaluation")}
            found = evaluate(EvaluateConfig(models=places, **settings, **self._here())).models
            return [asdict(_worth(one.texts[0], Path(place))) for one, place in zip(found, places, strict=True)]

        return [Worth(**one) for one in self.notes.once(f"worth of {name}", run)]

    def measure_all(self, sparsity: float) -> tuple[list[Worth], list[Worth]]:
        """Return what the pruned and the tuned models of a sparsity are worth, in the order of the methods."""
        models = [place(method, sparsity) for place in (self.pruned, self.tuned) for method in METHODS]
        _, *found = self.measure(f"models at {sparsity}", models)
        return found[: len(METHODS)], found[len(METHODS) :]

    def time(self) -> dict[str, float]:
        """Return how many times faster than the dense model each pruned one takes in a prompt, by its place."""
        places = {
            f"{method} {sparsity}": self.pruned(method, sparsity) for method in METHODS for sparsity in SPARSITIES
        }

        def run() -> dict[str, float]:
            models = (str(self.dense), *map(str, places.values()))
            shapes = {"batch_size": (1,), "prompt_length": (PROMPT,), "new_tokens": 2, "rounds": ROUNDS}
            rows = bench(BenchConfig(models=models, tracking_uri="none", **shapes)).figures.rows
            return {place: row.prefill_ratio for place, row in zip(places, rows[1:], strict=True)}

        return dict(self.notes.once("speed", run))

    def pruned(self, method: str, sparsity: float) -> Path:
        """Return the place of a pruned model."""
        return self.work / method / f"sparsity-{sparsity:.2f}"

    def tuned(self, method: str, sparsity: float) -> Path:
        """Return the place of a tuned model."""
        return self.work / "tuned" / f"{method}-{sparsity}"

    def _timed(self, name: str, run: Callable[[], None]) -> float:
        def measure() -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return float(self.notes.once(f"seconds to {name}", measure))

    def _here(self) -> dict[str, Any]:
        return {"local": True, "tracking_uri": "none", "overwrite": True}


def measure(study: Study) -> Iterator[list[str]]:
    """Make and measure every model of a case; yield the table's rows."""
    (dense,) = study.measure("dense", [])
    name = study.case.name
    yield [name, "", "dense", *_shown(dense), "", "", "1.00", _megabytes(dense), "", ""]
    pruning = {method: study.prune(method) for method in METHODS}
    faster = study.time()
    for sparsity in SPARSITIES:
        tuning = {method: study.tune(method, sparsity) for method in METHODS}
        for method, before, after in zip(METHODS, *study.measure_all(sparsity), strict=True):
            seconds = [f"{pruning[method]:.0f}", f"{tuning[method]:.0f}"]
            speed = f"{faster[f'{method} {sparsity}']:.2f}"
            figures = [*_shown(before), *_shown(after), speed, _megabytes(before), *seconds]
            yield [name, f"{sparsity:.0%}", f"`{method}`", *figures]


def draw(study: Study, figure: Path) -> None:
    """Draw perplexity over sparsity: a curve for each method, and one for the last method's tuned models."""
    last = list(METHODS)[-1]
    curves: dict[str, list[tuple[float, float]]] = {method: [] for method in (*METHODS, f"{last}, tuned")}
    for sparsity in SPARSITIES:
        pruned, tuned = study.measure_all(sparsity)
        for curve, worth in zip(curves.values(), (*pruned, tuned[-1]), strict=True):
            curve.append((sparsity, worth.perplexity))
    (dense,) = study.measure("dense", [])
    draw_perplexity_over_sparsity(curves, dense.perplexity, figure)


def _worth(text: TextResult, model: Path) -> Worth:
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    divergence = 0.0 if text.distance is None else text.distance.mean
    return Worth(perplexity=text.perplexity, divergence=divergence, num_bytes=size)


def _shown(worth: Worth) -> list[str]:
    return [f"{worth.perplexity:.2f}", f"{worth.divergence:.3f}"]


def _megabytes(worth: Worth) -> str:
    return f"{worth.num_bytes / 1e6:.1f}"


@click.command()
@click.option("--texts", type=Path, default=TEXTS, help="Folder that holds valid.txt and test.txt.")
@click.option("--case", "chosen", type=int, multiple=True, help="Measure these cases only, numbered from 0.")
@click.option("--work", type=Path, help="Folder that keeps models and figures; by default, one in the user's cache.")
@click.option("--output", type=Path, default=RESULT)
@click.option("--figure", type=Path, default=FIGURE)
def main(texts: Path, chosen: Sequence[int], work: Path | None, output: Path, figure: Path) -> None:
    """Measure all cases, and rewrite the table after each model; the figure is of the last case."""
    work = work or cache_folder() / "headline"
    rows, machine = [list(HEADINGS)], describe_machine()
    explanation = EXPLANATION.format(prompt=PROMPT, training=" and ".join(case.training_told for case in CASES))
    for number, case in enumerate(CASES):
        if chosen and number not in chosen:
            continue
        study = Study(case, texts, work / case.name)
        for row in measure(study):
            rows.append(row)
            write_table(output, TITLE, f"{explanation}.\n\nOne worker, on {machine}", rows)
        draw(study, figure)


if __name__ == "__main__":
    main()
