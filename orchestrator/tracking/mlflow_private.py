"""Uses what MLflow does not document. tests/orchestrator/tracking/test_mlflow_private.py says what we expect of it."""

from contextlib import suppress
from typing import Any


def context_tags(tags: dict[str, str]) -> dict[str, str]:
    """Return tags with those that MLflow's own runs have: user, source, git commit."""
    from mlflow.tracking.context.registry import resolve_tags

    return resolve_tags(tags)


def system_monitors() -> list[Any]:
    """Return MLflow's monitors of this machine: processor, disk, network, and GPUs if there are any."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(Exception):
        monitors.append(GPUMonitor())
    return monitors
