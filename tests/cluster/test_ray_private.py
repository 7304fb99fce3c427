"""What we expect of Ray's private names, with the Ray that is installed."""

import asyncio
import importlib
import inspect
import logging
import sys
from pathlib import Path

import pytest
import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.dashboard.modules.job.common import JobInfo
from ray.job_config import JobConfig
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.driver_paths import OwnPaths
from cluster.ray_private import CHATTY, HEALTH_CHECK, asks_for_token, find_local_head, job_records


def test_a_ray_of_this_release_is_healthy_and_another_one_is_not(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Here, because this process has the token; session.py gives the program a process of its own.
    monkeypatch.setattr(sys, "argv", ["-c", ray.get_runtime_context().gcs_address])
    exec(HEALTH_CHECK, {})
    theirs = ray.__version__
    monkeypatch.setattr(ray, "__version__", "1.2.3")
    with pytest.raises(SystemExit) as ended:
        exec(HEALTH_CHECK, {})
    assert ended.value.code == (
        f"Ray version mismatch: cluster has Ray version {theirs} but local Ray version is 1.2.3"
    )


@pytest.mark.parametrize("name", CHATTY)
def test_a_logger_that_is_silenced_is_one(name: str) -> None:
    assert logging.getLogger(name) in vars(importlib.import_module(name)).values()


def test_where_no_ray_runs_none_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(iter(inspect.signature(canonicalize_bootstrap_address).parameters)) == "addr"
    # Ray looks here for the one that last ran.
    monkeypatch.setattr("ray._private.services.get_ray_address_from_environment", lambda *asked: None)
    assert find_local_head() is None


def test_a_jobs_record_is_written_and_read(local_ray: None) -> None:
    records, name = job_records(), "slimllm-test-of-records"
    assert asyncio.run(records.get_info(name, timeout=10)) is None
    info = JobInfo(status=JobStatus.STOPPED, entrypoint="true", metadata={"a": "b"})
    asyncio.run(records.put_info(name, info, timeout=10))
    assert asyncio.run(records.get_info(name, timeout=10)).metadata == {"a": "b"}


def test_every_question_to_a_job_server_passes_one_method() -> None:
    asked = list(inspect.signature(JobSubmissionClient._do_request).parameters.values())
    assert [one.name for one in asked[:3]] == ["self", "method", "endpoint"]
    assert asked[-1].kind is inspect.Parameter.VAR_KEYWORD
    for name in ("submit_job", "get_job_info", "get_job_logs", "list_jobs", "stop_job"):
        assert "self._do_request(" in inspect.getsource(getattr(JobSubmissionClient, name))


def test_the_folders_of_a_driver_travel_in_a_list_that_can_be_replaced() -> None:
    config = JobConfig()
    config._py_driver_sys_path = ["/driver"]
    assert JobConfig.from_json is not None
    assert "/driver" in config._get_proto_job_config().py_driver_sys_path
    assert list(OwnPaths(Path("/own"))._get_proto_job_config().py_driver_sys_path) == []
    own = OwnPaths(Path("/own"))
    own._serialize()
    assert list(own._get_proto_job_config().py_driver_sys_path) == ["/own"]


def test_a_local_ray_asks_for_a_token(local_ray: None) -> None:
    assert asks_for_token() is True
