"""The command line: `slimllm prune` and what comes beside it."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

# The imports behind these names take seconds; `--help` does not wait for them.
from orchestrator.config import METHODS, ConfigError, PruneConfig, read_config_file

LOST_WORKER = 1
INTERRUPTED = 130
TERMINATED = 143


class _Terminated(SystemExit):
    """SIGTERM arrived: the run ends as after Ctrl-C, its actors and its record too."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="slimllm")
def main() -> None:
    """Structured pruning of large language models, on one machine or a Ray cluster, tracked in MLflow."""


def prune_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `prune`; an option left out is None, so that a config file's value stands."""
    options = [
        click.option("--output", metavar="DIR", help="Where the checkpoint goes. [pruned/<model>-<sparsity>]"),
        click.option("--overwrite", is_flag=True, default=None, help="Replace an output that is not empty."),
        click.option(
            "--sparsity",
            type=float,
            multiple=True,
            metavar="F",
            help="Fraction of the layers' parameters to remove; repeatable. [.2]",
        ),
        click.option("--method", type=click.Choice(METHODS), help="How units are chosen and recovered. [slimllm]"),
        click.option("--ratio", type=float, metavar="F", help="The paper's pruning ratio, instead of --sparsity."),
        click.option("--pruned-layers", type=int, metavar="N", help="How many layers are pruned (the paper's n)."),
        click.option("--alpha", type=float, metavar="F", help="How sharply ratios follow similarity (the paper's)."),
        click.option("--keep-lowest", type=float, metavar="F", help="Tail of lowest channels that stays. [.01]"),
        click.option("--calibration", metavar="SPEC", help="Calibration text or tokens. [builtin:calibration]"),
        click.option("--samples", type=int, metavar="N", help="Blocks of calibration text. [128]"),
        click.option("--sequence-length", type=int, metavar="N", help="Tokens per block, at most. [2048]"),
        click.option("--seed", type=int, metavar="N", help="Chooses the blocks of a text. [0]"),
        click.option("--evaluate", multiple=True, metavar="SPEC", help="Held-out text or tokens; repeatable."),
        click.option("--workers", type=int, metavar="N", help="Ray actors. [one per GPU, or per 4 cores]"),
        click.option("--gpus-per-worker", type=float, metavar="F", help="GPUs of each. [1 where there are any]"),
        click.option("--address", metavar="ADDR", help="Head of a Ray cluster, host:port. [a local Ray]"),
        click.option("--experiment", metavar="NAME", help="MLflow experiment. [slimllm]"),
        click.option("--tracking-uri", metavar="URI", help="MLflow store. [sqlite:///mlflow.db]"),
        click.option("--run-name", metavar="NAME", help="Name of the MLflow run."),
        click.option("--register", metavar="NAME", help="Register the checkpoint under this name."),
        click.option("--config", "config_file", type=Path, metavar="FILE.toml", help="Settings; flags win."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("model", required=False)
@prune_options
def prune(config_file: Path | None, **flags: Any) -> None:
    """Prune MODEL, a directory or hub id; without one, the built-in model."""
    try:
        settings = read_config_file(config_file) if config_file else {}
        settings |= {name: value for name, value in flags.items() if value not in (None, ())}
        config = PruneConfig(**settings)
    except ConfigError as error:
        _exit_with(error)
    _run_pipeline(config)


def _run_pipeline(config: PruneConfig) -> None:
    """Run; what the user can mend ends in one line and code 2, a lost worker in 1, Ctrl-C in 130, SIGTERM in 143."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Its warnings are about configs (ids of special tokens, say) that pruning takes over as they are.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run_and_explain(config)
    except KeyboardInterrupt:
        _exit_with("interrupted; no checkpoint was written", INTERRUPTED)
    except _Terminated:
        _exit_with("terminated; no checkpoint was written", TERMINATED)


def _run_and_explain(config: PruneConfig) -> None:
    from actors import ShardError
    from orchestrator.pipeline import USER_ERRORS
    from orchestrator.pipeline import prune as run
    from orchestrator.summary import print_summary
    from slimllm_ops.errors import ReadBackError

    try:
        result = run(config)
    except USER_ERRORS as error:
        _exit_with(error)
    except (ShardError, ReadBackError) as error:
        _exit_with(error, LOST_WORKER)
    print_summary(result)


def _terminate(signum: int, frame: object) -> NoReturn:
    raise _Terminated(TERMINATED)


def _exit_with(error: Exception | str, code: int = 2) -> NoReturn:
    click.echo(f"slimllm: {' '.join(str(error).split())}", err=True)
    sys.exit(code)
