"""Defines `bench`, the command that measures models side by side."""

from pathlib import Path
from typing import Any

import click

from orchestrator.cli.exit_codes import exit_on_error, print_json
from orchestrator.cli.options import TELLING, Command, with_options, with_settings
from orchestrator.cli.runs import configure
from orchestrator.speed.config import BenchConfig

EXAMPLES = """\b
Examples:
  slimllm bench MODEL pruned/MODEL-0.2
  slimllm bench MODEL pruned/MODEL-0.2 --batch-size 1 --prompt-length 512 --rounds 9 --widths
  slimllm bench MODEL pruned/MODEL-0.2 --engine compiled --output benches/MODEL
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("models", nargs=-1, metavar="MODEL...")
@with_settings("bench")
@with_options("config", *TELLING)
def bench(config_file: Path | None, as_json: bool, verbose: bool, **flags: Any) -> None:
    """Measure speed, memory and size of each MODEL, in turn; the first is what the others are measured against."""
    with exit_on_error(as_json=as_json, verbose=verbose):
        _bench(configure(BenchConfig, config_file, flags), as_json=as_json, verbose=verbose)


def _bench(config: BenchConfig, as_json: bool, verbose: bool) -> None:
    from orchestrator.cli.summary import describe_bench, print_bench
    from orchestrator.progress import Reporter
    from orchestrator.speed.bench import bench as run

    result = run(config, Reporter(verbose=verbose))
    if as_json:
        print_json(describe_bench(result))
    else:
        print_bench(result)
