"""Defines `evaluate`, the command that measures models on texts and tasks."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.exit_codes import exit_on_error, print_json
from orchestrator.cli.options import TELLING, Command, with_options, with_settings
from orchestrator.cli.runs import configure
from orchestrator.evaluation.config import EvaluateConfig

EXAMPLES = """\b
Examples:
  slimllm evaluate MODEL pruned/MODEL-0.2 --data heldout.txt
  slimllm evaluate MODEL pruned/MODEL-0.2 --data heldout.txt --length 128 --length 2048
  slimllm evaluate MODEL pruned/MODEL-0.2 --tasks paper
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("models", nargs=-1, metavar="MODEL...")
@with_settings("evaluate")
@with_options("config", *TELLING)
def evaluate(config_file: Path | None, as_json: bool, verbose: bool, **flags: Any) -> None:
    """Measure each MODEL on texts and tasks, and compare it with the first; pruned or not, of any architecture."""
    with exit_on_error(as_json=as_json, verbose=verbose):
        _evaluate(configure(EvaluateConfig, config_file, flags), as_json=as_json, verbose=verbose)


def _evaluate(config: EvaluateConfig, as_json: bool, verbose: bool) -> None:
    from orchestrator.cli.summary import print_evaluation
    from orchestrator.evaluation.evaluate import evaluate as run
    from orchestrator.progress import Reporter

    evaluation = run(config, Reporter(verbose=verbose))
    if as_json:
        print_json(asdict(evaluation))
    else:
        print_evaluation(evaluation)
