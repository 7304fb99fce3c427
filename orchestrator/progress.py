"""What a run tells while it goes: a bar on a terminal, plain lines elsewhere, and the seconds of every stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orchestrator.secrets import masked

# Where lines are printed instead of a bar, one every so many seconds is enough.
LINE_SECONDS = 10.0


class Reporter:
    """Shows the stage, the layer, the rate and the time left on `console`; keeps the seconds of each stage.

    Args:
        console: where it is shown; stderr if it is not given.
        verbose: whether details are printed too.
    """

    def __init__(self, console: Console | None = None, *, verbose: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.verbose = verbose
        self.seconds: dict[str, float] = {}

    def continued(self) -> "Reporter":
        """Return another on the same console that goes on from this one's seconds, and leaves them as they are."""
        reporter = Reporter(self.console, verbose=self.verbose)
        reporter.seconds |= self.seconds
        return reporter

    def note(self, text: str) -> None:
        """Print a line, without secrets."""
        self.console.print(masked(text), soft_wrap=True, markup=False)

    def detail(self, text: str) -> None:
        """Print a line that only those want who look closely."""
        if self.verbose:
            self.note(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.print(f"warning: {masked(text)}", style="yellow", soft_wrap=True, markup=False)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def layers(self, stage: str, num_layers: int, tokens: int, first: int = 0) -> Iterator[int]:
        """Yield the layers from the first in order, showing how far they are; `tokens` pass each of them."""
        if first == num_layers:
            return
        with self.timed(stage):
            shown = self._bar if self.console.is_terminal else self._lines
            yield from shown(stage, range(first, num_layers), tokens)

    def _bar(self, stage: str, layers: range, tokens: int) -> Iterator[int]:
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("layers  {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        start = time.perf_counter()
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(stage, total=layers.stop, completed=layers.start, rate="")
            for done, layer in enumerate(layers, start=1):
                yield layer
                progress.update(task, advance=1, rate=_rate(done * tokens, start))

    def _lines(self, stage: str, layers: range, tokens: int) -> Iterator[int]:
        start = time.perf_counter()
        told = start
        for done, layer in enumerate(layers, start=1):
            yield layer
            now = time.perf_counter()
            if now - told > LINE_SECONDS or done == len(layers):
                told = now
                left = (now - start) / done * (len(layers) - done)
                self.note(f"{stage}: layer {layer + 1}/{layers.stop}, {_rate(done * tokens, start)}, {left:.0f} s left")


def _rate(layer_tokens: int, start: float) -> str:
    return f"{layer_tokens / max(time.perf_counter() - start, 1e-9):,.0f} tokens/s per layer"
