"""Defines the options of all commands, under the headings that `--help` shows.

Most options are settings, and derive from their declarations (docs/settings.md). The others (`GENERAL`) set
where a command reads its options from and what it prints.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from orchestrator.config import CompareConfig
from orchestrator.evaluation.config import EvaluateConfig
from orchestrator.reports.config import ReportConfig
from orchestrator.settings import Setting, declared
from orchestrator.speed.config import BenchConfig
from orchestrator.tuning.config import TuneConfig

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# Options that are not settings, as decorators: `@GENERAL["json"]`.
GENERAL: dict[str, Decorator] = {
    "config": click.option(
        "--config", "config_file", type=Path, metavar="FILE.toml", help="Read from a file what to compute; flags win."
    ),
    "dry_run": click.option(
        "--dry-run",
        is_flag=True,
        help="Print the memory, disk and traffic that the run would take, and stop before computing.",
    ),
    "json": click.option(
        "--json", "as_json", is_flag=True, help="Print the result, or the error, as one JSON object on stdout."
    ),
    "verbose": click.option(
        "-v", "--verbose", is_flag=True, help="Show every layer's decision, what Ray logs, and tracebacks."
    ),
}
TELLING = ("json", "verbose")
# Commands whose settings have a config of their own; the other commands take those of `CompareConfig` that name them.
CONFIGS: dict[str, type] = {
    "tune": TuneConfig,
    "evaluate": EvaluateConfig,
    "bench": BenchConfig,
    "report": ReportConfig,
}
# Commands that take only some of the options that are not settings.
FEW_GENERAL = {"evaluate": ("config", *TELLING), "bench": ("config", *TELLING), "report": TELLING}


def settings_of(command: str) -> dict[str, Setting]:
    """Return the settings that a command takes as options, by name, in declaration order."""
    known = declared(CONFIGS.get(command, CompareConfig))
    taken = {name: one for name, one in known.items() if command in CONFIGS or command in one.commands}
    return {name: one for name, one in taken.items() if one.group is not None}


def with_settings(command: str) -> Decorator:
    """Add the options of every setting that a command takes."""
    return _with(*map(option_of, settings_of(command).values()))


def with_options(*names: str) -> Decorator:
    """Add general options to a command, in this order."""
    return _with(*(GENERAL[name] for name in names))


def option_of(setting: Setting) -> Decorator:
    """Return a setting as an option; its default is None or (), so that a config file's value applies."""
    shown = f" [{setting.shown_default}]" if setting.shown_default else ""
    given: dict[str, Any] = {"help": f"{setting.describe()}.{shown}", "default": None}
    if setting.kind is bool:
        given["is_flag"] = True
    elif setting.by_commas:
        given |= {"type": Separated(setting.kind), "metavar": setting.placeholder}
    else:
        given["type"] = click.Choice(setting.choices) if setting.choices else setting.kind
        given |= {"metavar": setting.placeholder, "multiple": setting.repeated}
    return click.option(setting.option, setting.name, **given)


class Separated(click.ParamType):
    """Values with commas between them: "0,1,-1"."""

    def __init__(self, kind: type) -> None:
        self.kind, self.name = kind, f"{kind.__name__}s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Return the values of a text."""
        try:
            return tuple(map(self.kind, value.split(",")))
        except ValueError:
            self.fail(f"{value!r} has something else than {self.name} with commas between them", param, ctx)


def _with(*options: Decorator) -> Decorator:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def groups_of(command: str) -> dict[str, dict[str, Decorator]]:
    """Return a command's options by heading and by name, in the order in which `--help` shows them."""
    groups: dict[str, dict[str, Decorator]] = {}
    for name, one in settings_of(command).items():
        groups.setdefault(str(one.group), {})[name] = option_of(one)
    return groups | {"Other": {name: GENERAL[name] for name in FEW_GENERAL.get(command, GENERAL)}}


def flag_of(command: str, name: str) -> str:
    """Return the option of a setting, or of a general option, of a command."""
    one = settings_of(command).get(name)
    return f"--{name.replace('_', '-')}" if one is None else one.option


def heading_of(command: str, option: str) -> str:
    """Return the heading of an option, such as `--address` of `submit` and `--output` of `export`."""
    if option.removeprefix("--").replace("-", "_") in (*GENERAL, "help"):
        return "Other"
    known = declared(CompareConfig) | declared(CONFIGS.get(command, CompareConfig))
    return next((str(one.group) for one in known.values() if one.option == option), "Options")


class Command(click.Command):
    """A command whose help shows its options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by heading, first those that only this command has."""
        command = str(self.name)
        # The options of commands without settings have the headings of prune's.
        like = command if settings_of(command) else "prune"
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Options", *groups_of(like))}
        for parameter in self.get_params(ctx):
            # The usage line shows arguments, and the help text explains them.
            if not isinstance(parameter, click.Option):
                continue
            if (record := parameter.get_help_record(ctx)) is not None:
                groups[heading_of(command, parameter.opts[-1])].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)
