"""Runs jobs on a Ray cluster through its job server: submits one, follows its log, sees how it ended, stops it.

Every wait has a limit. Every failure is a `ClusterError` of one line.
"""

import logging
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus

from cluster.errors import ClusterError
from cluster.job_address import SERVER_VARIABLE, find_address, variable_set
from cluster.job_client import JobClient, Tell
from cluster.job_log import LogTail
from cluster.ray_private import CHATTY
from cluster.working_directory import without_code

# How long a log may be silent before the job's state is checked, and a server before it counts as lost.
QUIET_SECONDS = 1.0
LOST_SECONDS = 10.0
# Ray stops a job with SIGTERM, and with SIGKILL after 3 s unless the job's environment allows more. A run needs more:
# it shuts its workers down, and reports to a tracking server that may be slow.
STOP_SECONDS = 60
STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
AS_THE_CLUSTER = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN to what the cluster has"


class LostError(ClusterError):
    """A job server that has stopped answering; the job's state is unknown."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job's state as its server reports it; times are in seconds since the epoch.

    Attributes:
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        exit_code: The exit code of its process, negative for a signal; None if it runs, was stopped or never began.
        message: Ray's message about the job, possibly several lines.
    """

    job_id: str
    status: str
    command: str
    began: float | None
    ended: float | None
    exit_code: int | None
    message: str
    metadata: Mapping[str, str]

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, in any way."""
        return JobStatus(self.status).is_terminal()


class JobServer:
    """The job server of a cluster's head.

    Args:
        address: Any form that `cluster.job_address.find_address` takes.
        tell: Receives a line when this waits for a server that is starting.

    Raises:
        ClusterError: Nothing answers there, it is not Ray, or it denies access.
    """

    def __init__(self, address: str | None = None, tell: Tell = lambda line: None) -> None:
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        found = find_address(address)
        self.address, self._remedy = found.address, found.remedy
        with self._as_cluster_errors(), variable_set(SERVER_VARIABLE, self.address):
            self._client = JobClient(self.address, tell)
        # Of a head that was asked for its job server, this is the job server.
        self.address = self._client.get_address()

    def submit(
        self,
        command: Sequence[str],
        packages: Sequence[Path],
        *,
        working_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Start a job on the cluster's head and return its id.

        Args:
            command: The words of a command.
            packages: Folders of Python packages that the job and its workers import; they are uploaded with it.
            working_dir: A folder to copy as the job's working directory, without code; by default the job uses the
                head's own.
            environment: Variables of the job and its workers. Anyone with access to the job server can read them.

        Raises:
            ClusterError: The folder is missing, too large or has a pipe or the like, or the job server refuses.
        """
        runtime_env: dict[str, Any] = {
            "py_modules": [str(package) for package in packages],
            "env_vars": {STOP_VARIABLE: str(STOP_SECONDS), **(environment or {})},
        }
        # Without `exec`, a shell in between hides the signal that ended the process.
        entrypoint = f"exec {shlex.join(command)}"
        with without_code(working_dir) if working_dir is not None else nullcontext() as uploaded:
            if uploaded is not None:
                runtime_env["working_dir"] = str(uploaded)
            with self._as_cluster_errors(working_dir=working_dir):
                return self._client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)

    def state(self, job_id: str) -> JobState:
        """Return the state of a job.

        Raises:
            ClusterError: The job does not exist.
            LostError: The server no longer answers.
        """
        with self._as_cluster_errors(job_id=job_id):
            return _state(self._client.get_job_info(job_id))

    def states(self) -> list[JobState]:
        """Return the states of all submitted jobs, the latest first."""
        with self._as_cluster_errors():
            jobs = self._client.list_jobs()
        # Ray also lists other connected programs; they have no log, and cannot be stopped.
        submitted = [_state(job) for job in jobs if job.submission_id]
        return sorted(submitted, key=lambda job: job.began or 0.0, reverse=True)

    def log(self, job_id: str) -> str:
        """Return everything that a job has printed so far."""
        with self._as_cluster_errors(job_id=job_id):
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, seen: int = 0) -> Iterator[str]:
        """Yield a job's output as it comes, until the job has ended.

        Args:
            job_id: The id of the job.
            seen: The number of characters of the log to skip, because they were seen before.

        Raises:
            ClusterError: The job does not exist.
            LostError: The server no longer answers; the job may still be running.
        """
        over = self.state(job_id).is_over
        while not over:
            with closing(LogTail(self._client, job_id)) as tail:
                passed = 0
                while not over and (text := tail.read(QUIET_SECONDS)) is not None:
                    fresh = text[max(0, seen - passed) :]
                    passed += len(text)
                    seen = max(seen, passed)
                    if fresh:
                        yield fresh
                    over = not text and self._patient_state(job_id).is_over
            if not over:
                # A proxy may close a connection that is silent for long. Then the log is read from its beginning.
                time.sleep(QUIET_SECONDS)
                over = self._patient_state(job_id).is_over
        if rest := self.log(job_id)[seen:]:
            yield rest

    def stop(self, job_id: str) -> None:
        """Ask a job to stop, as SIGTERM asks a process; do nothing if it has ended.

        Raises:
            ClusterError: The job does not exist.
            LostError: The server no longer answers.
        """
        with self._as_cluster_errors(job_id=job_id):
            self._client.stop_job(job_id)

    def wait_for_stop(self, job_id: str) -> JobState:
        """Wait until a job that was told to stop has ended, and return its state.

        Raises:
            ClusterError: It has not ended in time.
            LostError: The server no longer answers.
        """
        deadline = time.monotonic() + STOP_SECONDS + LOST_SECONDS
        while not (state := self._patient_state(job_id)).is_over:
            if time.monotonic() > deadline:
                raise ClusterError(f"job {job_id} was told to stop and is still {state.status}: look at its log")
            time.sleep(QUIET_SECONDS / 4)
        return state

    def _patient_state(self, job_id: str) -> JobState:
        """Return a job's state, and wait for a server that is away for a moment."""
        deadline = time.monotonic() + LOST_SECONDS
        while True:
            try:
                return self.state(job_id)
            except LostError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(QUIET_SECONDS)

    @contextmanager
    def _as_cluster_errors(self, job_id: str | None = None, working_dir: Path | None = None) -> Iterator[None]:
        """Turn the many errors of Ray's client into cluster errors of one line."""
        try:
            yield
        except (requests.ConnectionError, requests.Timeout, ConnectionError) as error:
            raise LostError(
                f"no Ray job server answers at {self.address}: {self._remedy}, and make sure that the head "
                f"has its dashboard"
            ) from error
        except RayError as error:
            reason = _error_line(error).partition(". ")[0]
            raise ClusterError(
                f"the job server at {self.address} does not let us in ({reason}): {AS_THE_CLUSTER}"
            ) from error
        except (requests.RequestException, KeyError) as error:
            raise self._no_job_server() from error
        except (RuntimeError, ValueError, OSError) as error:
            raise self._refusal(_error_line(error), job_id, working_dir) from error

    def _refusal(self, reason: str, job_id: str | None, working_dir: Path | None) -> ClusterError:
        if "Version check returned 404" in reason:
            return self._no_job_server()
        if "obtain the API server address" in reason:
            return ClusterError(f"the Ray at {self.address} has no job server: start its head with its dashboard")
        if job_id is not None and "status code 404" in reason:
            return ClusterError(f"there is no job {job_id} at {self.address}: see `slimllm jobs list`")
        if working_dir is not None and ("status code 413" in reason or "exceeds the maximum size" in reason):
            return ClusterError(
                f"the working directory {working_dir} is too large for the job server ({reason}): keep out what the "
                f"job does not need with a .rayignore file, and give models and data as paths of the cluster"
            )
        return ClusterError(f"the job server at {self.address} refused: {reason}")

    def _no_job_server(self) -> ClusterError:
        return ClusterError(
            f"the server at {self.address} is not a Ray job server: {self._remedy}; that of a head is usually at "
            f"http://HEAD:8265"
        )


def _state(job: JobDetails) -> JobState:
    return JobState(
        job_id=job.submission_id or "",
        status=str(job.status),
        command=job.entrypoint.removeprefix("exec "),
        began=job.start_time / 1000 if job.start_time else None,
        ended=job.end_time / 1000 if job.end_time else None,
        exit_code=job.driver_exit_code,
        message=job.message or "",
        metadata=dict(job.metadata or {}),
    )


def _error_line(error: Exception) -> str:
    """Return the most telling line of an error: the last line of a traceback, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = lines[-1] if any(line.endswith("Traceback (most recent call last):") for line in lines) else lines[0]
    return told.rstrip(".")
