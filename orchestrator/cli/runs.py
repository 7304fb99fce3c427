"""Defines the commands that pass text through a model: `prune`, `calibrate`, `compare`."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

# Commands import slow modules themselves, so that `--help` does not wait for them.
from orchestrator.cli.exit_codes import exit_on_error, print_json
from orchestrator.cli.options import TELLING, Command, with_options, with_settings
from orchestrator.config import CompareConfig, PruneConfig, read_config_file

if TYPE_CHECKING:
    from orchestrator.preflight.dry_run import RunPlan

Config = TypeVar("Config")

EXAMPLES = """\b
Examples:
  slimllm prune meta-llama/Llama-3.1-8B --sparsity .2 --evaluate heldout.txt
  slimllm prune MODEL --method gram --refine --calibration text.jsonl
  slimllm prune MODEL --method gram --sparsity .2 --sparsity .3 --sparsity .5
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("model", required=False)
@with_settings("prune")
@with_options("config", "dry_run", *TELLING)
def prune(config_file: Path | None, dry_run: bool, as_json: bool, verbose: bool, **flags: Any) -> None:
    """Prune MODEL, a directory, URI or hub id; by default the built-in model."""
    run = _plan_pruning if dry_run else _prune
    with exit_on_error(as_json=as_json, verbose=verbose):
        run(configure(PruneConfig, config_file, flags), as_json=as_json, verbose=verbose)


@click.command(cls=Command)
@click.argument("model", required=False)
@with_settings("calibrate")
@with_options("config", "dry_run", *TELLING)
def calibrate(config_file: Path | None, dry_run: bool, as_json: bool, verbose: bool, **flags: Any) -> None:
    """Save MODEL's moments: `prune --moments` then needs no forward pass, for any sparsity and one-pass method."""
    run = _plan_calibration if dry_run else _calibrate
    with exit_on_error(as_json=as_json, verbose=verbose):
        run(configure(PruneConfig, config_file, flags | {"method": "gram"}), as_json=as_json, verbose=verbose)


@click.command(cls=Command)
@click.argument("model", required=False)
@with_settings("compare")
@with_options("config", *TELLING)
def compare(config_file: Path | None, as_json: bool, verbose: bool, **flags: Any) -> None:
    """Compare methods on MODEL, with the same parameter count and calibration data."""
    with exit_on_error(as_json=as_json, verbose=verbose):
        _compare(configure(CompareConfig, config_file, flags), as_json=as_json, verbose=verbose)


def configure(kind: type[Config], config_file: Path | None, flags: dict[str, Any]) -> Config:
    """Return the config from a file, if there is one, and from flags, which override it."""
    settings = read_config_file(config_file, kind) if config_file else {}
    return kind(**settings | {name: value for name, value in flags.items() if value not in (None, ())})


def _prune(config: PruneConfig, as_json: bool, verbose: bool) -> None:
    from orchestrator.cli.summary import describe_result, print_summary
    from orchestrator.pipeline import prune as run
    from orchestrator.progress import Reporter

    result = run(config, Reporter(verbose=verbose))
    if as_json:
        print_json(describe_result(result))
    else:
        print_summary(result)


def _plan_pruning(config: PruneConfig, as_json: bool, verbose: bool) -> None:
    from orchestrator.preflight.dry_run import plan_pruning
    from orchestrator.progress import Reporter

    tell_plan(plan_pruning(config, Reporter(verbose=verbose)), as_json)


def _plan_calibration(config: PruneConfig, as_json: bool, verbose: bool) -> None:
    from orchestrator.preflight.dry_run import plan_calibration
    from orchestrator.progress import Reporter

    tell_plan(plan_calibration(config, Reporter(verbose=verbose)), as_json)


def tell_plan(plan: "RunPlan | None", as_json: bool) -> None:
    """Print a plan; if the run would be refused, exit with the same message."""
    from orchestrator.cli.summary import describe_plan, print_plan
    from orchestrator.preflight.checks import refuse_certain_failure
    from orchestrator.progress import Reporter

    if as_json:
        print_json({"finished_before": True} if plan is None else describe_plan(plan))
    elif plan is not None:
        print_plan(plan)
    if plan is not None:
        # The JSON object above has the checks, so print no second object with the error.
        with exit_on_error(as_json=False):
            refuse_certain_failure(plan.checks, Reporter().warn)


def _calibrate(config: PruneConfig, as_json: bool, verbose: bool) -> None:
    from orchestrator.pipeline import calibrate as run
    from orchestrator.progress import Reporter

    moments = run(config, Reporter(verbose=verbose))
    if as_json:
        print_json({"moments": moments})
        return
    click.echo(f"moments: {moments}")
    words = ["prune", *([config.model] if config.model else []), "--method", "gram", "--moments", str(moments)]
    click.echo(f"to prune from them: slimllm {shlex.join(words)}")


def _compare(config: CompareConfig, as_json: bool, verbose: bool) -> None:
    from orchestrator.cli.summary import print_comparison
    from orchestrator.comparison.compare import compare as run
    from orchestrator.progress import Reporter

    comparison = run(config, Reporter(verbose=verbose))
    if as_json:
        print_json(asdict(comparison))
    else:
        print_comparison(comparison)
