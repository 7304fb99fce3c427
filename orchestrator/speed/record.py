"""Logs a bench: a child run for each model, with its figures at each batch size and prompt length."""

from dataclasses import asdict
from pathlib import Path

from orchestrator.speed.result import Row
from orchestrator.speed.table import Figures, as_markdown
from orchestrator.tracking import Run


def log_figures(run: Run, figures: Figures, directory: Path | None) -> None:
    """Log the tables, and the figures of each model; the files too if they were written."""
    run.log_note(as_markdown(figures))
    if directory is not None:
        run.log_artifacts(*(directory / f"bench.{kind}" for kind in ("csv", "json", "md")))
    for model in figures.models:
        with run.child(model.name) as child:
            child.log_params({"model": model.name, "engine": figures.engine})
            sizes = {"parameters": model.parameters, "bytes_on_disk": model.num_bytes}
            child.log_metrics({name: value for name, value in sizes.items() if value is not None})
            for row in figures.rows:
                if row.model == model.name:
                    child.log_metrics(metrics_of(row))


def metrics_of(row: Row) -> dict[str, float]:
    """Return the figures of a row as metrics, under names with its batch size and prompt length."""
    figures = {name: value for name, value in asdict(row).items() if isinstance(value, int | float)}
    place = f"batch_{figures.pop('batch_size')}_prompt_{figures.pop('prompt_length')}"
    return {f"{name}/{place}": float(value) for name, value in figures.items()}
