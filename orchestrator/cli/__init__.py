"""Defines the command line: `slimllm prune` and the other commands.

options.py declares every option once, and exit_codes.py turns errors into messages and exit codes. The other files
hold the commands.
"""

from typing import Any

import click

from orchestrator.cli.doctor import doctor
from orchestrator.cli.jobs import jobs, submit
from orchestrator.cli.outputs import export, families, log
from orchestrator.cli.runs import calibrate, compare, prune
from orchestrator.cli.streams import escape_what_cannot_be_shown
from orchestrator.version import VERSION

EXIT_CODES = """\b
Exit codes:
  0    done
  1    workers, Ray's head, a disk or an upload failed; results so far stay, --resume continues
  2    the request cannot be met; the message says what to change
  130  Ctrl-C, 143 SIGTERM, 129 SIGHUP (the terminal is gone); --resume continues
"""


class Commands(click.Group):
    """The commands; a character that the terminal cannot show fails none of them."""

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run the command that the arguments name."""
        escape_what_cannot_be_shown()
        return super().main(*args, **settings)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(VERSION)
def main() -> None:
    """Structured pruning of large language models, on one machine or a Ray cluster, tracked in MLflow."""


for command in (prune, calibrate, compare, log, export, families, doctor, submit, jobs):
    main.add_command(command)
