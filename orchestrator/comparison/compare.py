"""Methods side by side: one model, one set of calibration blocks, the same number of parameters left by all.

`slimllm` goes layer by layer, as published. All other methods share one pass over the calibration data. The paper's
own ratio removes what it removes: then `slimllm` goes first, and the others remove exactly as much.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import actors
import slimllm_ops
from cluster import find_room
from cluster.session import session
from orchestrator.comparison.table import DENSE, Row, gap_fraction, write_table
from orchestrator.config import CompareConfig, ConfigError, PruneConfig
from orchestrator.inputs import Inputs, load_inputs
from orchestrator.output.staging import Staging, staged
from orchestrator.pipeline import complete, named, settle_workers, tracking_options, working
from orchestrator.preflight.dry_run import amount
from orchestrator.progress import Reporter
from orchestrator.pruning.layerwise import prune_layerwise
from orchestrator.pruning.one_pass import observed_moments, prune_from_moments
from orchestrator.pruning.run_context import Job, Target, open_target, target_name
from orchestrator.record.files import Totals, count_parameters, log_inputs, run_params, write_record
from orchestrator.record.run_toml import RUN_FILE, write_run_file
from orchestrator.tracking import Run, tracked_run
from orchestrator.tracking.ray_job import link_with_job, require_lasting
from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.errors import InputError
from slimllm_ops.methods import METHODS, Method
from slimllm_ops.models.families import Family
from slimllm_ops.stream.refinement import require_refinable

# Every gap is a fraction of this method's.
REFERENCE = "slimllm"
# A config of gram has none of the paper's settings.
GRAM_ONLY = {"method": "gram", "ratio": None, "pruned_layers": None, "alpha": None}


@dataclass(frozen=True)
class Contestant:
    """A method as it takes part: from a job and the moments of the dense model, it writes every target's model.

    Attributes:
        name: what it is called.
        source: whose method it is.
        prune: writes the layers of every target.
        refine: whether the models are refined after that.
    """

    name: str
    source: str
    prune: Callable[[Job, MomentStore, list[Target]], None]
    refine: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison gave: a row per model and held-out data, the dense model's first."""

    output: Path
    rows: tuple[Row, ...]
    tracking_uri: str | None
    experiment_id: str | None
    run_id: str | None


@dataclass(frozen=True)
class _Contest:
    """What all methods of a comparison share."""

    job: Job
    run: Run
    params: dict[str, Any]
    keep_checkpoints: bool


@dataclass
class _Board:
    """The rows so far, and what those to come are measured by."""

    inputs: Inputs
    dense: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    # The reference's totals by the number of the target.
    reference: list[Totals] = field(default_factory=list)

    def enter(self, contestant: Contestant, target: int, totals: Totals, seconds: float) -> list[Row]:
        """Add a model's rows, one for each set of held-out blocks; return them."""
        if contestant.name == REFERENCE:
            self.reference.append(totals)
        entered = [
            Row(
                method=contestant.name,
                source=contestant.source,
                sparsity=totals.sparsity,
                parameters=totals.parameters_after,
                data=data,
                perplexity=pruned,
                loss=math.log(pruned),
                gap=gap_fraction(*map(math.log, (pruned, dense, self.reference[target].perplexity[data][1]))),
                seconds=seconds,
            )
            for data, (dense, pruned) in totals.perplexity.items()
        ]
        self.rows += entered
        return entered

    def enter_dense(self) -> None:
        """Add the dense model's rows."""
        parameters, _ = count_parameters(self.inputs.source)
        for data, perplexity in self.dense.items():
            values = {"perplexity": perplexity, "loss": math.log(perplexity), "gap": 0.0, "seconds": 0.0}
            self.rows.append(
                Row(method=DENSE, source="the model given", sparsity=0.0, parameters=parameters, data=data, **values)
            )


