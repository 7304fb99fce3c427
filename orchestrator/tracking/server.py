"""Connects a run to MLflow; after the first failure the connection is not used again."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from orchestrator.secrets import masked, masked_all
from orchestrator.tracking.mlflow_private import context_tags
from orchestrator.tracking.options import TrackingError, TrackingOptions
from orchestrator.tracking.reach import ENVIRONMENT, describe_failure, error_line, prepare_store, server_name, uri_error
from orchestrator.tracking.signals import defer_signals
from orchestrator.tracking.stored_run import PARENT_TAG, StoredRun

T = TypeVar("T")
Warn = Callable[[str], None]

# The tag by which a later process finds a run again.
KEY_TAG = "slimllm.key"
THIS_MACHINE = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


class Server:
    """The connection that a run and its children share. After the first failure it is not used again.

    Attributes:
        alive: Whether calls reach a server; False from the start for a run that writes only its journal.
    """

    def __init__(self, options: TrackingOptions, warn: Warn) -> None:
        self.uri, self._experiment, self._warn = options.resolved_uri, options.experiment, warn
        self.alive = not options.journal_only
        self.client: Any = None
        self.experiment_id = ""

    def ask(self, call: Callable[[], T]) -> T | None:
        """Return a call's result; None without a server (one warning when it is lost), or if it refuses (one each)."""
        if not self.alive:
            return None
        try:
            return call()
        except TrackingError:
            raise
        except Exception as error:
            # Failing to log is no reason to end a run of hours.
            if _is_refusal(error):
                self._warn(f"{server_name(self.uri)} refused to log: {error_line(error)}")
            else:
                self.alive = False
                self._report_loss(f"{server_name(self.uri)} {describe_failure(error)}")
        return None

    def _report_loss(self, why: str) -> None:
        self._warn(f"{why}; the run goes on without it, and can be logged once it has ended")

    def connect(self) -> None:
        """Open the store and find or create the experiment."""
        location = prepare_store(self.uri)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        if "MLFLOW_LOGGING_LEVEL" not in os.environ:
            # urllib3 says "Retrying", but our own warning follows.
            for logger in ("mlflow", "alembic", "urllib3.connectionpool"):
                logging.getLogger(logger).setLevel(logging.ERROR)
        try:
            self.client = MlflowClient(tracking_uri=self.uri)
        except (MlflowException, ImportError) as error:
            # The error's own text has the whole address, with its password.
            raise uri_error(self.uri, error_line(error).partition(". ")[0]) from None
        self.experiment_id = self._find_experiment(location)

    def _find_experiment(self, location: Path | None) -> str:
        name = self._experiment
        if found := self.client.get_experiment_by_name(name):
            self._require_usable(found)
            return str(found.experiment_id)
        artifacts = (location / "mlruns" / quote(name, safe="")).as_uri() if location else None
        try:
            return self.client.create_experiment(name, artifact_location=artifacts)
        except Exception:
            # Another run may have created it in the meantime.
            if found := self.client.get_experiment_by_name(name):
                return found.experiment_id
            raise

    def _require_usable(self, experiment: Any) -> None:
        """Refuse a deleted experiment, and warn of one whose files this machine may not reach.

        Raises:
            TrackingError: It was deleted; its name stays taken.
        """
        shown = f"the experiment {experiment.name!r} of {server_name(self.uri)}"
        if experiment.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            raise TrackingError(
                f"{shown} was deleted: run `{restore}` with MLFLOW_TRACKING_URI set to that address, or pass another "
                f"--experiment"
            )
        server, place = urlsplit(self.uri), urlsplit(experiment.artifact_location)
        is_remote = server.scheme in ("http", "https") and server.hostname not in THIS_MACHINE
        if is_remote and place.scheme in ("", "file"):
            self._warn(
                f"{shown} keeps files in {masked(experiment.artifact_location)}, a folder that this machine may not "
                f"share with the server: pass another --experiment, whose files the server takes"
            )

    def find_run(self, key: str) -> StoredRun | None:
        """Return the experiment's run with a journal's key; None if it was never created, or was deleted."""
        found = self.client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return self._stored_run(found[0], found_again=True) if found else None

    def create_run(self, key: str, begun: float, run_name: str | None, parent_id: str | None) -> StoredRun:
        """Create a run whose start time is that of its first event."""
        # Some tags quote the command line, or a git remote with its password.
        tags = masked_all(context_tags({})) | {KEY_TAG: key}
        if parent_id:
            tags[PARENT_TAG] = parent_id
        with defer_signals():
            run = self.client.create_run(self.experiment_id, start_time=int(begun * 1000), tags=tags, run_name=run_name)
        return self._stored_run(run, found_again=False)

    def _stored_run(self, run: Any, found_again: bool) -> StoredRun:
        return StoredRun(self.client, self.uri, self.experiment_id, run, found_again)


class RequiredServer(Server):
    """A connection that must work: its loss raises an error."""

    def _report_loss(self, why: str) -> None:
        # Not chained: the original error's text has the address, with its password.
        raise TrackingError(f"{why}; start it, or pass another --tracking-uri") from None


def _is_refusal(error: Exception) -> bool:
    """Return whether the server works and only this call is wrong, such as a changed parameter."""
    status = getattr(error, "get_http_status_code", None)
    return status is not None and status() == 400
