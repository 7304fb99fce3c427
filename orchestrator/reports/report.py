"""Makes a report of runs: `from orchestrator import report, ReportConfig`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.config import ConfigError
from orchestrator.progress import Reporter
from orchestrator.reports.config import ReportConfig
from orchestrator.reports.page import write_report
from orchestrator.reports.parts import Continuation
from orchestrator.reports.sources import read_directory, read_file, unknown_source
from orchestrator.reports.values import ReportedRun, Sources


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """The page that was written, and how many of each it shows."""

    output: Path
    runs: int
    comparisons: int
    evaluations: int
    speeds: int


def report(config: ReportConfig, reporter: Reporter | None = None) -> ReportResult:
    """Write a report of runs; `slimllm report` calls this too.

    Raises:
        ConfigError: The page is there already, or its folder is not.
        InputError: A run cannot be read, or the models of `prompts` cannot be loaded.
        TrackingError: MLflow does not answer, or does not have a run.
        OSError: The disk is full, or the machine refuses something else.

    Example:
        result = report(ReportConfig(runs=("pruned/model-0.2",)))
        print(result.output)
    """
    reporter = reporter or Reporter()
    output = _require_output(config)
    sources = told_apart(sum((_read(one, config) for one in dict.fromkeys(config.runs)), Sources()))
    write_report(output, sources, _continue(config, sources, reporter))
    counts = (sources.runs, sources.comparisons, sources.evaluations, sources.speeds)
    names = ("runs", "comparisons", "evaluations", "speeds")
    return ReportResult(output=output, **dict(zip(names, map(len, counts), strict=True)))


def _require_output(config: ReportConfig) -> Path:
    output = Path(config.output)
    if output.is_dir():
        raise ConfigError(f"output {output} is a directory: pass the page to write, such as {output / 'report.html'}")
    if output.exists() and not config.overwrite:
        raise ConfigError(f"output {output} is there already: choose another --output, or pass --overwrite")
    if not output.parent.is_dir():
        raise ConfigError(f"output {output} lies in a folder that does not exist: make {output.parent}")
    return output


def _read(named: str, config: ReportConfig) -> Sources:
    """Return what a path or a run of MLflow holds."""
    path = Path(named)
    if path.is_dir():
        return read_directory(path)
    if path.exists():
        return read_file(path)
    # MLflow takes seconds to import.
    from orchestrator.reports.stored import find_run_id, read_stored

    run_id = find_run_id(named)
    if run_id is None:
        raise unknown_source(named)
    return read_stored(run_id, config.tracking_uri)


def told_apart(sources: Sources) -> Sources:
    """Return the sources with a name for each run that has the label of another, or another dense model."""
    labels = Counter(run.label for run in sources.runs)
    models = {run.model for run in sources.runs}
    return replace(sources, runs=tuple(_named(run, labels[run.label] > 1, len(models) > 1) for run in sources.runs))


def _named(run: ReportedRun, shared: bool, several_models: bool) -> ReportedRun:
    parts = [run.model] if several_models else []
    if shared and run.directory is not None:
        parts.append(run.directory.absolute().name)
    if shared and run.run_id:
        parts.append(f"run {run.run_id[:8]}")
    return replace(run, name=", ".join(parts)) if parts else run


def _continue(config: ReportConfig, sources: Sources, reporter: Reporter) -> Sequence[Continuation]:
    if not config.prompts:
        return ()
    # This loads whole models.
    from orchestrator.reports.continuations import continue_prompts

    return continue_prompts(sources.runs, config.prompts, reporter)