def compare(
    config: CompareConfig, reporter: Reporter | None = None, chosen: Sequence[Contestant] | None = None
) -> Comparison:
    """Compare methods on a model as a config asks; the command line ends here too.

    Args:
        config: the model, the data, the sparsities or the paper's ratio, and the names of methods.
        reporter: where progress is told.
        chosen: what takes part in place of the methods that the config names; `slimllm` must be the first.

    Raises:
        ConfigError, DataError, InputError, ClusterError, TrackingError: what was asked cannot be done as asked;
            nothing is left behind.
    """
    reporter = reporter or Reporter()
    chosen = choose(config.methods) if chosen is None else chosen
    tracking = tracking_options(config)
    require_lasting(config.output, tracking)
    inputs = load_inputs(config)
    chosen = refinable(chosen, config.methods, inputs.source.family, reporter.note)
    if not inputs.held_out:
        raise ConfigError("nothing to compare by: pass held-out text or tokens with --evaluate")
    tracking = named(tracking, f"{inputs.name}-comparison-{amount(config)}")
    output = Path(config.output or f"comparisons/{inputs.name}")
    with (
        staged(output, config.overwrite) as staging,
        session(config.address, (actors, slimllm_ops), verbose=reporter.verbose) as resources,
        tracked_run(tracking, staging.directory / "metrics.jsonl", reporter.warn) as run,
    ):
        workers = settle_workers(config, resources, staging)
        write_run_file(staging.directory / RUN_FILE, "compare", config, inputs, workers)
        params = run_params(config, inputs, workers) | {"methods": ", ".join(one.name for one in chosen)}
        log_inputs(run, {name: value for name, value in params.items() if name != "method"}, inputs)
        link_with_job(run, reporter.warn)
        with working(config, inputs, workers, find_room(resources, workers), staging, reporter) as job:
            rows, seconds = _run_all(_Contest(job, run, params, config.keep_checkpoints), chosen)
        _publish(rows, params, inputs, seconds, staging, run)
        return Comparison(
            output=output,
            rows=tuple(rows),
            tracking_uri=run.tracking_uri,
            experiment_id=run.experiment_id,
            run_id=run.run_id,
        )


def refinable(
    chosen: Sequence[Contestant], names: Sequence[str], family: Family, note: Callable[[str], None]
) -> list[Contestant]:
    """Return what takes part on a family: where that cannot be refined, what refines stays out, and a note says so.

    Raises:
        InputError: what refines was asked for by its name.
    """
    try:
        require_refinable(family)
    except InputError as error:
        if any(one.refine and one.name in names for one in chosen):
            raise
        note(f"{', '.join(one.name for one in chosen if one.refine)} does not take part: {error}")
        return [one for one in chosen if not one.refine]
    return list(chosen)


def choose(names: Sequence[str]) -> list[Contestant]:
    """Return what takes part, by name: `slimllm` first, and all there is where no name is given.

    Raises:
        ConfigError: a name is unknown.
    """
    known = {one.name: one for one in contestants()}
    for name in names:
        if name not in known:
            raise ConfigError(f"method {name!r} is unknown: choose among {', '.join(known)}")
    return [one for name, one in known.items() if name in names or not names or name == REFERENCE]


def contestants() -> list[Contestant]:
    """Return every method: `slimllm`, the rows of `METHODS`, a user's own among them, and gram refined."""
    rows = [one_pass(method) for method in METHODS.values()]
    return [LAYER_BY_LAYER, *rows[:1], REFINED, *rows[1:]]


def one_pass(method: Method) -> Contestant:
    """Return a row of `METHODS` as it takes part."""

    def prune(job: Job, store: MomentStore, targets: list[Target]) -> None:
        prune_from_moments(job, store, method, targets)

    return Contestant(method.name, method.source, prune)


def _prune_layer_by_layer(job: Job, store: MomentStore, targets: list[Target]) -> None:
    prune_layerwise(job, targets)


LAYER_BY_LAYER = Contestant(REFERENCE, "SlimLLM (Guo et al., ICML 2025), as published", _prune_layer_by_layer)
REFINED = replace(
    one_pass(METHODS["gram"]), name="gram-refine", source="gram, then refined towards the dense stream", refine=True
)


def _run_all(contest: _Contest, chosen: Sequence[Contestant]) -> tuple[list[Row], float]:
    """Let all take part, one after the other; return their rows and the seconds of the pass that they share."""
    job, run = contest.job, contest.run
    board = _Board(job.inputs, {blocks.spec: job.dense_perplexity(blocks) for blocks in job.inputs.held_out})
    board.enter_dense()
    run.log_metrics(_losses(board.rows, "before"))
    start = time.perf_counter()
    store = observed_moments(job)
    calibration_seconds = time.perf_counter() - start
    run.log_metrics({"calibration_seconds": calibration_seconds})
    for contestant in chosen:
        _run_one(contest, store, contestant, board)
    return board.rows, calibration_seconds


