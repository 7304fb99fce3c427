"""`--help` shows every option once, under its group."""

import re

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.cli.options import flag_of, groups_of
from orchestrator.cli.options_table import COMMANDS


def help_of(*words: str) -> str:
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_shown_once_under_its_group(command: str) -> None:
    page = help_of(command).partition("Examples:")[0]
    sections = re.split(r"^(\w[\w ]*):\n", page, flags=re.MULTILINE)
    shown = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(shown) == list(groups_of(command))
    for group, options in groups_of(command).items():
        flags = re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown[group], flags=re.MULTILINE)
        expected = [flag_of(command, name) for name in options]
        assert flags == expected + ["--help"] * (group == "Other")


@pytest.mark.parametrize("shown", COMMANDS)
def test_the_examples_are_commands_that_are_taken(shown: str) -> None:
    lines = re.findall(r"^ +slimllm (.*)$", help_of(shown), flags=re.MULTILINE)
    taken = {flag_of(shown, name) for options in groups_of(shown).values() for name in options}
    assert len(lines) >= 3
    for line in lines:
        command, *words = line.split()
        for flag in (word for word in words if word.startswith("--")):
            assert flag in taken
        assert command in main.commands


def test_the_first_page_says_what_exit_codes_mean() -> None:
    for code in ("0 ", "1 ", "2 ", "130 ", "143 ", "129 "):
        assert code in help_of().partition("Exit codes:")[2]


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_says_what_it_does(command: str) -> None:
    assert main.commands[command].help
    assert "-h, --help" in help_of(command)
