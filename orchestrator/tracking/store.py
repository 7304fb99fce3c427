"""MLflow, as a run tells it: one connection, which is not used again when it has failed once."""

import json
import logging
import os
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from orchestrator.tracking.options import TrackingError, TrackingOptions

T = TypeVar("T")
Warn = Callable[[str], None]

SAMPLING_SECONDS = 2.0
# A call is tried twice, so a server that swallows packets costs 8 s, once. MLflow's own limits: 16 minutes.
QUICK_SECONDS = "4"
# A server that forwards a large file to its object store answers only when the whole file is there.
UPLOAD_SECONDS = "120"
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": QUICK_SECONDS,
    # "503, retry after 120 s" would be waited for.
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
MAX_DIGEST = 36


class Server:
    """The connection that a run and its children share. When it has failed once it is not used again."""

    def __init__(self, options: TrackingOptions, warn: Warn) -> None:
        self.uri, self._experiment, self._warn = options.resolved_uri, options.experiment, warn
        self._alive = True
        self.client: Any = None
        self.experiment_id = ""

    def ask(self, call: Callable[[], T]) -> T | None:
        """The call's result; None without a server (one warning) or if it refuses the call (one each)."""
        if not self._alive:
            return None
        try:
            return call()
        except TrackingError:
            raise
        except Exception as error:
            # What fails here is the record of a run of hours, never a reason to end it.
            if _is_refusal(error):
                self._warn(f"{shown(self.uri)} refused to log: {_one_line(error)}")
            else:
                self._alive = False
                self._warn(
                    f"{shown(self.uri)} {failure(error)}; the run goes on without it, and its journal can be "
                    "logged later"
                )
        return None

    def connect(self) -> None:
        """Open the store and find or create the experiment."""
        location = _check_uri(self.uri)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        if "MLFLOW_LOGGING_LEVEL" not in os.environ:
            # The last says "Retrying" where our one warning follows.
            for logger in ("mlflow", "alembic", "urllib3.connectionpool"):
                logging.getLogger(logger).setLevel(logging.ERROR)
        try:
            self.client = MlflowClient(tracking_uri=self.uri)
        except (MlflowException, ImportError) as error:
            raise _unusable(self.uri, _one_line(error).partition(". ")[0]) from error
        self.experiment_id = self._find_experiment(location)

    def _find_experiment(self, location: Path | None) -> str:
        name = self._experiment
        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        artifacts = (location / "mlruns" / quote(name, safe="")).as_uri() if location else None
        try:
            return self.client.create_experiment(name, artifact_location=artifacts)
        except Exception:
            # Another run may have created it meanwhile.
            if found := self.client.get_experiment_by_name(name):
                return found.experiment_id
            raise

    def create_run(self, start: dict[str, Any], parent_id: str | None) -> "StoredRun":
        """A run that starts when its first event was written."""
        from mlflow.tracking.context.registry import resolve_tags

        tags = resolve_tags({"mlflow.parentRunId": parent_id} if parent_id else {})
        run = self.client.create_run(
            self.experiment_id, start_time=_stamp(start), tags=tags, run_name=start.get("run_name")
        )
        return StoredRun(self, run.info.run_id)


