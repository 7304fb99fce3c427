"""The tables in docs/options.md match the declarations."""

import re

import pytest

from orchestrator.cli.options import flag_of, groups_of
from orchestrator.cli.options_table import BEGIN, COMMANDS, PAGE, render_tables, with_tables


def test_the_page_has_the_tables_of_today() -> None:
    page = PAGE.read_text()
    assert all(BEGIN.format(command) in page for command in COMMANDS)
    assert with_tables(page) == page, "run `make docs`"


@pytest.mark.parametrize("command", COMMANDS)
def test_it_has_every_option_once_with_a_sentence(command: str) -> None:
    rows = re.findall(r"^\| `(--[\w-]+)[^`]*` \| (\w.+?) \|", render_tables(command), flags=re.MULTILINE)
    options = [flag_of(command, name) for group in groups_of(command).values() for name in group]
    assert sorted(flag for flag, _ in rows) == sorted(options)


def test_a_row_says_the_default_and_which_other_commands_take_it() -> None:
    assert (
        "| `--keep-lowest F` | Share of the lowest-scored channels that slimllm keeps, as the published code does "
        in (render_tables("prune"))
    )
    assert "| .01 | `compare` |" in render_tables("prune")


def test_what_stands_around_the_tables_stays() -> None:
    page = PAGE.read_text()
    changed = page.replace("| .01 |", "| .02 |").replace("# Options", "# All options")
    assert with_tables(changed) == page.replace("# Options", "# All options")
