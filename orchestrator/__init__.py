"""Drives a run: `from orchestrator import prune, PruneConfig`.

To compare methods, import `compare, CompareConfig`; to train a pruned model, `tune, TuneConfig`; to measure models,
`evaluate, EvaluateConfig`, and their speed, `bench, BenchConfig`; for a page about runs, `report, ReportConfig`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from orchestrator.comparison.compare import compare
    from orchestrator.config import CompareConfig, PruneConfig
    from orchestrator.evaluation.config import EvaluateConfig
    from orchestrator.evaluation.evaluate import evaluate
    from orchestrator.pipeline import prune
    from orchestrator.reports.config import ReportConfig
    from orchestrator.reports.report import report
    from orchestrator.speed.bench import bench
    from orchestrator.speed.config import BenchConfig
    from orchestrator.tuning.config import TuneConfig
    from orchestrator.tuning.tune import tune

__all__ = [
    "BenchConfig",
    "CompareConfig",
    "EvaluateConfig",
    "PruneConfig",
    "ReportConfig",
    "TuneConfig",
    "bench",
    "compare",
    "evaluate",
    "prune",
    "report",
    "tune",
]

# The modules that define these names.
_HOMES = {
    "BenchConfig": "orchestrator.speed.config",
    "CompareConfig": "orchestrator.config",
    "EvaluateConfig": "orchestrator.evaluation.config",
    "PruneConfig": "orchestrator.config",
    "ReportConfig": "orchestrator.reports.config",
    "TuneConfig": "orchestrator.tuning.config",
    "bench": "orchestrator.speed.bench",
    "compare": "orchestrator.comparison.compare",
    "evaluate": "orchestrator.evaluation.evaluate",
    "prune": "orchestrator.pipeline",
    "report": "orchestrator.reports.report",
    "tune": "orchestrator.tuning.tune",
}


def __getattr__(name: str) -> object:
    # Nothing is imported before it is asked for. The pipeline takes seconds, for which `slimllm --help` need not wait;
    # and `python -m orchestrator` runs this with the working directory first on its path (__main__.py).
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
