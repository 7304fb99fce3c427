"""Reports a run's progress, as a bar on a terminal and as lines elsewhere, and times every stage.

The time left of a stage is told once its first layer is done. It is the mean time of the layers that this run has
passed, times those that are left.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from orchestrator.secrets import masked
from orchestrator.terminal import open_console

# The least time between two lines, if lines are printed instead of a bar.
LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Work:
    """What a step computes: how many, and of what."""

    size: int
    of: str


class Reporter:
    """A display of a run's stage, layer, rate and time left, which also keeps the seconds of each stage.

    Args:
        console: Where to print; stderr by default.
        verbose: Whether to print details too.
    """

    def __init__(self, console: Console | None = None, *, verbose: bool = False) -> None:
        self.console = console or open_console(stderr=True)
        self.verbose = verbose
        self.seconds: dict[str, float] = {}

    def continued(self) -> "Reporter":
        """Return a new reporter on the same console that continues from a copy of this one's seconds."""
        reporter = Reporter(self.console, verbose=self.verbose)
        reporter.seconds |= self.seconds
        return reporter

    def note(self, text: str) -> None:
        """Print a line with its secrets masked."""
        self.console.print(masked(text), soft_wrap=True, markup=False)

    def detail(self, text: str) -> None:
        """Print a line if the reporter is verbose."""
        if self.verbose:
            self.note(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.print(f"warning: {masked(text)}", style="yellow", soft_wrap=True, markup=False)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent in the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def layers(self, stage: str, num_layers: int, tokens: int, first: int = 0) -> Iterator[int]:
        """Yield the layers from `first` on and show the progress; `tokens` pass through each of them."""
        return self.steps(stage, "layer", num_layers, tokens, first)

    def steps(
        self, stage: str, unit: str, number: int, size: int, first: int = 0, of: str = "tokens"
    ) -> Generator[int]:
        """Yield the steps of a stage from `first` on and show the progress.

        Args:
            stage: The stage.
            unit: What a step is called: "layer", "batch" or "step".
            number: How many steps the stage has.
            size: How many tokens a step computes.
            first: The first step to do.
            of: What `size` counts, if not tokens.
        """
        if first == number:
            return
        with self.timed(stage):
            shown = self._bar if self.console.is_terminal else self._lines
            yield from shown(stage, unit, range(first, number), Work(size, of))

    def _bar(self, stage: str, unit: str, steps: range, work: Work) -> Iterator[int]:
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
        )
        start = time.perf_counter()
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(stage, total=steps.stop, completed=steps.start, told=f"{unit}s")
            for done, step in enumerate(steps, start=1):
                yield step
                progress.update(task, advance=1, told=f"{unit}s  {_describe(done, unit, len(steps), work, start)}")

    def _lines(self, stage: str, unit: str, steps: range, work: Work) -> Iterator[int]:
        start = time.perf_counter()
        told = start
        for done, step in enumerate(steps, start=1):
            yield step
            now = time.perf_counter()
            if now - told > LINE_SECONDS or done == len(steps):
                told = now
                described = _describe(done, unit, len(steps), work, start)
                self.note(f"{stage}: {unit} {step + 1}/{steps.stop}, {described}")


def _describe(done: int, unit: str, steps: int, work: Work, start: float) -> str:
    """Return the rate of the steps that are done, and the time that the others will take at this rate."""
    seconds = max(time.perf_counter() - start, 1e-9)
    left = timedelta(seconds=round(seconds / done * (steps - done)))
    per_layer = " per layer" if unit == "layer" else ""
    return f"{done * work.size / seconds:,.0f} {work.of}/s{per_layer}, {left} left of this stage"
