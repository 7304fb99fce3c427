"""Defines `tune`, the command that trains a pruned checkpoint."""

from pathlib import Path
from typing import Any

import click

from orchestrator.cli.exit_codes import exit_on_error, print_json
from orchestrator.cli.options import TELLING, Command, with_options, with_settings
from orchestrator.cli.runs import configure, tell_plan
from orchestrator.tuning.config import TuneConfig

EXAMPLES = """\b
Examples:
  slimllm tune pruned/MODEL-0.2 --evaluate heldout.txt
  slimllm tune pruned/MODEL-0.2 --method blocks --data text.jsonl
  slimllm tune pruned/MODEL-0.2 --method lora --data yahma/alpaca-cleaned --sequence-length 256
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("checkpoint", required=False)
@with_settings("tune")
@with_options("config", "dry_run", *TELLING)
def tune(config_file: Path | None, dry_run: bool, as_json: bool, verbose: bool, **flags: Any) -> None:
    """Train CHECKPOINT, a pruned model, to recover what pruning lost."""
    run = _plan if dry_run else _tune
    with exit_on_error(as_json=as_json, verbose=verbose):
        run(configure(TuneConfig, config_file, flags), as_json=as_json, verbose=verbose)


def _tune(config: TuneConfig, as_json: bool, verbose: bool) -> None:
    from orchestrator.cli.summary import describe_tuned, print_tuned
    from orchestrator.progress import Reporter
    from orchestrator.tuning.tune import tune as run

    result = run(config, Reporter(verbose=verbose))
    if as_json:
        print_json(describe_tuned(result))
    else:
        print_tuned(result)


def _plan(config: TuneConfig, as_json: bool, verbose: bool) -> None:
    from orchestrator.progress import Reporter
    from orchestrator.tuning.plan import plan_tuning

    tell_plan(plan_tuning(config, Reporter(verbose=verbose)), as_json)
