"""Reads what a directory or a file holds for a report: plans, comparisons, evaluations, speeds.

A directory may be another's: files are read within bounds, nothing in them is run, and a value of another type than
expected is left out.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.json_values import json_value
from orchestrator.reports.values import MeasuredModel, ReportedRun, Sources, number_at, rows_at, run_of
from orchestrator.tracking.journal import Journal
from slimllm_ops.decide.plan import Decision, LayerPlan, Plan
from slimllm_ops.errors import InputError, shown
from slimllm_ops.files import read_json_object

PLAN, JOURNAL = Path("pruning/plan.json"), Path("pruning/metrics.jsonl")
COMPARISON, EVALUATION, SPEED = "comparison.json", "evaluation.json", "bench.json"
# Where an output may hold each file.
PLACES = ("", "pruning")
# The prefix of the journal's metrics that are seconds by stage.
SECONDS = "seconds/"
# The largest file besides a plan that is read.
MOST_BYTES = 1 << 26
WHAT_IS_TAKEN = (
    "a directory that slimllm prune, tune or compare wrote, one with several of them, evaluation.json, bench.json, or "
    "the id of an MLflow run"
)


def read_directory(directory: Path) -> Sources:
    """Return what a directory holds: a checkpoint, a comparison, or a folder with several checkpoints.

    Raises:
        InputError: It holds nothing that slimllm wrote, or a file in it is broken.
    """
    found = _own(directory)
    if not found.runs and not found.comparisons:
        found = sum((_own(one) for one in _checkpoints_in(directory)), found)
    if not found:
        raise InputError(
            f"{directory} has no {PLAN}, {COMPARISON}, {EVALUATION} or {SPEED}, and no folder with one: pass "
            f"{WHAT_IS_TAKEN}"
        )
    return found


def read_file(path: Path) -> Sources:
    """Return what a file holds, by its name.

    Raises:
        InputError: It has another name, or is broken.
    """
    for name, read in READERS.items():
        if path.name.endswith(name):
            return read(_read_object(path))
    if path.name == PLAN.name:
        return Sources(runs=(read_run(path.absolute().parents[1]),))
    raise InputError(f"{path} is a file of another name than {', '.join(READERS)}: pass {WHAT_IS_TAKEN}")


def _own(directory: Path) -> Sources:
    """Return what a directory holds itself."""
    found = Sources(runs=(read_run(directory),)) if (directory / PLAN).exists() else Sources()
    for name, read in READERS.items():
        for path in (directory / place / name for place in PLACES):
            if path.exists():
                found += read(_read_object(path))
    return found


def _checkpoints_in(directory: Path) -> list[Path]:
    """Return the folders with a plan, such as those of a sweep."""
    return sorted(folder for folder in directory.iterdir() if (folder / PLAN).is_file())


def read_run(directory: Path) -> ReportedRun:
    """Return the run that wrote a checkpoint.

    Raises:
        InputError: The plan is missing or broken.
    """
    path = directory / PLAN
    try:
        plan = Plan.read(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): pass {WHAT_IS_TAKEN}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a plan that slimllm wrote ({error!r}): get a fresh copy") from error
    require_whole(path, plan)
    return run_of(plan, seconds_of(_metrics(directory / JOURNAL)), directory)


def require_whole(path: Path, plan: Plan) -> None:
    """Check that each layer's decisions name units that there are, and measure errors as numbers.

    Raises:
        InputError: One does not.
    """
    for number, layer in enumerate(plan.layers):
        for module, decision in decisions_of(layer):
            if not all(isinstance(one, int) and 0 <= one < decision.num_units for one in decision.kept):
                raise InputError(f"{path}, layer {number}, {module}: kept names units that are not there")
            if not isinstance(decision.relative_error, int | float):
                raise InputError(f"{path}, layer {number}, {module}: relative_error is not a number")


def decisions_of(layer: LayerPlan) -> list[tuple[str, Decision]]:
    """Return a layer's decisions by module."""
    modules = (("attention", layer.attention), ("mlp", layer.mlp))
    return [(name, decision) for name, decision in modules if decision is not None]


def seconds_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds by stage among a run's metrics."""
    stages = {name.removeprefix(SECONDS): number_at(metrics, name) for name in metrics if name.startswith(SECONDS)}
    return {stage: seconds for stage, seconds in stages.items() if seconds is not None}


def _metrics(journal: Path) -> dict[str, Any]:
    """Return the last value of each metric without a step in a journal; nothing without one that can be read."""
    metrics: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        for event in Journal.read(journal):
            if event["event"] == "metrics" and event.get("step") is None and isinstance(event.get("metrics"), dict):
                metrics |= event["metrics"]
    return metrics


def _read_object(path: Path) -> dict[str, Any]:
    return json_value(read_json_object(path, MOST_BYTES))


def _comparison_of(held: Mapping[str, Any]) -> Sources:
    return Sources(comparisons=(held,))


def _evaluations_of(held: Mapping[str, Any]) -> Sources:
    """Return the models of an evaluation.json.

    The keys: models[].model, .perplexity[] (data, length, value, bits_per_byte, kl, agreement), .tasks[] (task, metric,
    value, stderr).
    """
    models = [
        MeasuredModel(model=str(one.get("model")), perplexity=rows_at(one, "perplexity"), tasks=rows_at(one, "tasks"))
        for one in rows_at(held, "models")
    ]
    return Sources(evaluations=tuple(models))


def _speeds_of(held: Mapping[str, Any]) -> Sources:
    """Return the rows of a bench.json.

    The keys: rows[].model, .batch_size, .prompt_length, .prefill_tokens_per_second, .decode_tokens_per_second,
    .prefill_ratio, .decode_ratio.
    """
    return Sources(speeds=tuple(rows_at(held, "rows")))


READERS: dict[str, Callable[[Mapping[str, Any]], Sources]] = {
    COMPARISON: _comparison_of,
    EVALUATION: _evaluations_of,
    SPEED: _speeds_of,
}


def unknown_source(named: str) -> InputError:
    """Return the error for what is neither a path nor a run."""
    return InputError(f"{shown(named)} is no directory, no file and no id of an MLflow run: pass {WHAT_IS_TAKEN}")
