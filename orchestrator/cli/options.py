"""Every option once, by the groups that `--help` shows; commands take those that they need by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from orchestrator.config import METHODS

# One that is left out is None or (), so that a config file's value stands.
GROUPS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "Result": {
        "output": click.option(
            "--output",
            metavar="DIR",
            help="Where the result goes; also a URI. [pruned/, moments/ or comparisons/<model>]",
        ),
        "overwrite": click.option(
            "--overwrite", is_flag=True, default=None, help="Replace an output that is not empty."
        ),
        "resume": click.option(
            "--resume", is_flag=True, default=None, help="Go on with a run of this output that was not finished."
        ),
    },
    "What goes": {
        "sparsity": click.option(
            "--sparsity",
            type=float,
            multiple=True,
            metavar="F",
            help="Fraction of the layers to remove; repeatable. [.2]",
        ),
        "method": click.option("--method", type=click.Choice(METHODS), help="How units are chosen. [slimllm]"),
        "refine": click.option("--refine", is_flag=True, default=None, help="gram: refit against the dense stream."),
        "moments": click.option("--moments", metavar="DIR", help="gram: what `slimllm calibrate` kept, for no pass."),
        "drop_layers": click.option("--drop-layers", is_flag=True, default=None, help="gram: whole layers may go too."),
        "ratio": click.option("--ratio", type=float, metavar="F", help="The paper's pruning ratio, not a sparsity."),
        "pruned_layers": click.option("--pruned-layers", type=int, metavar="N", help="Layers that are pruned (paper)."),
        "alpha": click.option("--alpha", type=float, metavar="F", help="How ratios follow similarity (paper)."),
        "keep_lowest": click.option(
            "--keep-lowest", type=float, metavar="F", help="Tail of channels that stays. [.01]"
        ),
    },
    "Form": {
        "uniform": click.option(
            "--uniform", is_flag=True, default=None, help="As many heads and channels in every layer."
        ),
        "multiple_of": click.option(
            "--multiple-of", type=int, metavar="N", help="Keep channels by multiples of N. [1]"
        ),
        "no_bias": click.option("--no-bias", is_flag=True, default=None, help="Recover without new biases."),
    },
    "Data": {
        "calibration": click.option("--calibration", metavar="SPEC", help="Text or tokens. [builtin:calibration]"),
        "samples": click.option("--samples", type=int, metavar="N", help="Blocks of calibration text. [128]"),
        "sequence_length": click.option("--sequence-length", type=int, metavar="N", help="Tokens per block. [2048]"),
        "seed": click.option("--seed", type=int, metavar="N", help="Chooses the blocks of a text. [0]"),
        "evaluate": click.option("--evaluate", multiple=True, metavar="SPEC", help="Held-out text; repeatable."),
    },
    "Workers": {
        "workers": click.option("--workers", type=int, metavar="N", help="Ray actors. [one per GPU or per 4 cores]"),
        "gpus_per_worker": click.option("--gpus-per-worker", type=float, metavar="F", help="GPUs of each. [1, if any]"),
        "offload": click.option("--offload", is_flag=True, default=None, help="Hold hidden states in files (TMPDIR)."),
        "address": click.option("--address", metavar="ADDR", help="Head of a Ray cluster, host:port. [a local Ray]"),
        "shared_storage": click.option(
            "--shared-storage", is_flag=True, default=None, help="Every node sees the driver's files."
        ),
    },
    "MLflow": {
        "experiment": click.option("--experiment", metavar="NAME", help="MLflow experiment. [slimllm]"),
        "tracking_uri": click.option("--tracking-uri", metavar="URI", help="MLflow store. [sqlite:///mlflow.db]"),
        "run_name": click.option("--run-name", metavar="NAME", help="Name of the MLflow run. [<model>-<method>-<F>]"),
        "register": click.option(
            "--register", metavar="NAME", help="Register the checkpoints as versions of this model."
        ),
    },
    "Other": {
        "config": click.option("--config", "config_file", type=Path, metavar="FILE.toml", help="Settings; flags win."),
        "dry_run": click.option(
            "--dry-run", is_flag=True, help="Stop before anything is computed; tell what it would take."
        ),
        "json": click.option(
            "--json", "as_json", is_flag=True, help="Print the result, or the error, as one JSON object on stdout."
        ),
        "verbose": click.option(
            "-v", "--verbose", is_flag=True, help="Tell every layer's decision, what Ray logs, tracebacks."
        ),
    },
}
OPTIONS = {name: option for options in GROUPS.values() for name, option in options.items()}
DATA = ("calibration", "samples", "sequence_length", "seed")
CLUSTER = tuple(GROUPS["Workers"])
TELLING = ("json", "verbose")


def with_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add options to a command, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            command = OPTIONS[name](command)
        return command

    return add


class Command(click.Command):
    """A command whose help shows its options by group, in the order of the groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those that are this command's own first."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Options", *GROUPS)}
        for parameter in self.get_params(ctx):
            # An argument is in the usage, and what it is in the text below.
            if not isinstance(parameter, click.Option):
                continue
            if (record := parameter.get_help_record(ctx)) is not None:
                groups[_group_of(parameter)].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def _group_of(option: click.Option) -> str:
    flag = option.opts[-1].removeprefix("--").replace("-", "_")
    if flag == "help":
        return "Other"
    return next((name for name, options in GROUPS.items() if flag in options), "Options")