def _run_one(contest: _Contest, store: MomentStore, contestant: Contestant, board: _Board) -> None:
    """Write a method's models, measure them, and remove them unless they are to be kept."""
    job = _job_of(contestant, contest.job)
    with _open_targets(job, contest.run, contestant.name, _sparsities(contest.job, board.reference)) as targets:
        start = time.perf_counter()
        contestant.prune(job, store, targets)
        seconds = (time.perf_counter() - start) / len(targets)
        for number, target in enumerate(targets):
            totals = complete(replace(job, reporter=job.reporter.continued()), target)
            asked = {"method": contestant.name, "source": contestant.source, "sparsity": target.sparsity}
            params = {name: value for name, value in (contest.params | asked).items() if value is not None}
            spent = seconds + totals.seconds.get("refining", 0.0)
            _log(target.run, params, board.enter(contestant, number, totals, spent))
            if contest.keep_checkpoints:
                (target.directory / "pruning").mkdir()
                write_record(target.directory, params, job.inputs, target.final.log.plans, totals)
            else:
                shutil.rmtree(target.directory)


def _job_of(contestant: Contestant, job: Job) -> Job:
    """Return the job with the settings that `prune` would be given, and a clock of the method's own."""
    config = job.config
    if contestant.refine:
        shared = {item.name: getattr(config, item.name) for item in fields(PruneConfig)}
        config = PruneConfig(**shared | GRAM_ONLY | {"refine": True})
    return replace(job, config=config, reporter=Reporter(job.reporter.console))


def _sparsities(job: Job, reference: Sequence[Totals]) -> Sequence[float | None]:
    """Return what each model is to lose: with the paper's ratio, just what that made `slimllm` lose."""
    if job.config.ratio is None or not reference:
        return job.config.targets
    return [totals.sparsity for totals in reference]


@contextmanager
def _open_targets(job: Job, run: Run, method: str, sparsities: Sequence[float | None]) -> Iterator[list[Target]]:
    """Give every model of a method a directory and a child of the run, all in the run's journal."""
    with ExitStack() as stack:
        targets = []
        for sparsity in sparsities:
            name = f"{method}-{target_name(sparsity, job.config)}"
            directory = job.staging.directory / "checkpoints" / name
            child = stack.enter_context(run.child(name))
            targets.append(open_target(sparsity, directory, child, job.source, job.staging, job.config.refine))
        yield targets


def _log(run: Run, params: dict[str, Any], rows: Sequence[Row]) -> None:
    """Log what a model was made by, and its rows."""
    first = rows[0]
    run.log_params(params)
    run.log_metrics({"sparsity": first.sparsity, "parameters_after": first.parameters, "seconds": first.seconds})
    gaps = {f"gap{_suffix(number)}": row.gap for number, row in enumerate(rows)}
    run.log_metrics(_losses(rows, "after") | gaps)


def _losses(rows: Sequence[Row], when: str) -> dict[str, float]:
    """Return a model's losses under the names that `prune` has for them too: both are compared in one chart."""
    perplexities = {f"perplexity_{when}{_suffix(number)}": row.perplexity for number, row in enumerate(rows)}
    return perplexities | {f"loss_{when}{_suffix(number)}": row.loss for number, row in enumerate(rows)}


def _suffix(number: int) -> str:
    """Return how the metrics of a set of held-out blocks end: of several sets, the first keeps the plain names."""
    return f"/{number}" if number else ""


def _publish(
    rows: Sequence[Row], params: dict[str, Any], inputs: Inputs, calibration_seconds: float, staging: Staging, run: Run
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
    write_table(rows, header, results)
    run.log_note((results / "comparison.md").read_text())
    run.log_artifacts(*[path.rename(staging.directory / path.name) for path in sorted(results.iterdir())])
    if not any((checkpoints := staging.directory / "checkpoints").iterdir()):
        checkpoints.rmdir()
