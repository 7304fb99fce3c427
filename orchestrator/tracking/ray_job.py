"""Checks where a Ray job writes, and links the job with its MLflow run."""

from pathlib import Path

from cluster import ClusterError, inside_job
from orchestrator.config import ConfigError
from orchestrator.secrets import masked
from orchestrator.sources.storage import is_uri
from orchestrator.tracking import Run, TrackingOptions, database_file
from orchestrator.tracking.server import Warn

JOB_TAG = "slimllm.ray_job_id"
# Keys of the job's metadata; `slimllm jobs list` shows them.
RUN_ID_KEY = "mlflow_run_id"
TRACKING_URI_KEY = "mlflow_tracking_uri"


def require_lasting_output(output: str | None, tracking: TrackingOptions | None = None) -> None:
    """Refuse to write into the copy of the working directory that a submitted job runs in, which Ray deletes.

    Args:
        output: The output asked for; None stands for one in the working directory.
        tracking: Where the run is logged, if it is.

    Raises:
        ConfigError: The output or MLflow's database would be in the copy.
    """
    copy = inside_job.working_copy()
    if copy is None:
        return
    why = "the job's copy of --working-dir, which Ray deletes when no job needs it"
    if not is_uri(output) and Path(output or "").absolute().is_relative_to(copy):
        raise ConfigError(f"the output would be in {why}: pass --output with an absolute path")
    database = tracking and database_file(tracking.resolved_uri)
    if database and database.is_relative_to(copy):
        raise ConfigError(f"MLflow's database would be in {why}: pass --tracking-uri with a server or an absolute path")


def link_with_job(run: Run, warn: Warn) -> None:
    """Tag the run with the id of the Ray job it runs in, if any; add the run's id and server to the job's metadata."""
    job_id = inside_job.job_id()
    if job_id is None:
        return
    run.log_tags({JOB_TAG: job_id})
    if run.run_id is None or run.tracking_uri is None:
        return
    try:
        inside_job.add_to_metadata({RUN_ID_KEY: run.run_id, TRACKING_URI_KEY: masked(run.tracking_uri)})
    except ClusterError as error:
        warn(f"{error}: the job does not name its MLflow run, but the run's tags name the job")
