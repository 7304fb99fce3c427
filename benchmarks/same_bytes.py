"""Checks that two checkouts prune to the same bytes: `python -m benchmarks.same_bytes --before DIR --after DIR`.

It prunes each model by each method in both checkouts, with the same options, each checkout in its own interpreter.
Then it compares every file of the two outputs except `metrics.jsonl`, which holds times, and `complete.json`, which
holds digests of the others. It treats three kinds of file
specially:

- JSON and TOML are compared by content. A setting that only one side has is listed separately: settings come and go.
- The model's code is compared without docstrings and comments; a difference in those is listed under "text".
- The model card is prose: a difference is listed under "text".

The exit code is 1 if a run failed, or if anything differs but text and settings of one side.
"""

import ast
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import describe_machine, write_table

ROOT = Path(__file__).parents[1]
MODELS = ("builtin", "babyllama-mha", "lab-llama-11m")
METHODS = {
    "slimllm": ("--method=slimllm",),
    "gram": ("--method=gram",),
    "gram --refine": ("--method=gram", "--refine"),
}
HEADING = ["model, method", "files", "result", "settings of one side", "text"]
# Files of settings: a key that only one side has is listed, but is no difference.
SETTINGS = ("asked.json", "run.toml", "plan.json")


@dataclass(frozen=True)
class Checkout:
    """A checkout, the interpreter that runs it, and options that only it takes."""

    directory: Path
    python: str
    options: tuple[str, ...] = ()

    def prune(self, arguments: list[str], folder: Path) -> str:
        """Prune in a folder; return why it failed, or an empty string."""
        environment = {**os.environ, "PYTHONPATH": str(self.directory)}
        command = [self.python, "-P", "-m", "orchestrator", "prune", *arguments, *self.options]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        return f"exit code {done.returncode}: {_last_line(done.stderr)}" if done.returncode else ""

    def require_own_code(self) -> None:
        """Check that the interpreter imports this checkout, not an installed package."""
        program = "from importlib.util import find_spec; print(find_spec('orchestrator').origin)"
        command = [self.python, "-c", program]
        environment = {**os.environ, "PYTHONPATH": str(self.directory)}
        found = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
        if not found.stdout.startswith(f"{self.directory}{os.sep}"):
            problem = found.stdout.strip() or _last_line(found.stderr)
            raise click.ClickException(f"{self.python} does not import the code in {self.directory}, but {problem}")


@dataclass
class Comparison:
    """The number of files of two outputs, and where they differ."""

    files: int = 0
    differing: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    @property
    def cells(self) -> list[str]:
        """Its cells of the table."""
        result = f"differ: {', '.join(self.differing)}" if self.differing else "equal"
        return [str(self.files), result, ", ".join(self.settings) or "none", ", ".join(self.text) or "equal"]


@click.command()
@click.option("--before", type=Path, required=True, help="The first checkout.")
@click.option("--after", type=Path, default=ROOT, help="The second checkout. [this one]")
@click.option("--before-python", help="The first one's interpreter. [its .venv, or this one]")
@click.option("--after-python", help="The second one's interpreter. [its .venv, or this one]")
@click.option("--models", multiple=True, default=MODELS, help="Directory, or name in ../shared/models; repeatable.")
@click.option("--methods", multiple=True, type=click.Choice(list(METHODS)), default=list(METHODS), help="Repeatable.")
@click.option("--samples", default=16, help="Blocks of calibration text.")
@click.option("--sequence-length", default=128, help="Tokens per block.")
@click.option("--workers", default=2, help="Number of workers, and of shards.")
@click.option("--evaluate/--no-evaluate", default=True, help="Whether to measure perplexity.")
@click.option("--extra-args", default="", help='More options for the second checkout, such as "--local".')
@click.option("--output", type=Path, default=Path("benchmarks/results/same_bytes.md"))
def main(
    before: Path,
    after: Path,
    before_python: str | None,
    after_python: str | None,
    models: tuple[str, ...],
    methods: tuple[str, ...],
    samples: int,
    sequence_length: int,
    workers: int,
    evaluate: bool,
    extra_args: str,
    output: Path,
) -> None:
    """Prune in both checkouts, and rewrite the table after each pair of runs."""
    checkouts = (
        _checkout(before, before_python, ()),
        _checkout(after, after_python, tuple(shlex.split(extra_args))),
    )
    options = [f"--samples={samples}", f"--sequence-length={sequence_length}", f"--workers={workers}"]
    options += ["--calibration=builtin:calibration", *(["--evaluate=builtin:heldout"] if evaluate else [])]
    rows, same = [HEADING], True
    for model in models:
        for method in methods:
            with tempfile.TemporaryDirectory() as folder:
                arguments = [*_model_argument(model), *METHODS[method], *options]
                found = compare_runs(checkouts, arguments, Path(folder))
            same = same and isinstance(found, Comparison) and not found.differing
            cells = found.cells if isinstance(found, Comparison) else ["", found, "", ""]
            rows.append([f"{Path(model).name}, {method}", *cells])
            print(*rows[-1], sep=" | ", flush=True)
            write_table(output, "The same bytes from two checkouts", _describe(checkouts, options), rows)
    sys.exit(not same)


