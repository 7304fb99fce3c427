"""The command line: `slimllm prune` and what comes beside it.

options.py has every option once, ending.py what commands say and exit with when they cannot go on; the other files
have the commands.
"""

import click

from orchestrator.cli.doctor import doctor
from orchestrator.cli.jobs import jobs, submit
from orchestrator.cli.outputs import export, families, log
from orchestrator.cli.runs import calibrate, compare, prune
from orchestrator.version import VERSION

EXIT_CODES = """\b
Exit codes:
  0    done
  1    workers, Ray's head, a disk or an upload failed; what is solved stays, --resume goes on
  2    it cannot be done as asked; the line says what to change
  130  Ctrl-C, 143 SIGTERM; --resume goes on
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(VERSION)
def main() -> None:
    """Structured pruning of large language models, on one machine or a Ray cluster, tracked in MLflow."""


for command in (prune, calibrate, compare, log, export, families, doctor, submit, jobs):
    main.add_command(command)
