"""Driving a run: `from orchestrator import prune, PruneConfig`."""

from orchestrator.config import PruneConfig

__all__ = ["PruneConfig", "prune"]


def __getattr__(name: str) -> object:
    # The pipeline imports torch and Ray: seconds that `slimllm --help` need not wait for.
    if name == "prune":
        from orchestrator.pipeline import prune

        return prune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
