"""Defines the command line: `slimllm prune` and the other commands.

options.py declares every option once, and exit_codes.py turns errors into messages and exit codes. The other files
hold the commands.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from orchestrator.cli.bench import bench
from orchestrator.cli.doctor import doctor
from orchestrator.cli.evaluate import evaluate
from orchestrator.cli.exit_codes import FAILED
from orchestrator.cli.jobs import jobs, submit
from orchestrator.cli.outputs import export, families, log
from orchestrator.cli.report import report
from orchestrator.cli.runs import calibrate, compare, prune
from orchestrator.cli.streams import escape_what_cannot_be_shown
from orchestrator.cli.tune import tune
from orchestrator.secrets import masked
from orchestrator.version import VERSION

EXIT_CODES = """\b
Exit codes:
  0    done
  1    workers, Ray's head, a disk or an upload failed; results so far stay, --resume continues
  2    the request cannot be met; the message says what to change
  130  Ctrl-C, 143 SIGTERM, 129 SIGHUP (the terminal is gone); --resume continues
"""


class Commands(click.Group):
    """The commands; a character that the terminal cannot show fails none of them, and none prints a secret."""

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run the command that the arguments name."""
        escape_what_cannot_be_shown()
        try:
            return super().main(*args, **settings)
        except Exception:
            if not settings.get("standalone_mode", True):
                raise
            # A bug. Python would print the passwords of addresses too.
            click.echo(masked(traceback.format_exc()), err=True, nl=False)
            sys.exit(FAILED)

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        """Read the arguments before the command."""
        with _masking_usage_errors():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, which reads its own arguments."""
        with _masking_usage_errors():
            return super().invoke(ctx)


@contextmanager
def _masking_usage_errors() -> Iterator[None]:
    """Mask the words that an error about the arguments quotes."""
    try:
        yield
    except click.ClickException as error:
        # Its declaration, which nothing enforces, says that nobody sets it.
        vars(error)["message"] = masked(error.message)
        raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(VERSION)
def main() -> None:
    """Structured pruning of large language models, on one machine or a Ray cluster, tracked in MLflow."""


COMMANDS = (
    *(prune, tune, evaluate, bench, report),
    *(calibrate, compare, log, export, families, doctor, submit, jobs),
)
for command in COMMANDS:
    main.add_command(command)
