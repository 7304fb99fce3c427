"""Shows when a run of `gram` observes and when it solves, from Ray's own trace: `python -m benchmarks.timeline`.

It prunes a random checkpoint of 8 layers, hidden 1024, with one worker of one thread, so one core is left for solves.
A layer is solved while the next is observed: the table says when, and how much of the solving overlapped observing.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import ray

from benchmarks.local_ray import local_ray
from benchmarks.machine import describe_machine, figure, write_table
from benchmarks.random_model import Shape, shape_options, write_model
from benchmarks.random_tokens import write_tokens
from orchestrator.config import PruneConfig
from orchestrator.pipeline import prune

COLUMNS = 72
# The names in Ray's trace of a module's two steps.
OBSERVING, SOLVING = "Shard: {}, observe_dense", "eliminate_observed {}"
# The longest wait for the trace; Ray's workers report every second.
TRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Span:
    """A piece of work, in seconds."""

    start: float
    stop: float

    def overlap(self, other: "Span") -> float:
        """Return the seconds that two spans share."""
        return max(0.0, min(self.stop, other.stop) - max(self.start, other.start))


@click.command()
@shape_options(Shape(hidden=1024, intermediate=2816, layers=8, heads=16, kv_heads=4))
@click.option("--blocks", default=12, help="Blocks of tokens.")
@click.option("--block-length", default=2048, help="Tokens per block.")
@click.option("--output", type=Path, default=Path("benchmarks/results/timeline.md"))
def main(
    shape: Shape,
    blocks: int,
    block_length: int,
    output: Path,
) -> None:
    """Run once and write the table."""
    modules = [f"layer {layer}, {module}" for layer in range(shape.layers) for module in ("self_attn", "mlp")]
    observing, solving = ([form.format(one) for one in modules] for form in (OBSERVING, SOLVING))
    with local_ray(num_cpus=2), tempfile.TemporaryDirectory() as folder:
        start = time.time()
        _prune(Path(folder), shape, blocks, block_length)
        trace = _trace(start, dict.fromkeys([*observing, *solving], 1))
    observed, solved = ([trace[name][0] for name in names] for names in (observing, solving))
    begin = min(span.start for span in observed)
    rows = [["layer", "observed, s", "attention solved, s", "MLP solved, s"]]
    for layer in range(shape.layers):
        whole = Span(observed[2 * layer].start, observed[2 * layer + 1].stop)
        spans = (whole, solved[2 * layer], solved[2 * layer + 1])
        rows.append([str(layer), *(f"{span.start - begin:.2f} to {span.stop - begin:.2f}" for span in spans)])
    title = f"Timeline of gram: hidden {shape.hidden}, {shape.layers} layers, {blocks} x {block_length} tokens"
    write_table(output, title, describe_machine(), rows, _summary(observed, solved, begin))


def _prune(folder: Path, shape: Shape, blocks: int, block_length: int) -> None:
    prune(
        PruneConfig(
            model=str(write_model(folder / "model", shape)),
            calibration=str(write_tokens(folder / "tokens.parquet", blocks, block_length, shape.vocabulary)),
            output=str(folder / "pruned"),
            tracking_uri=f"sqlite:///{folder}/mlflow.db",
            method="gram",
            workers=1,
        )
    )


def _trace(start: float, expected: dict[str, int]) -> dict[str, list[Span]]:
    """Wait until Ray has reported all calls since `start`; return when each function ran, in order.

    Args:
        start: Seconds since the epoch.
        expected: The number of calls by function.
    """
    deadline = time.monotonic() + TRACE_SECONDS
    while True:
        events = [event for event in ray.timeline() if event["ts"] / 1e6 >= start]
        found = {name: _spans(events, name) for name in expected}
        missing = [name for name, count in expected.items() if len(found[name]) < count]
        if not missing:
            return found
        if time.monotonic() > deadline:
            raise SystemExit(f"Ray's trace lacks {missing}; it has {sorted({event['cat'] for event in events})}")
        time.sleep(0.2)


def _spans(events: list[dict[str, Any]], name: str) -> list[Span]:
    """Return when each call of a function ran, by start."""
    found = [event for event in events if event["cat"] == f"task::{name}"]
    return sorted((Span(e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in found), key=lambda span: span.start)


def _summary(observed: list[Span], solved: list[Span], begin: float) -> str:
    both = sum(one.overlap(other) for one in observed for other in solved)
    seconds = [sum(span.stop - span.start for span in spans) for spans in (observed, solved)]
    end = max(span.stop for span in (*observed, *solved))
    observing, solving, together = map(figure, (*seconds, end - begin))
    lines = [
        f"Observing took {observing} s, solving {solving} s, both together {together} s: "
        f"{both / seconds[1]:.0%} of the solving overlapped observing.",
        "",
        "```",
        f"observing  {_bar(observed, begin, end)}",
        f"solving    {_bar(solved, begin, end)}",
        "```",
    ]
    return "\n".join(lines)


def _bar(spans: list[Span], begin: float, end: float) -> str:
    """Return a line of characters, each for an equal span of time: the layer at work, or a dot."""
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
