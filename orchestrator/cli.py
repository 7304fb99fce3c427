"""The command line: `slimllm prune` and what comes beside it."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

# The imports behind these names take seconds; `--help` does not wait for them.
from orchestrator.config import METHODS, CompareConfig, ConfigError, PruneConfig, read_config_file
from orchestrator.secrets import masked

Config = TypeVar("Config", bound=PruneConfig)

# What a checkpoint may be exported to.
EXPORTS = ("stock", "gguf")

FAILED = 1
INTERRUPTED = 130
TERMINATED = 143


class _Terminated(SystemExit):
    """SIGTERM arrived: the run ends as after Ctrl-C, its actors and its record too."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="slimllm")
def main() -> None:
    """Structured pruning of large language models, on one machine or a Ray cluster, tracked in MLflow."""


# Every option once; one that is left out is None or (), so that a config file's value stands.
OPTIONS = {
    "output": click.option(
        "--output", metavar="DIR", help="Where the result goes. [pruned/, moments/ or comparisons/<model>]"
    ),
    "overwrite": click.option("--overwrite", is_flag=True, default=None, help="Replace an output that is not empty."),
    "resume": click.option(
        "--resume", is_flag=True, default=None, help="Go on with a run of this output that was not finished."
    ),
    "sparsity": click.option(
        "--sparsity", type=float, multiple=True, metavar="F", help="Fraction of the layers to remove; repeatable. [.2]"
    ),
    "method": click.option("--method", type=click.Choice(METHODS), help="How units are chosen. [slimllm]"),
    "refine": click.option("--refine", is_flag=True, default=None, help="gram: refit against the dense stream."),
    "moments": click.option("--moments", metavar="DIR", help="gram: what `slimllm calibrate` kept, for no pass."),
    "ratio": click.option("--ratio", type=float, metavar="F", help="The paper's pruning ratio, not a sparsity."),
    "pruned_layers": click.option("--pruned-layers", type=int, metavar="N", help="Layers that are pruned (paper)."),
    "alpha": click.option("--alpha", type=float, metavar="F", help="How ratios follow similarity (paper)."),
    "keep_lowest": click.option("--keep-lowest", type=float, metavar="F", help="Tail of channels that stays. [.01]"),
    "uniform": click.option("--uniform", is_flag=True, default=None, help="As many heads and channels in every layer."),
    "multiple_of": click.option("--multiple-of", type=int, metavar="N", help="Keep channels by multiples of N. [1]"),
    "no_bias": click.option("--no-bias", is_flag=True, default=None, help="Recover without new biases."),
    "drop_layers": click.option("--drop-layers", is_flag=True, default=None, help="gram: whole layers may go too."),
    "calibration": click.option("--calibration", metavar="SPEC", help="Text or tokens. [builtin:calibration]"),
    "samples": click.option("--samples", type=int, metavar="N", help="Blocks of calibration text. [128]"),
    "sequence_length": click.option("--sequence-length", type=int, metavar="N", help="Tokens per block. [2048]"),
    "seed": click.option("--seed", type=int, metavar="N", help="Chooses the blocks of a text. [0]"),
    "evaluate": click.option("--evaluate", multiple=True, metavar="SPEC", help="Held-out text; repeatable."),
    "workers": click.option("--workers", type=int, metavar="N", help="Ray actors. [one per GPU or per 4 cores]"),
    "gpus_per_worker": click.option("--gpus-per-worker", type=float, metavar="F", help="GPUs of each. [1, if any]"),
    "offload": click.option("--offload", is_flag=True, default=None, help="Hold hidden states in files (TMPDIR)."),
    "address": click.option("--address", metavar="ADDR", help="Head of a Ray cluster, host:port. [a local Ray]"),
    "shared_storage": click.option(
        "--shared-storage", is_flag=True, default=None, help="Every node sees the driver's files."
    ),
    "experiment": click.option("--experiment", metavar="NAME", help="MLflow experiment. [slimllm]"),
    "tracking_uri": click.option("--tracking-uri", metavar="URI", help="MLflow store. [sqlite:///mlflow.db]"),
    "run_name": click.option("--run-name", metavar="NAME", help="Name of the MLflow run."),
    "register": click.option("--register", metavar="NAME", help="Register the checkpoint under this name."),
    "config": click.option("--config", "config_file", type=Path, metavar="FILE.toml", help="Settings; flags win."),
}
DATA = ("calibration", "samples", "sequence_length", "seed")
CLUSTER = ("workers", "gpus_per_worker", "offload", "address", "shared_storage")
COMPARED = ("sparsity", "ratio", "pruned_layers", "alpha", "keep_lowest", *DATA, "evaluate", *CLUSTER)


def with_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add options to a command, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            command = OPTIONS[name](command)
        return command

    return add


@main.command()
@click.argument("model", required=False)
@with_options(*OPTIONS)
def prune(config_file: Path | None, **flags: Any) -> None:
    """Prune MODEL, a directory or hub id; without one, the built-in model."""
    config = _configure(PruneConfig, config_file, flags)
    _run(lambda: _prune(config))


@main.command()
@click.argument("model", required=False)
@with_options("output", "overwrite", "resume", "drop_layers", *DATA, *CLUSTER, "config")
def calibrate(config_file: Path | None, **flags: Any) -> None:
    """Keep MODEL's moments, for `prune --method gram --moments` at any sparsity with no forward pass."""
    config = _configure(PruneConfig, config_file, flags | {"method": "gram"})
    _run(lambda: _calibrate(config))