class StoredRun:
    """A run in MLflow, addressed by its id. Every method raises what MLflow raises."""

    def __init__(self, server: Server, run_id: str) -> None:
        self._server, self._client, self.run_id = server, server.client, run_id
        self._totals: list[Any] = []
        self._model_id: str | None = None

    def tell(self, event: dict[str, Any]) -> None:
        """Log one line of a journal."""
        from mlflow.entities import Param

        match event["event"]:
            case "params":
                params = [Param(key, str(value)) for key, value in event["params"].items()]
                self._client.log_batch(self.run_id, params=params)
            case "metrics":
                self._tell_metrics(event)
            case "dataset":
                self._tell_dataset(event)
            case "end":
                self._client.set_terminated(self.run_id, event["status"], end_time=_stamp(event))

    def _tell_metrics(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        step, total = event["step"] or 0, event["step"] is None
        # Infinity and NaN stay in the journal, as "inf" and null: MLflow stores them as 1.8e308 and 0, which
        # no chart survives and nobody could tell from a measurement.
        finite = {key: value for key, value in event["metrics"].items() if isinstance(value, int | float)}
        model_id = self._model_id if total else None
        metrics = [Metric(k, v, _stamp(event), step, model_id=model_id) for k, v in finite.items()]
        self._client.log_batch(self.run_id, metrics=metrics)
        if total:
            self._totals += metrics

    def _tell_dataset(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        blocks, length = event["n_blocks"], event["block_length"]
        dataset = Dataset(
            name=event["name"],
            # MLflow takes 36 characters; the whole digest is beside the source.
            digest=event["digest"][:MAX_DIGEST],
            source_type="slimllm",
            source=json.dumps({"source": event["source"], "digest": event["digest"]}),
            profile=json.dumps({"num_rows": blocks, "num_elements": blocks * length, "block_length": length}),
        )
        context = InputTag("mlflow.data.context", event["context"])
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, [context])])

    def upload(self, directory: Path, artifact_path: str | None) -> None:
        """Copy a directory's files to the run."""
        with self._patience():
            self._client.log_artifacts(self.run_id, str(directory), artifact_path)

    def upload_model(self, directory: Path, name: str, params: dict[str, Any]) -> str:
        """Copy a directory's files to a new logged model, byte for byte, without loading the model."""
        from mlflow.entities import LoggedModelOutput, Metric

        model = self._client.create_logged_model(
            self._server.experiment_id,
            # Names of models have dots (Llama-3.1-8B), which MLflow keeps for itself.
            name=re.sub(r"[/:.%\"']", "-", name),
            source_run_id=self.run_id,
            params={key: str(value) for key, value in params.items()},
            model_type="causal-lm",
        )
        try:
            with self._patience():
                self._client.log_model_artifacts(model.model_id, str(directory))
        except BaseException:
            with suppress(Exception):
                self._client.finalize_logged_model(model.model_id, "FAILED")
            raise
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        # The same key, time, step and value again: the store links them and adds no second point to the run.
        self._model_id = model.model_id
        linked = [Metric(m.key, m.value, m.timestamp, m.step, model_id=self._model_id) for m in self._totals]
        self._client.log_batch(self.run_id, metrics=linked)
        return model.model_id

    def register(self, model_id: str, name: str) -> str:
        """A new version of a registered model, which is made where it is missing."""
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):
            self._client.create_registered_model(name)
        source = f"models:/{model_id}"
        if not urlsplit(self._server.uri).scheme.startswith(("http", "databricks")):
            # A database store resolves models:/ID by the process's global tracking URI, which is not ours.
            source = self._client.get_logged_model(model_id).artifact_location
        version = self._client.create_model_version(name, source, self.run_id, await_creation_for=0, model_id=model_id)
        return str(version.version)

    def sample_system(self, stop: threading.Event) -> None:
        """Log processor, memory, disk, network and GPU every two seconds, until told to stop or it fails."""
        from mlflow.entities import Metric
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):
            monitors.append(GPUMonitor())
        step = 0
        while not stop.wait(SAMPLING_SECONDS):
            values: dict[str, float] = {}
            with suppress(Exception):
                for monitor in monitors:
                    monitor.collect_metrics()
                    values.update(monitor.aggregate_metrics())
                    monitor.clear_metrics()
            now = int(time.time() * 1000)
            try:
                metrics = [Metric(f"system/{key}", value, now, step) for key, value in values.items()]
                self._client.log_batch(self.run_id, metrics=metrics)
            except Exception:
                # The run's next own call finds out and says so.
                return
            step += 1

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """Give an upload, to a server that answers, more time than other calls, unless the user set one."""
        self._client.get_run(self.run_id)
        if os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] != QUICK_SECONDS:
            yield
            return
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = UPLOAD_SECONDS
        try:
            yield
        finally:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = QUICK_SECONDS


def _check_uri(uri: str) -> Path | None:
    """Refuse what cannot work, and soon, where MLflow tries for minutes; the folder of an SQLite file.

    Artifacts are put into that folder: MLflow's own default is the working directory, wherever the file is.
    """
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _unusable(uri, str(error)) from error
    dialect = parts.scheme.partition("+")[0]
    if dialect in ("http", "https") and not host:
        raise _unusable(uri, "it names no host")
    if dialect in DATABASE_PORTS and host:
        socket.create_connection((host, port or DATABASE_PORTS[dialect]), timeout=float(QUICK_SECONDS)).close()
    if dialect != "sqlite" or ":///" not in uri or ":memory:" in uri:
        return None
    path = Path(uri.partition(":///")[2].partition("?")[0]).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version")
    except (OSError, sqlite3.Error) as error:
        raise _unusable(uri, str(error)) from error
    return path.parent


def _unusable(uri: str, why: str) -> TrackingError:
    return TrackingError(f"{shown(uri)} cannot be used ({why}): give sqlite:///PATH.db or http://HOST:PORT")


def _is_refusal(error: Exception) -> bool:
    """Whether the server is well and only this call is wrong, such as a parameter changed."""
    status = getattr(error, "get_http_status_code", None)
    return status is not None and status() == 400


def shown(uri: str) -> str:
    """Return how a server is named in messages, without its password."""
    return f"MLflow at {_without_password(uri)}"


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return _without_password(text.splitlines()[0])[:200]


def failure(error: BaseException) -> str:
    """Return in a few words how a server failed."""
    # The first cause: what MLflow raises wraps the address and three layers of retries around it.
    while deeper := error.__cause__ or error.__context__:
        error = deeper
    silent = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
    return f"{'does not answer' if silent else 'failed'} ({_one_line(error)})"


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _stamp(event: dict[str, Any]) -> int:
    return int(event["time"] * 1000)
