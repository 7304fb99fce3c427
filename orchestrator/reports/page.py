"""Renders a report as one page in HTML, with its styles and figures in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.reports.measures import (
    comparison_section,
    evaluation_section,
    over_sparsity,
    points_of,
    speed_section,
)
from orchestrator.reports.parts import UNKNOWN, Continuation, Section, Table, listed, shown_number
from orchestrator.reports.runs import sections_of, settings_section
from orchestrator.reports.values import ReportedRun, Sources, mapping_at, number_at, pairs_at
from slimllm_ops.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES, PAGE = Path(__file__).parent / "templates", "report.html.j2"
LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY", config=model.config)
"""
SERVE = "vllm serve DIRECTORY --trust-remote-code"
EXPORT = "slimllm export DIRECTORY --to gguf"


def write_report(path: Path, sources: Sources, continuations: Sequence[Continuation] = ()) -> None:
    """Write a report; the same sources give the same bytes."""
    write_text(path, render_report(sources, continuations))


def render_report(sources: Sources, continuations: Sequence[Continuation] = ()) -> str:
    """Return a report as HTML; everything that comes from files is escaped."""
    template = _environment().get_template(PAGE)
    title = _title(sources)
    groups = [(run.label, sections_of(run, f"run-{number}")) for number, run in enumerate(sources.runs)]
    return template.render(
        title=title,
        facts=_facts(sources.runs[0]) if len(sources.runs) == 1 else (),
        first=_present(
            _overview(sources.runs),
            over_sparsity(points_of(sources)),
            comparison_section(sources.comparisons),
        ),
        groups=[(label, sections) for label, sections in groups if sections],
        last=_present(
            evaluation_section(sources.evaluations),
            speed_section(sources.speeds),
            _continuations(continuations),
            _how_to_use() if sources.runs else None,
            _settings(sources),
        ),
    )


def _environment() -> "Environment":
    # Imported here: most commands render nothing.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATES)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _present(*sections: Section | None) -> list[Section]:
    return [section for section in sections if section is not None]


def _title(sources: Sources) -> str:
    if len(sources.runs) == 1:
        (run,) = sources.runs
        return run.model if run.sparsity is None else f"{run.model}, pruned by {run.sparsity:.1%}"
    compared = [Path(str(one.get("model"))).name for one in sources.comparisons]
    models = list(dict.fromkeys([*(run.model for run in sources.runs), *compared]))
    return f"{listed(models)}: {len(sources.runs)} pruned models" if sources.runs else listed(models) or "Measurements"


def _facts(run: ReportedRun) -> list[tuple[str, str]]:
    """Return the figures that stand first on the page of one run: a name and a value each."""
    totals = run.totals
    facts = [("method", run.method), ("sparsity", shown_number(run.sparsity, "{:.2%}"))]
    for name, key, form in (("parameters", "parameters", "{:,}"), ("decoder layers", "layers", "{:,}")):
        facts.append((name, _change(totals.get(f"{key}_before"), totals.get(f"{key}_after"), form)))
    before, after = (_megabytes(number_at(totals, f"bytes_{when}")) for when in ("before", "after"))
    facts.append(("weights, MB", _change(before, after, "{:,.1f}")))
    for spec in mapping_at(totals, "perplexity"):
        facts.append((f"perplexity, {Path(spec).name}", _perplexities(run, spec)))
    for dense, pruned in pairs_at(totals, "tasks"):
        name = f"{pruned.get('task')}, {pruned.get('metric')}"
        facts.append((name, _change(dense.get("value"), pruned.get("value"), "{:.4f}")))
    return [(name, value) for name, value in facts if value != UNKNOWN]


def _megabytes(size: float | None) -> float | None:
    return None if size is None else size / 1e6


def _perplexities(run: ReportedRun, spec: str) -> str:
    """Return the perplexities of the dense and the pruned model on a text."""
    match mapping_at(run.totals, "perplexity").get(spec):
        case [before, after]:
            return _change(before, after, "{:,.2f}")
        case _:
            return UNKNOWN


def _change(before: object, after: object, form: str) -> str:
    """Return a value before and after the pruning, or once if it is the same."""
    first, last = shown_number(before, form), shown_number(after, form)
    return first if first == last else f"{first} → {last}"


def _overview(runs: Sequence[ReportedRun]) -> Section | None:
    """Return a table with a row for each of several runs."""
    if len(runs) < 2:
        return None
    specs = list(dict.fromkeys(spec for run in runs for spec in mapping_at(run.totals, "perplexity")))
    headings = ("run", "sparsity", "parameters", *(f"perplexity, {Path(spec).name}" for spec in specs))
    rows = []
    for run in runs:
        counted = shown_number(run.totals.get("parameters_after"), "{:,}")
        sparsity = shown_number(run.sparsity, "{:.2%}")
        rows.append((run.label, sparsity, counted, *(_perplexities(run, spec) for spec in specs)))
    table = Table(caption="All runs; perplexity before and after the pruning", headings=headings, rows=tuple(rows))
    return Section(name="overview", title="Runs", tables=(table,))


def _continuations(found: Sequence[Continuation]) -> Section | None:
    notes = ("Each model writes the token that it finds most likely, and then the next.",)
    shown = tuple(found)
    return Section(name="samples", title="Sample continuations", notes=notes, continuations=shown) if shown else None


def _how_to_use() -> Section:
    """Return how to load and serve a checkpoint."""
    programs = (
        ("Load it in transformers", LOAD),
        ("Serve it with vLLM 0.28 or later", SERVE),
        ("Export it to llama.cpp", EXPORT),
    )
    notes = (
        "DIRECTORY is the folder of the checkpoint. With trust_remote_code=True, transformers loads the small model "
        "files that slimllm wrote into it.",
    )
    return Section(name="use", title="Load and serve", notes=notes, programs=programs)


def _settings(sources: Sources) -> Section | None:
    told = [(run.label, run.params) for run in sources.runs]
    for run in sources.runs:
        told += [(f"training of {run.label}", mapping_at(one, "params")) for one in run.trainings]
    for held in sources.comparisons:
        digests = {name: held.get(name) for name in ("model", "model_digest", "calibration", "calibration_digest")}
        told.append(("comparison", digests | dict(mapping_at(held, "params"))))
    return settings_section(told) if told else None