@main.command()
@click.argument("model", required=False)
@click.option("--method", "methods", multiple=True, metavar="NAME", help="Beside slimllm; repeatable. [all there are]")
@with_options("output", "overwrite", *COMPARED, "experiment", "tracking_uri", "run_name", "config")
@click.option("--keep-checkpoints", is_flag=True, default=None, help="Keep every model that was measured.")
def compare(config_file: Path | None, **flags: Any) -> None:
    """Compare methods on MODEL, at the same parameter count and from the same calibration data."""
    config = _configure(CompareConfig, config_file, flags)
    _run(lambda: _compare(config))


@main.command()
@click.argument("output", type=Path)
@with_options("experiment", "tracking_uri", "run_name", "register")
def log(output: Path, **asked: Any) -> None:
    """Log a finished OUTPUT in MLflow, where the tracking server was not there or was lost; twice does nothing."""
    from orchestrator.tracking import TrackingError, log_output, where_to_look

    try:
        logged = log_output(output, **asked)
    except TrackingError as error:
        _exit_with(error)
    click.echo(f"{output} is logged{' already' if logged.before else ''} as MLflow run {logged.run_id}")
    click.echo(f"to look at it: {where_to_look(logged.tracking_uri, logged.experiment_id, logged.run_id)}")


@main.command()
def families() -> None:
    """List the model families that can be pruned, and what of them."""
    from slimllm_ops.families import FAMILIES

    for family in FAMILIES:
        channels = "channels" if family.mlp.reading.experts is None else "channels of each expert, as many of all"
        whole = family.attention.reading.whole
        click.echo(
            f"{family.model_type:14}{f'{channels}; no heads, since {whole}' if whole else f'heads and {channels}'}"
        )


@main.command()
@click.argument("output", type=Path)
@click.option(
    "--to",
    "form",
    type=click.Choice(EXPORTS),
    required=True,
    help="stock: a class of transformers; gguf: a file for llama.cpp.",
)
@click.option("--output", "path", type=Path, metavar="PATH", help="Where it goes. [beside OUTPUT, of its name]")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
def export(output: Path, form: str, path: Path | None, overwrite: bool) -> None:
    """Write OUTPUT, a pruned checkpoint, in a form that another program loads."""
    _run(lambda: _export(output, form, path, overwrite))


def _configure(kind: type[Config], config_file: Path | None, flags: dict[str, Any]) -> Config:
    try:
        settings = read_config_file(config_file, kind) if config_file else {}
        settings |= {name: value for name, value in flags.items() if value not in (None, ())}
        return kind(**settings)
    except ConfigError as error:
        _exit_with(error)


def _prune(config: PruneConfig) -> None:
    from orchestrator.pipeline import prune as run
    from orchestrator.summary import print_summary

    print_summary(run(config))


def _calibrate(config: PruneConfig) -> None:
    from orchestrator.pipeline import calibrate as run

    moments = run(config)
    click.echo(f"moments: {moments}")
    click.echo(f"to prune from them: slimllm prune {config.model or ''} --method gram --moments {moments}")


def _compare(config: CompareConfig) -> None:
    from orchestrator.comparison import compare as run
    from orchestrator.summary import print_comparison

    print_comparison(run(config))


def _export(output: Path, form: str, path: Path | None, overwrite: bool) -> None:
    from orchestrator.exports.gguf import export_gguf
    from orchestrator.exports.stock import export_stock

    exporters = {"stock": export_stock, "gguf": export_gguf}
    click.echo(f"{form}: {exporters[form](output, path, overwrite)}")


def _run(action: Callable[[], None]) -> None:
    """Run; what the user can mend ends in one line and code 2, what failed in 1, Ctrl-C in 130, SIGTERM in 143."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Its warnings are about configs (ids of special tokens, say) that pruning takes over as they are.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _explain(action)
    except KeyboardInterrupt as error:
        _exit_with(_with_notes("interrupted; no checkpoint was written", error), INTERRUPTED)
    except _Terminated as error:
        _exit_with(_with_notes("terminated; no checkpoint was written", error), TERMINATED)


def _explain(action: Callable[[], None]) -> None:
    from actors.errors import ShardError
    from orchestrator.pipeline import USER_ERRORS
    from slimllm_ops.errors import MiscountError, ReadBackError

    try:
        action()
    except USER_ERRORS as error:
        _exit_with(_with_notes(str(error), error))
    except (ShardError, ReadBackError, MiscountError) as error:
        _exit_with(_with_notes(str(error), error), FAILED)
    except OSError as error:
        # A disk that is full or gone. The command line's own files are checked before, with messages of their own.
        place = f" {error.filename}" if error.filename else ""
        _exit_with(_with_notes(f"the system refused{place}: {error.strerror or error}", error), FAILED)


def _with_notes(text: str, error: BaseException) -> str:
    """Return a message with what was noted on its error's way: what is kept, and how to go on."""
    return "; ".join([text, *getattr(error, "__notes__", ())])


def _terminate(signum: int, frame: object) -> NoReturn:
    raise _Terminated(TERMINATED)


def _exit_with(error: Exception | str, code: int = 2) -> NoReturn:
    click.echo(f"slimllm: {masked(' '.join(str(error).split()))}", err=True)
    sys.exit(code)
