"""Drives a run: `from orchestrator import prune, PruneConfig`; to compare methods, `compare, CompareConfig`."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from orchestrator.comparison.compare import compare
    from orchestrator.config import CompareConfig, PruneConfig
    from orchestrator.pipeline import prune

__all__ = ["CompareConfig", "PruneConfig", "compare", "prune"]


def __getattr__(name: str) -> object:
    # Nothing is imported before it is asked for. The pipeline takes seconds, for which `slimllm --help` need not wait;
    # and `python -m orchestrator` runs this with the working directory first on its path (__main__.py).
    if name == "prune":
        from orchestrator.pipeline import prune

        return prune
    if name == "compare":
        from orchestrator.comparison.compare import compare

        return compare
    if name in ("CompareConfig", "PruneConfig"):
        from orchestrator import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
