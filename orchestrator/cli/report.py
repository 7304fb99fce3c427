"""Defines `report`, the command that writes a page about runs."""

from dataclasses import asdict
from typing import Any

import click

from orchestrator.cli.exit_codes import exit_on_error, print_json
from orchestrator.cli.options import TELLING, Command, with_options, with_settings
from orchestrator.cli.runs import configure
from orchestrator.reports.config import ReportConfig
from orchestrator.secrets import masked

EXAMPLES = """\b
Examples:
  slimllm report pruned/MODEL-0.2 --output report.html
  slimllm report pruned/MODEL-0.2 pruned/MODEL-0.4 --output both.html
  slimllm report pruned/MODEL-0.2 --continue "Once upon a time" --overwrite
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("runs", nargs=-1, metavar="RUN_OR_DIR...")
@with_settings("report")
@with_options(*TELLING)
def report(as_json: bool, verbose: bool, **flags: Any) -> None:
    """Write a page about RUN_OR_DIR, directories that prune, tune or compare wrote, or ids of MLflow runs."""
    with exit_on_error(as_json=as_json, verbose=verbose):
        config = configure(ReportConfig, None, flags)
        from orchestrator.progress import Reporter
        from orchestrator.reports.report import report as run

        result = run(config, Reporter(verbose=verbose))
    if as_json:
        print_json(asdict(result))
    else:
        click.echo(f"report: {masked(str(result.output))}")
