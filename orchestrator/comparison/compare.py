"""Compares methods on one model, with the same calibration blocks and the same number of parameters left.

`slimllm` works layer by layer, as published. All other methods share one pass over the calibration data. With the
paper's ratio the sparsity is not known beforehand: `slimllm` goes first, and the others remove exactly as much.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.comparison.contestants import Contestant, choose, exclude_unrefinable
from orchestrator.comparison.scoreboard import Scoreboard
from orchestrator.comparison.table import ModelTasks, Row, write_table
from orchestrator.completion import REPORT_FILE
from orchestrator.config import CompareConfig, ConfigError, PruneConfig
from orchestrator.evaluation.asking import prepare_tasks, require_shared_files, tasks_of_run
from orchestrator.inputs import Inputs, load_inputs
from orchestrator.output.destination import Destination, sparsity_label
from orchestrator.output.staging import Staging, open_staging
from orchestrator.pipeline import named, tracking_options
from orchestrator.preflight.commands import estimate_comparison
from orchestrator.preflight.companions import require_companions
from orchestrator.preflight.dry_run import Estimating, Intent, require_room
from orchestrator.progress import Reporter
from orchestrator.pruning.backends import backend_of
from orchestrator.pruning.finish import complete
from orchestrator.pruning.generate import complete_calibration
from orchestrator.pruning.one_pass import observed_moments
from orchestrator.pruning.run_context import RunContext, open_context, open_session, settle_workers
from orchestrator.pruning.targets import Target, open_target, target_name
from orchestrator.record.files import write_record
from orchestrator.record.mlflow import log_inputs
from orchestrator.record.params import for_people, run_params
from orchestrator.record.run_toml import RUN_FILE, write_run_file
from orchestrator.record.totals import Totals, metric_suffix
from orchestrator.reports.page import write_report
from orchestrator.reports.sources import read_directory
from orchestrator.settings import declared
from orchestrator.tracking import Run, tracked_run
from orchestrator.tracking.ray_job import link_with_job, require_lasting_output
from slimllm_ops.checkpoint.moment_store import MomentStore


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of a comparison, the dense model's first.

    Attributes:
        output: The directory of the tables.
        rows: A row for each model and set of held-out blocks.
        tasks: Each model's results on tasks; none without tasks.
        tracking_uri, experiment_id, run_id: Where MLflow has them; None if it has not.
    """

    output: Path
    rows: tuple[Row, ...]
    tasks: tuple[ModelTasks, ...]
    tracking_uri: str | None
    experiment_id: str | None
    run_id: str | None


@dataclass(frozen=True)
class _Contest:
    """The context, run and settings that all methods of a comparison share."""

    context: RunContext
    run: Run
    params: dict[str, Any]
    keep_checkpoints: bool


def compare(
    config: CompareConfig, reporter: Reporter | None = None, chosen: Sequence[Contestant] | None = None
) -> Comparison:
    """Compare methods on a model; `slimllm compare` calls this too.

    Args:
        config: The model, the data, the sparsities or the paper's ratio, and the names of methods.
        reporter: Where to report progress.
        chosen: Methods to compare in place of those that the config names; `slimllm` must be the first.

    Raises:
        ConfigError, DataError, InputError, ClusterError, TrackingError: The settings cannot be met; nothing is left
            behind.

    Example:
        comparison = compare(CompareConfig(model="path/to/model", sparsity=(0.2,)))
        print(comparison.rows)
    """
    reporter = reporter or Reporter()
    chosen = choose(config.methods) if chosen is None else chosen
    tracking = tracking_options(config)
    require_lasting_output(config.output, tracking)
    ask = prepare_tasks(tasks_of_run(config))
    inputs = load_inputs(config, reporter.warn)
    require_companions(config.model, inputs, reporter)
    chosen = exclude_unrefinable(chosen, config.methods, inputs.source.family, reporter.note)
    if not inputs.held_out:
        raise ConfigError("nothing to compare by: pass held-out text or tokens with --evaluate")
    tracking = named(tracking, f"{inputs.name}-comparison-{sparsity_label(config)}")
    output = Path(config.output or f"comparisons/{inputs.name}")
    backend = backend_of(config)
    with (
        open_staging(output, config.overwrite) as staging,
        open_session(backend, staging, reporter) as resources,
        tracked_run(tracking, staging.directory / "metrics.jsonl", reporter.warn) as run,
    ):
        workers = settle_workers(backend, resources, staging)
        if ask:
            require_shared_files(workers)
        intent = Intent(config, inputs, Destination(output), resources, workers)
        require_room(intent, _estimating(config, chosen), reporter)
        with open_context(backend, resources, workers, config, inputs, staging, reporter) as context:
            context = complete_calibration(replace(context, ask=ask))
            inputs = context.inputs
            write_run_file(staging.directory / RUN_FILE, "compare", config, inputs, workers)
            params = run_params(config, inputs, workers) | {"methods": ", ".join(one.name for one in chosen)}
            log_inputs(run, {name: value for name, value in params.items() if name != "method"}, inputs)
            link_with_job(run, reporter.warn)
            board, seconds = _run_all(_Contest(context, run, params, config.keep_checkpoints), chosen)
        _publish(board, params, inputs, seconds, staging, run)
        return Comparison(
            output=output,
            rows=tuple(board.rows),
            tasks=tuple(board.tasks),
            tracking_uri=run.tracking_uri,
            experiment_id=run.experiment_id,
            run_id=run.run_id,
        )


