"""Opens consoles that print every name as it is."""

from rich.console import Console


def open_console(*, stderr: bool = False) -> Console:
    """Return a console that takes no part of a name for a style, such as "[red]", or an emoji, such as ":x:"."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)
