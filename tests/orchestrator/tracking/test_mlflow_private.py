"""What we expect of what MLflow does not document, with the MLflow that is installed."""

import getpass

import psutil

from orchestrator.tracking.mlflow_private import context_tags, system_monitors


def test_a_run_gets_the_tags_of_mlflows_own_runs() -> None:
    tags = context_tags({"mine": "kept"})
    assert tags["mine"] == "kept"
    assert tags["mlflow.user"] == getpass.getuser()
    assert {"mlflow.source.name", "mlflow.source.type"} <= tags.keys()


def test_monitors_measure_this_machine() -> None:
    measured: dict[str, float] = {}
    for monitor in system_monitors():
        monitor.collect_metrics()
        values = monitor.aggregate_metrics()
        assert all(isinstance(value, int | float) for value in values.values())
        measured |= values
        monitor.clear_metrics()
        assert not monitor.metrics
    assert 0 <= measured["cpu_utilization_percentage"] <= 100
    assert 0 < measured["system_memory_usage_megabytes"] <= psutil.virtual_memory().total / 1e6
    assert {"disk_usage_percentage", "network_receive_megabytes"} <= measured.keys()