def compare_runs(checkouts: tuple[Checkout, Checkout], arguments: list[str], folder: Path) -> Comparison | str:
    """Prune in both checkouts and return where the outputs differ, or which run failed and why."""
    outputs = []
    for name, checkout in zip(("before", "after"), checkouts, strict=True):
        place = folder / name
        place.mkdir()
        # Both outputs need the same name, because the model card may contain it.
        outputs.append(place / "pruned")
        own = [f"--output={outputs[-1]}", f"--tracking-uri=sqlite:///{place}/mlflow.db"]
        if failure := checkout.prune([*arguments, *own], place):
            return f"{name} failed, {failure}"
    return compare_outputs(*outputs)


def compare_outputs(before: Path, after: Path) -> Comparison:
    """Compare every file of two outputs except their journals."""
    comparison = Comparison()
    sides = [dict(_files(output)) for output in (before, after)]
    for name in sorted(sides[0].keys() | sides[1].keys()):
        comparison.files += 1
        if not all(name in side for side in sides):
            comparison.differing.append(f"{name} (only {'before' if name in sides[0] else 'after'})")
        elif _digest(sides[0][name]) != _digest(sides[1][name]):
            _compare_file(name, sides[0][name], sides[1][name], comparison)
    return comparison


def _compare_file(name: str, before: Path, after: Path, comparison: Comparison) -> None:
    """Record how two files with different bytes differ."""
    if before.suffix in (".json", ".toml"):
        _compare_content(name, before, after, comparison)
    elif before.suffix == ".py":
        same_code = _code(before) == _code(after)
        (comparison.text if same_code else comparison.differing).append(name)
    elif name == "README.md":
        comparison.text.append(name)
    else:
        comparison.differing.append(name)


def _compare_content(name: str, before: Path, after: Path, comparison: Comparison) -> None:
    found = list(_differing_keys(_parse(before), _parse(after), ""))
    settings = [key for key, one_sided in found if one_sided and before.name in SETTINGS]
    others = [key for key, one_sided in found if not one_sided or before.name not in SETTINGS]
    comparison.settings += [f"{name}: {' '.join(settings)}"] if settings else []
    comparison.differing += [f"{name}: {' '.join(others)}"] if others else []
    # Same content, different bytes: comments, or the order of keys.
    comparison.text += [] if found else [name]


def _differing_keys(before: Any, after: Any, path: str) -> Iterator[tuple[str, bool]]:
    """Yield the paths of values that differ, and whether only one side has them."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            below = f"{path}.{key}" if path else str(key)
            if key not in before or key not in after:
                yield f"{'+' if key in after else '-'}{below}", True
            else:
                yield from _differing_keys(before[key], after[key], below)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from _differing_keys(*pair, f"{path}[{number}]")
    elif before != after:
        yield path, False


def _parse(path: Path) -> Any:
    return tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_text())


def _code(path: Path) -> str:
    """Return a module's code without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            del body[0]
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _files(output: Path) -> Iterator[tuple[str, Path]]:
    for path in output.rglob("*"):
        # The mark holds the digests of the other files.
        if path.is_file() and path.name not in ("metrics.jsonl", "report.html", "complete.json"):
            yield str(path.relative_to(output)), path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checkout(directory: Path, python: str | None, options: tuple[str, ...]) -> Checkout:
    directory = directory.resolve()
    own = directory / ".venv" / "bin" / "python"
    checkout = Checkout(directory, python or (str(own) if own.exists() else sys.executable), options)
    checkout.require_own_code()
    return checkout


def _model_argument(model: str) -> list[str]:
    """Return the argument of `prune` for a model: none for the built-in one."""
    if model == "builtin":
        return []
    shared = ROOT.parent / "shared" / "models" / model
    return [str(shared if shared.is_dir() else Path(model).resolve())]


def _describe(checkouts: tuple[Checkout, Checkout], options: list[str]) -> str:
    """Return the machine, the commits and the options in one line."""
    commits = [_commit(checkout.directory) for checkout in checkouts]
    extra = f", the second with `{' '.join(checkouts[1].options)}`" if checkouts[1].options else ""
    return f"{describe_machine()}. {commits[0]} before, {commits[1]} after; `{' '.join(options)}`{extra}"


def _commit(directory: Path) -> str:
    """Return a checkout's commit, and whether files have changed since."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"commit {done.stdout.strip()}" if not done.returncode else "a directory without git"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


if __name__ == "__main__":
    main()
