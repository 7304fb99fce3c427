"""`--help` shows every option once, under its group."""

import re

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.cli.options import GROUPS, OPTIONS


def help_of(*words: str) -> str:
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0
    return result.output


def test_prune_shows_every_option_once_under_its_group() -> None:
    sections = re.split(r"^(\w[\w ]*):\n", help_of("prune"), flags=re.MULTILINE)
    shown = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(shown) == list(GROUPS)
    for group, options in GROUPS.items():
        flags = re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown[group], flags=re.MULTILINE)
        expected = [f"--{name.replace('_', '-')}" for name in options]
        assert flags == expected + ["--help"] * (group == "Other")


def test_the_examples_are_commands_that_are_taken() -> None:
    lines = re.findall(r"^ +slimllm (.*)$", help_of("prune"), flags=re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        command, *words = line.split()
        for flag in (word for word in words if word.startswith("--")):
            assert flag.removeprefix("--").replace("-", "_") in OPTIONS
        assert command in main.commands


def test_the_first_page_says_what_exit_codes_mean() -> None:
    for code in ("0 ", "1 ", "2 ", "130 ", "143 ", "129 "):
        assert code in help_of().partition("Exit codes:")[2]


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_says_what_it_does(command: str) -> None:
    assert main.commands[command].help
    assert "-h, --help" in help_of(command)
