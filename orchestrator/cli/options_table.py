"""Writes the tables of docs/options.md: every option of `slimllm prune`, as its `--help` shows it.

`make docs` runs this module. It replaces the tables between the page's two marks.
"""

from pathlib import Path

import click

from orchestrator.cli import main
from orchestrator.cli.options import GROUPS, HEADINGS

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
BEGIN, END = "<!-- make docs writes this -->", "<!-- until here -->"
HEAD = ("| option | what it does | default | other commands |", "|---|---|---|---|")


def render_tables() -> str:
    """Return a table for each heading of `slimllm prune --help`."""
    rows: dict[str, list[str]] = {heading: [] for heading in GROUPS}
    for option in _options_of(main.commands["prune"]):
        rows[HEADINGS[option.opts[-1]]].append(_row(option))
    return "\n\n".join("\n".join([f"### {heading}\n", *HEAD, *group]) for heading, group in rows.items())


def with_tables(page: str) -> str:
    """Return the text of the page with its tables replaced by the current ones."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{render_tables()}\n\n{END}{rest.partition(END)[2]}"


def _row(option: click.Option) -> str:
    does, _, default = (option.help or "").removesuffix("]").partition(" [")
    others = [
        f"`{name}`"
        for name, command in main.commands.items()
        if name != "prune" and any(one.help == option.help for one in _options_of(command))
    ]
    words = f"{option.opts[-1]}{'' if option.is_flag else f' {option.metavar}'}"
    cells = (f"`{words}`", does.removesuffix("."), default.replace("<", r"\<"), ", ".join(others))
    return f"| {' | '.join(cells)} |"


def _options_of(command: click.Command) -> list[click.Option]:
    return [one for one in command.params if isinstance(one, click.Option)]


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
