"""When a run of `gram` observes and when it solves, by Ray's own trace: `python -m benchmarks.timeline`.

A random checkpoint of 8 layers, hidden 1024, one worker of one thread and so one core for solves. A layer is solved
while the next is observed: the table says when, and how much of the solves lay beside observing.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import ray

from benchmarks.machine import describe_machine, write_table
from benchmarks.random_model import Shape, write_model
from benchmarks.random_tokens import write_tokens
from orchestrator.config import PruneConfig
from orchestrator.pipeline import prune

SHAPE = Shape(hidden=1024, intermediate=2816, layers=8, heads=16, kv_heads=4)
BLOCK = 2048
COLUMNS = 72


@dataclass(frozen=True)
class Span:
    """A piece of work, in seconds."""

    start: float
    stop: float

    def overlap(self, other: "Span") -> float:
        """Return the seconds that both have."""
        return max(0.0, min(self.stop, other.stop) - max(self.start, other.start))


@click.command()
@click.option("--blocks", default=12, help="Blocks of 2048 tokens.")
@click.option("--output", type=Path, default=Path("benchmarks/results/timeline.md"))
def main(blocks: int, output: Path) -> None:
    """Run once and write the table."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        config = PruneConfig(
            model=str(write_model(Path(folder) / "model", SHAPE)),
            calibration=str(write_tokens(Path(folder) / "tokens.parquet", blocks, BLOCK)),
            output=str(Path(folder) / "pruned"),
            tracking_uri=f"sqlite:///{folder}/mlflow.db",
            method="gram",
            workers=1,
        )
        prune(config)
    events = ray.timeline()
    ray.shutdown()
    modules = [f"layer {layer}, {module}" for layer in range(SHAPE.layers) for module in ("self_attn", "mlp")]
    observed = [_spans(events, f"{module}, observe_dense")[0] for module in modules]
    solved = [_spans(events, f"eliminate_observed {module}")[0] for module in modules]
    begin = min(span.start for span in observed)
    rows = [["layer", "observed, s", "attention solved, s", "MLP solved, s"]]
    for layer in range(SHAPE.layers):
        whole = Span(observed[2 * layer].start, observed[2 * layer + 1].stop)
        spans = (whole, solved[2 * layer], solved[2 * layer + 1])
        rows.append([str(layer), *(f"{span.start - begin:.1f} to {span.stop - begin:.1f}" for span in spans)])
    title = f"Timeline of gram: hidden 1024, {SHAPE.layers} layers, {blocks} x {BLOCK} tokens"
    write_table(output, title, describe_machine(), rows, _summary(observed, solved, begin))


def _spans(events: list[dict[str, Any]], name: str) -> list[Span]:
    """Return when a function ran, each time, in the order in which its calls were made."""
    found = [event for event in events if event["cat"] == f"task::{name}"]
    if not found:
        raise SystemExit(f"Ray's trace has no {name}; it has {sorted({event['cat'] for event in events})}")
    return sorted((Span(e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in found), key=lambda span: span.start)


def _summary(observed: list[Span], solved: list[Span], begin: float) -> str:
    both = sum(one.overlap(other) for one in observed for other in solved)
    seconds = [sum(span.stop - span.start for span in spans) for spans in (observed, solved)]
    end = max(span.stop for span in (*observed, *solved))
    lines = [
        f"Observing took {seconds[0]:.1f} s, solving {seconds[1]:.1f} s, both together {end - begin:.1f} s: "
        f"{both / seconds[1]:.0%} of the solves lay beside observing.",
        "",
        "```",
        f"observing  {_bar(observed, begin, end)}",
        f"solving    {_bar(solved, begin, end)}",
        "```",
    ]
    return "\n".join(lines)


def _bar(spans: list[Span], begin: float, end: float) -> str:
    """Return a line of characters, each as long as the others: the layer at work, or a dot."""
    width = (end - begin) / COLUMNS
    line = ["."] * COLUMNS
    for number, span in enumerate(spans):
        for column in range(COLUMNS):
            middle = begin + (column + 0.5) * width
            if span.start <= middle < span.stop:
                line[column] = str(number // 2 % 10)
    return "".join(line)


if __name__ == "__main__":
    main()
