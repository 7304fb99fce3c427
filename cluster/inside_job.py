"""What a program knows and can do where it is the driver of a Ray job, however that was submitted."""

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError

# Ray describes a job to its driver, and to nobody else, in this variable.
DESCRIPTION = "RAY_JOB_CONFIG_JSON_ENV_VAR"
GCS_SECONDS = 10


def job_id() -> str | None:
    """Return the id that the job was submitted by; None where the program is no job."""
    return _description().get("metadata", {}).get("job_submission_id")


def working_copy() -> Path | None:
    """Return the copy of a submitter's folder that a job runs in, and that Ray deletes; None where there is none."""
    return Path.cwd() if _runtime_env().get("working_dir") else None


def carries_packages() -> bool:
    """Return whether Python packages travel with the job already, to its workers too."""
    return bool(_runtime_env().get("py_modules"))


def add_to_metadata(entries: Mapping[str, str]) -> None:
    """Add to what the job server tells of the job that this is. Ray must be connected.

    Raises:
        ClusterError: this release of Ray keeps it in another way, or does not answer.
    """
    try:
        asyncio.run(_add_to_metadata(str(job_id()), entries))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClusterError(f"the job's metadata could not be written ({reason})") from error


async def _add_to_metadata(submission_id: str, entries: Mapping[str, str]) -> None:
    # Ray's public interface takes metadata at submission alone, when there is no run yet. The job server reads this
    # record, which its own supervisor writes when the driver begins and when it has ended, and not in between.
    from ray._private.worker import global_worker
    from ray.dashboard.modules.job.common import JobInfoStorageClient

    storage = JobInfoStorageClient(global_worker.gcs_client)  # type: ignore[attr-defined]
    info = await storage.get_info(submission_id, timeout=GCS_SECONDS)
    if info is None:
        raise LookupError(f"Ray knows no job {submission_id}")
    info.metadata = {**(info.metadata or {}), **entries}
    await storage.put_info(submission_id, info, timeout=GCS_SECONDS)


def _runtime_env() -> dict[str, Any]:
    return _description().get("runtime_env") or {}


def _description() -> dict[str, Any]:
    return json.loads(os.environ.get(DESCRIPTION) or "{}")
