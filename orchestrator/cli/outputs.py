"""Defines the commands for pruned models, and for models that can be pruned: `log`, `export`, `families`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.exit_codes import exit_on_error, print_json
from orchestrator.cli.options import TELLING, Command, with_options, with_settings
from orchestrator.config import ConfigError
from orchestrator.secrets import masked
from orchestrator.sources.storage import is_uri

if TYPE_CHECKING:
    from orchestrator.exports import Export
    from slimllm_ops.models.families import Family

# The forms that a checkpoint can be exported to.
EXPORTS = ("stock", "gguf", "deci", "current")


@click.command(cls=Command)
@click.argument("output")
@with_settings("log")
@with_options(*TELLING)
def log(output: str, as_json: bool, verbose: bool, **asked: Any) -> None:
    """Log a finished OUTPUT in MLflow, if the tracking server was missing or lost; repeating this is harmless."""
    from orchestrator.tracking import log_output, where_to_look

    with exit_on_error(as_json=as_json, verbose=verbose), _here(output) as directory:
        logged = log_output(directory, **asked)
    if as_json:
        print_json(asdict(logged) | {"output": output})
        return
    click.echo(f"{masked(output)} is logged{' already' if logged.before else ''} as MLflow run {logged.run_id}")
    click.echo(f"to look at it: {where_to_look(logged.tracking_uri, logged.experiment_id, logged.run_id)}")


@click.command(cls=Command)
@with_options("json")
def families(as_json: bool) -> None:
    """List the model families that can be pruned, and what can be removed from each."""
    from slimllm_ops.models.families import FAMILIES

    units = {family.model_type: _units_of(family) for family in FAMILIES}
    if as_json:
        print_json(units)
        return
    for model_type, described in units.items():
        click.echo(f"{model_type:14}{described}")


def _units_of(family: "Family") -> str:
    channels = "channels of each expert, the same number in all" if family.mlp.has_experts else "channels"
    whole = family.attention.reading.whole
    return f"{channels}; no heads, since {whole}" if whole else f"heads and {channels}"


@click.command(cls=Command)
@click.argument("output")
@click.option(
    "--to",
    "form",
    type=click.Choice(EXPORTS),
    required=True,
    help="stock: a class of transformers; gguf: a file for llama.cpp; deci: a DeciLM for vLLM, SGLang or TensorRT-LLM; "
    "current: the model code of this version.",
)
@click.option("--output", "path", metavar="PATH", help="Where to write it. [next to OUTPUT, named after it]")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@with_options(*TELLING)
def export(output: str, form: str, path: str | None, overwrite: bool, as_json: bool, verbose: bool) -> None:
    """Export OUTPUT, a pruned checkpoint, to a form that another program loads."""
    with exit_on_error(as_json=as_json, verbose=verbose):
        exported = _export(output, form, path, overwrite)
    if as_json:
        print_json(asdict(exported) | {"form": form})
    else:
        click.echo(f"{form}: {exported.path}, {exported.description}")


def _export(output: str, form: str, path: str | None, overwrite: bool) -> "Export":
    from orchestrator.exports.current import export_current
    from orchestrator.exports.deci import export_deci
    from orchestrator.exports.gguf import export_gguf
    from orchestrator.exports.stock import export_stock

    if is_uri(path or "") or (is_uri(output) and path is None):
        raise ConfigError(f"exports are written on this machine, not to {path or output}: pass --output PATH")
    with _here(output) as directory:
        exports = {"stock": export_stock, "gguf": export_gguf, "deci": export_deci, "current": export_current}
        return exports[form](directory, Path(path) if path else None, overwrite)


@contextmanager
def _here(output: str) -> Iterator[Path]:
    """Open the directory of an output, after fetching it if it is in a store."""
    if not is_uri(output):
        yield Path(output)
        return
    from orchestrator.output.destination import fetch_output

    with fetch_output(output) as directory:
        yield directory