def _estimating(config: CompareConfig, chosen: Sequence[Contestant]) -> Estimating:
    """Return the function that estimates what a comparison of these methods takes."""
    refined = sum(one.refine for one in chosen)
    return partial(estimate_comparison, one_pass=len(chosen) - 1, refined=refined, kept=config.keep_checkpoints)


def _run_all(contest: _Contest, chosen: Sequence[Contestant]) -> tuple[Scoreboard, float]:
    """Run all methods in turn; return their results and the seconds of the calibration pass that they share."""
    context, run = contest.context, contest.run
    held_out = context.inputs.held_out
    board = Scoreboard(context.inputs, {blocks.spec: context.dense_perplexity(blocks) for blocks in held_out})
    board.enter_dense()
    context.dense_answers()
    run.log_metrics(_losses(board.rows, "before"))
    start = time.perf_counter()
    store = observed_moments(context)
    calibration_seconds = time.perf_counter() - start
    run.log_metrics({"calibration_seconds": calibration_seconds})
    for contestant in chosen:
        _run_one(contest, store, contestant, board)
    return board, calibration_seconds


def _run_one(contest: _Contest, store: MomentStore, contestant: Contestant, board: Scoreboard) -> None:
    """Write a method's models, measure them, and delete them unless `keep_checkpoints` is set."""
    context = _context_of(contestant, contest.context)
    with _open_targets(context, contest.run, contestant.name, _sparsities(contest.context, board.reference)) as targets:
        start = time.perf_counter()
        contestant.prune(context, store, targets)
        seconds = (time.perf_counter() - start) / len(targets)
        for number, target in enumerate(targets):
            totals = complete(replace(context, reporter=context.reporter.continued()), target)
            asked = {"method": contestant.name, "source": contestant.source, "sparsity": target.sparsity}
            params = {name: value for name, value in (contest.params | asked).items() if value is not None}
            spent = seconds + totals.seconds.get("refining", 0.0)
            _log(target.run, params, board.enter(contestant, number, totals, spent))
            if contest.keep_checkpoints:
                (target.directory / "pruning").mkdir()
                write_record(target.directory, params, context.inputs, target.final.log.plans, totals)
            else:
                shutil.rmtree(target.directory)


def _context_of(contestant: Contestant, context: RunContext) -> RunContext:
    """Return a context with the settings that `prune` would get for this method, and with its own clock."""
    config = context.config
    if contestant.refine:
        shared = {name: getattr(config, name) for name, one in declared(PruneConfig).items() if one.taken_by("gram")}
        config = PruneConfig(**shared | {"method": "gram", "refine": True})
    return replace(context, config=config, reporter=Reporter(context.reporter.console))


def _sparsities(context: RunContext, reference: Sequence[Totals]) -> Sequence[float | None]:
    """Return the sparsity of each model; with the paper's ratio, the one that `slimllm` reached."""
    if context.config.ratio is None or not reference:
        return context.config.targets
    return [totals.sparsity for totals in reference]


@contextmanager
def _open_targets(
    context: RunContext, run: Run, method: str, sparsities: Sequence[float | None]
) -> Iterator[list[Target]]:
    """Open a directory and a child run for every model of a method; all log to the run's journal."""
    with ExitStack() as stack:
        targets = []
        for sparsity in sparsities:
            name = f"{method}-{target_name(sparsity, context.config)}"
            directory = context.staging.directory / "checkpoints" / name
            child = stack.enter_context(run.child(name))
            targets.append(
                open_target(sparsity, directory, child, context.source, context.staging, context.config.refine)
            )
        yield targets


def _log(run: Run, params: dict[str, Any], rows: Sequence[Row]) -> None:
    """Log a model's settings and its rows."""
    first = rows[0]
    run.log_params(for_people(params))
    run.log_metrics({"sparsity": first.sparsity, "parameters_after": first.parameters, "seconds": first.seconds})
    gaps = {f"gap{metric_suffix(number)}": row.gap for number, row in enumerate(rows)}
    run.log_metrics(_losses(rows, "after") | gaps)


def _losses(rows: Sequence[Row], when: str) -> dict[str, float]:
    """Return a model's losses and perplexities under the names that `prune` uses, so one chart can compare both."""
    perplexities = {f"perplexity_{when}{metric_suffix(number)}": row.perplexity for number, row in enumerate(rows)}
    return perplexities | {f"loss_{when}{metric_suffix(number)}": row.loss for number, row in enumerate(rows)}


def _publish(
    board: Scoreboard,
    params: dict[str, Any],
    inputs: Inputs,
    calibration_seconds: float,
    staging: Staging,
    run: Run,
) -> None:
    """Write the tables and figures, move them into the output, and log them from there."""
    header = {
        "model": inputs.name,
        "model_digest": inputs.source_digest,
        "calibration": inputs.calibration.spec,
        "calibration_digest": inputs.calibration.digest,
        "calibration_tokens": inputs.calibration.num_tokens,
        "calibration_seconds": calibration_seconds,
        "params": {name: value for name, value in params.items() if name not in ("method", "output")},
    }
    results = staging.work / "tables"
    results.mkdir()
    write_table(board.rows, board.tasks, header, results)
    write_report(results / REPORT_FILE, read_directory(results))
    run.log_note((results / "comparison.md").read_text(encoding="utf-8"))
    run.log_artifacts(*[path.rename(staging.directory / path.name) for path in sorted(results.iterdir())])
    if not any((checkpoints := staging.directory / "checkpoints").iterdir()):
        checkpoints.rmdir()
