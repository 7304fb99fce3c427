"""Describes the Ray job that this program drives, if any, and adds to its metadata."""

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.ray_private import job_records

# Ray describes a job in this variable, for the job's driver only.
DESCRIPTION = "RAY_JOB_CONFIG_JSON_ENV_VAR"
GCS_SECONDS = 10


def job_id() -> str | None:
    """Return the id that the job was submitted with; None if the program is not a job."""
    return _description().get("metadata", {}).get("job_submission_id")


def working_copy() -> Path | None:
    """Return the copy of the submitter's folder that the job runs in and Ray deletes; None if there is none."""
    return Path.cwd() if _runtime_env().get("working_dir") else None


def carries_packages() -> bool:
    """Return whether the job already brings its Python packages, for its workers too."""
    return bool(_runtime_env().get("py_modules"))


def add_to_metadata(entries: Mapping[str, str]) -> None:
    """Add to the metadata that the job server reports for this job. Ray must be connected.

    Raises:
        ClusterError: This release of Ray stores it differently, or Ray does not answer.
    """
    try:
        asyncio.run(_add_to_metadata(str(job_id()), entries))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClusterError(f"the job's metadata could not be written ({reason})") from error


async def _add_to_metadata(submission_id: str, entries: Mapping[str, str]) -> None:
    # Ray's public interface takes metadata only at submission, when there is no run yet. The job server reads this
    # record. Its own supervisor writes the record when the driver begins and when it has ended, but not in between.
    storage = job_records()
    info = await storage.get_info(submission_id, timeout=GCS_SECONDS)
    if info is None:
        raise LookupError(f"Ray knows no job {submission_id}")
    info.metadata = {**(info.metadata or {}), **entries}
    await storage.put_info(submission_id, info, timeout=GCS_SECONDS)


def _runtime_env() -> dict[str, Any]:
    return _description().get("runtime_env") or {}


def _description() -> dict[str, Any]:
    return json.loads(os.environ.get(DESCRIPTION) or "{}")
