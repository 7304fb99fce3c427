"""Writes the tables of docs/options.md: every option of the commands that compute, as `--help` shows it.

`make docs` runs this module. It replaces the tables between the page's two marks for each command.
"""

from pathlib import Path

import click

from orchestrator.cli import main
from orchestrator.cli.options import groups_of, heading_of

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
COMMANDS = ("prune", "tune", "evaluate", "bench", "report")
BEGIN, END = "<!-- make docs writes this: {} -->", "<!-- until here: {} -->"
HEAD = ("| option | what it does | default | other commands |", "|---|---|---|---|")


def render_tables(command: str) -> str:
    """Return a table for each heading of a command's `--help`."""
    rows: dict[str, list[str]] = {heading: [] for heading in groups_of(command)}
    for option in _options_of(main.commands[command]):
        rows[heading_of(command, option.opts[-1])].append(_row(command, option))
    return "\n\n".join("\n".join([f"### {heading}\n", *HEAD, *group]) for heading, group in rows.items())


def with_tables(page: str) -> str:
    """Return the text of the page with its tables replaced by the current ones."""
    for command in COMMANDS:
        begin, end = BEGIN.format(command), END.format(command)
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{render_tables(command)}\n\n{end}{rest.partition(end)[2]}"
    return page


def _row(command: str, option: click.Option) -> str:
    does, _, default = (option.help or "").removesuffix("]").partition(" [")
    others = [
        f"`{name}`"
        for name, other in main.commands.items()
        if name != command and any(one.help == option.help for one in _options_of(other))
    ]
    words = f"{option.opts[-1]}{'' if option.is_flag else f' {option.metavar}'}"
    cells = (f"`{words}`", does.removesuffix("."), default.replace("<", r"\<"), ", ".join(others))
    return f"| {' | '.join(cells)} |"


def _options_of(command: click.Command) -> list[click.Option]:
    return [one for one in command.params if isinstance(one, click.Option)]


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
