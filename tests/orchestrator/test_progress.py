"""Progress of a run: a bar on a terminal, lines elsewhere."""

import io

import pytest
from rich.console import Console

from orchestrator import progress
from orchestrator.progress import Reporter


def shown(is_terminal: bool, num_layers: int = 3) -> tuple[str, Reporter]:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120, highlight=False)
    reporter = Reporter(console)
    assert list(reporter.layers("pruning", num_layers, tokens=1000)) == list(range(num_layers))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), reporter


def test_elsewhere_than_on_a_terminal_a_stage_ends_with_one_plain_line() -> None:
    text, reporter = shown(is_terminal=False)
    assert text.startswith("pruning: layer 3/3, ")
    assert text.endswith(" tokens/s per layer, 0:00:00 left of this stage\n")
    assert text.count("\n") == 1
    assert reporter.seconds["pruning"] > 0


def test_lines_come_as_the_layers_go_where_these_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    text, _ = shown(is_terminal=False)
    assert [line.split(",")[0] for line in text.splitlines()] == [f"pruning: layer {n}/3" for n in (1, 2, 3)]


def test_on_a_terminal_there_is_a_bar_with_stage_layer_and_rate() -> None:
    text, _ = shown(is_terminal=True)
    assert "\x1b[" in text
    for part in ("pruning", "3/3", "layers", "tokens/s"):
        assert part in text


@pytest.mark.parametrize("is_terminal", [False, True], ids=["lines", "bar"])
@pytest.mark.parametrize("first", [0, 2], ids=["new", "resumed"])
def test_the_time_left_is_told_after_the_first_layer_however_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, first: int
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120, highlight=False)
    layers = Reporter(console).layers("pruning", 6, tokens=1000, first=first)
    assert next(layers) == first
    clock[0] += 1800
    assert next(layers) == first + 1
    assert isinstance(console.file, io.StringIO)
    # The bar is drawn again when the stage ends.
    layers.close()  # type: ignore[attr-defined]
    left = {0: "2:30:00", 2: "1:30:00"}[first]
    assert f"{left} left of this stage" in console.file.getvalue()


def test_the_seconds_of_a_stage_add_up() -> None:
    reporter = Reporter(Console(file=io.StringIO()))
    for _ in range(2):
        with reporter.timed("stage"):
            pass
    first = reporter.seconds["stage"]
    with reporter.timed("stage"):
        pass
    assert reporter.seconds["stage"] > first


def test_notes_and_warnings_are_lines_as_they_are_written() -> None:
    file = io.StringIO()
    reporter = Reporter(Console(file=file, width=20))
    reporter.note("a [note] that is longer than the console is wide")
    reporter.warn("take care")
    assert file.getvalue().splitlines() == [
        "a [note] that is longer than the console is wide",
        "warning: take care",
    ]
