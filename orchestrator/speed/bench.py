"""Measures models from start to end: from their names to tables of speed, memory and size, and their record."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.inputs import model_name
from orchestrator.output.staging import open_staging, require_free
from orchestrator.progress import Reporter
from orchestrator.record.params import version_params
from orchestrator.secrets import masked_all, uris_masked
from orchestrator.speed.config import BenchConfig, Shape
from orchestrator.speed.engines import ENGINES
from orchestrator.speed.inputs import BenchModel, load_bench_models
from orchestrator.speed.process import ModelProcess, start_process
from orchestrator.speed.record import log_figures
from orchestrator.speed.result import Round, rows_of
from orchestrator.speed.table import Figures, write_figures
from orchestrator.speed.widths import Sweep, sweep_widths
from orchestrator.speed.worker import describe, measure, profile, time_products
from orchestrator.tracking import TrackingOptions, tracked_run
from orchestrator.tracking.ray_job import link_with_job, require_lasting_output

# The new tokens of a pass that warms up; the third passes by what the second may have compiled.
WARM_UP_TOKENS = 3
# How many passes of each prompt are profiled.
PROFILES = 3


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The result of a bench; `output` is None if nothing was to be written."""

    output: Path | None
    figures: Figures
    tracking_uri: str | None
    experiment_id: str | None
    run_id: str | None


def bench(config: BenchConfig, reporter: Reporter | None = None) -> BenchResult:
    """Measure models side by side; `slimllm bench` calls this too.

    Raises:
        ConfigError, InputError, TrackingError: The settings cannot be met, or a model cannot be measured; nothing is
            left behind.

    Example:
        result = bench(BenchConfig(models=("path/to/model", "pruned/model-0.2")))
        print(result.figures.rows)
    """
    reporter = reporter or Reporter()
    tracking = TrackingOptions(
        experiment=config.experiment,
        tracking_uri=config.tracking_uri,
        run_name=config.run_name or f"{model_name(config.models[0])}-bench",
    )
    output = None if config.output is None else Path(config.output)
    if output is not None:
        require_lasting_output(config.output, tracking)
        require_free(output, config.overwrite)
    models = load_bench_models(config, reporter.warn)
    with (
        _place(output, config.overwrite) as directory,
        tracked_run(tracking, directory / "metrics.jsonl", reporter.warn) as run,
    ):
        link_with_job(run, reporter.warn)
        settings = asked(config)
        run.log_params(settings)
        with _processes(config, models, reporter) as processes:
            figures = _measure(config, models, processes, settings, reporter)
        if output is not None:
            write_figures(figures, directory)
        log_figures(run, figures, None if output is None else directory)
        return BenchResult(
            output=output,
            figures=figures,
            tracking_uri=run.tracking_uri,
            experiment_id=run.experiment_id,
            run_id=run.run_id,
        )


def asked(config: BenchConfig) -> dict[str, Any]:
    """Return what the figures depend on, settings and versions, without the credentials of addresses."""
    names = ("models", "engine", "batch_size", "prompt_length", "new_tokens", "rounds", "threads", "seed")
    settings = {name: value for name in names if (value := asdict(config)[name]) is not None}
    words = {name: ", ".join(map(str, value)) for name, value in settings.items() if isinstance(value, tuple)}
    return masked_all(settings | words | version_params(), uris_masked)


@contextmanager
def _place(output: Path | None, overwrite: bool) -> Iterator[Path]:
    """Yield a directory that becomes the output, or one that goes away if there is none."""
    if output is None:
        with TemporaryDirectory(prefix="slimllm-bench-") as directory:
            yield Path(directory)
    else:
        with open_staging(output, overwrite) as staging:
            yield staging.directory


@contextmanager
def _processes(
    config: BenchConfig, models: tuple[BenchModel, ...], reporter: Reporter
) -> Iterator[tuple[ModelProcess, ...]]:
    """Start a process for each model, and open its engine there."""
    with ExitStack() as stack:
        with reporter.timed("loading"):
            processes = tuple(
                stack.enter_context(start_process(model.name, config.threads, reporter.verbose)) for model in models
            )
            for process, model in zip(processes, models, strict=True):
                process.open(ENGINES[config.engine], model.place, config.most_tokens)
        yield processes


def _measure(
    config: BenchConfig,
    models: tuple[BenchModel, ...],
    processes: tuple[ModelProcess, ...],
    settings: dict[str, Any],
    reporter: Reporter,
) -> Figures:
    """Warm up, measure all rounds, profile, and time the widths."""
    for shape in config.shapes:
        for process in processes:
            process.ask(measure, shape.batch_size, shape.length, WARM_UP_TOKENS, config.seed)
    rounds = list(_rounds(config, processes, reporter))
    return Figures(
        engine=f"{config.engine} on {processes[0].ask(describe)}",
        settings=settings,
        models=models,
        rows=rows_of(models, config.shapes, rounds),
        rounds=list(_seconds(processes, rounds)),
        profiles=list(_profiles(config, processes)),
        sweeps=list(_sweeps(models, processes)) if config.widths else [],
    )


def _rounds(config: BenchConfig, processes: tuple[ModelProcess, ...], reporter: Reporter) -> Iterator[Round]:
    """Yield what each round measured: at each shape, the models take turns, A B A B over the rounds."""
    tokens = len(processes) * sum(batch * (length + config.new_tokens) for batch, length in config.shapes)
    for number in reporter.steps("measuring", "round", config.rounds, tokens):
        yield {
            (place, shape): process.ask(measure, *shape, config.new_tokens, config.seed + number)
            for shape in config.shapes
            for place, process in enumerate(processes)
        }


def _seconds(processes: tuple[ModelProcess, ...], rounds: Sequence[Round]) -> Iterator[dict[str, Any]]:
    """Yield the seconds of each generation, in the order of measuring."""
    for number, measured in enumerate(rounds):
        for (place, shape), one in measured.items():
            seconds = {name: value for name, value in asdict(one.generation).items() if name != "tokens"}
            yield {"round": number} | _told(processes[place], shape) | seconds


def _profiles(config: BenchConfig, processes: tuple[ModelProcess, ...]) -> Iterator[dict[str, Any]]:
    """Yield where the time of a prompt's pass goes, for each shape and model: in the fastest of a few passes."""
    for shape in config.shapes:
        passes = [[process.ask(profile, *shape, config.seed) for process in processes] for _ in range(PROFILES)]
        for process, seconds in zip(processes, zip(*passes, strict=True), strict=True):
            if fastest := min(seconds, key=lambda kinds: sum(kinds.values())):
                yield _told(process, shape) | {"seconds": fastest}


def _told(process: ModelProcess, shape: Shape) -> dict[str, Any]:
    return {"model": process.name, "batch_size": shape.batch_size, "prompt_length": shape.length}


def _sweeps(models: tuple[BenchModel, ...], processes: tuple[ModelProcess, ...]) -> Iterator[Sweep]:
    """Yield what the widths of each model cost."""
    for model, process in zip(models, processes, strict=True):
        known = model.config
        assert known is not None, "widths are timed in torch, which runs directories"

        def time_widths(
            widths: tuple[int, ...], process: ModelProcess = process, hidden_size: int = known.hidden_size
        ) -> dict[int, float]:
            return process.ask(time_products, widths, hidden_size)

        yield from sweep_widths(model.name, known, time_widths)
