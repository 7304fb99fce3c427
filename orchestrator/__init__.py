"""Drives a run: `from orchestrator import prune, PruneConfig`; to compare methods, `compare, CompareConfig`."""

from orchestrator.config import CompareConfig, PruneConfig

__all__ = ["CompareConfig", "PruneConfig", "compare", "prune"]


def __getattr__(name: str) -> object:
    # The pipeline imports torch and Ray, which takes seconds; `slimllm --help` need not wait for that.
    if name == "prune":
        from orchestrator.pipeline import prune

        return prune
    if name == "compare":
        from orchestrator.comparison.compare import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
