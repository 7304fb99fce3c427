"""MLflow, as a run tells it: one connection, which is not used again when it has failed once."""

import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from orchestrator.secrets import masked, masked_all
from orchestrator.tracking.options import TrackingError, TrackingOptions, database_file
from orchestrator.tracking.registry import Registry
from orchestrator.tracking.signals import uninterrupted

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
# By this tag a run is found again, whatever became of the process that created it.
KEY_TAG = "slimllm.key"
PARENT_TAG = "mlflow.parentRunId"
# What the page of a run shows as its description.
NOTE_TAG = "mlflow.note.content"


class Server:
    """The connection that a run and its children share. When it has failed once it is not used again.

    Attributes:
        alive: Whether calls reach a server. False from the start for a run that only its journal records.
    """

    def __init__(self, options: TrackingOptions, warn: Warn) -> None:
        self.uri, self._experiment, self._warn = options.resolved_uri, options.experiment, warn
        self.alive = not options.journal_only
        self.client: Any = None
        self.experiment_id = ""

    def ask(self, call: Callable[[], T]) -> T | None:
        """The call's result; None without a server (one warning if it is lost) or if it refuses the call (one each)."""
        if not self.alive:
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
                self.alive = False
                self._lose(f"{shown(self.uri)} {failure(error)}")
        return None

    def _lose(self, why: str) -> None:
        self._warn(f"{why}; the run goes on without it, and can be logged once it has ended")

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
            # Its own text has the whole address.
            raise _unusable(self.uri, _one_line(error).partition(". ")[0]) from None
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

    def find_run(self, key: str) -> "StoredRun | None":
        """The experiment's run of a journal with this key; None if it was never created, or was deleted."""
        found = self.client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return StoredRun(self, found[0], found_again=True) if found else None

    def create_run(self, key: str, begun: float, run_name: str | None, parent_id: str | None) -> "StoredRun":
        """A run that starts when its first event was written."""
        from mlflow.tracking.context.registry import resolve_tags

        # Some of them are of the command line, or of a git remote with its password.
        tags = masked_all(resolve_tags({KEY_TAG: key}))
        if parent_id:
            tags[PARENT_TAG] = parent_id
        with uninterrupted():
            run = self.client.create_run(self.experiment_id, start_time=int(begun * 1000), tags=tags, run_name=run_name)
        return StoredRun(self, run, found_again=False)


class RequiredServer(Server):
    """A connection without which there is nothing to do."""

    def _lose(self, why: str) -> None:
        # What failed has the address in its text, with the password in it: it is not chained.
        raise TrackingError(f"{why}; start it, or pass another --tracking-uri") from None


class StoredRun:
    """A run in MLflow, addressed by its id. Every method raises what MLflow raises.

    A run that was found again may have anything already; nothing is added to it twice.
    """

    def __init__(self, server: Server, run: Any, found_again: bool) -> None:
        self._server, self._client, self._found_again = server, server.client, found_again
        self.run_id, self.status, self._begun = run.info.run_id, run.info.status, run.info.start_time
        self.params: dict[str, str] = dict(run.data.params)
        self.registry = Registry(self._client, server.uri, self.run_id, found_again)
        self._totals: list[Any] = []
        self._model_id: str | None = None

    def go_on(self, run_name: str | None, parent_id: str | None) -> None:
        """Set the run RUNNING again, in a parent that may be a new one."""
        self._client.update_run(self.run_id, status="RUNNING", name=run_name)
        if parent_id:
            self._client.set_tag(self.run_id, PARENT_TAG, parent_id)

    def tell(self, event: dict[str, Any]) -> None:
        """Log one line of a journal."""
        with uninterrupted():
            match event["event"]:
                case "params":
                    self._tell_params({key: str(value) for key, value in event["params"].items()})
                case "metrics":
                    self._tell_metrics(event)
                case "dataset":
                    self._tell_dataset(event)
                case "note":
                    self._client.set_tag(self.run_id, NOTE_TAG, event["text"])
                case "tags":
                    for key, value in event["tags"].items():
                        self._client.set_tag(self.run_id, key, value)
                case "end":
                    self._client.set_terminated(self.run_id, event["status"], end_time=_stamp(event))

    def _tell_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        changed = [key for key, value in params.items() if self.params.get(key, value) != value]
        # MLflow would refuse all of them for one that it has with another value.
        fitting = {key: value for key, value in params.items() if key not in changed}
        self._client.log_batch(self.run_id, params=[Param(key, value) for key, value in fitting.items()])
        self.params |= fitting
        if changed:
            values = ", ".join(f"{key} stays {self.params[key]}, now {params[key]}" for key in changed)
            raise MlflowException.invalid_parameter_value(f"a parameter is never changed: {values}")

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

    def upload(self, paths: Sequence[Path], folder: str | None) -> bool:
        """Copy files, and directories' files, to the run."""
        with self._patience():
            for path in paths:
                copy = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                copy(self.run_id, str(path), folder)
        return True

    def upload_model(self, directory: Path, name: str, params: dict[str, Any]) -> str:
        """Copy a directory's files to a logged model, byte for byte, without loading the model."""
        from mlflow.entities import LoggedModelOutput, Metric

        if (model := self.find_model(name)) is None:
            model = self._client.create_logged_model(
                self._server.experiment_id,
                name=_model_name(name),
                source_run_id=self.run_id,
                params={key: str(value) for key, value in params.items()},
                model_type="causal-lm",
            )
        if model.status != "READY":
            self._fill_model(model.model_id, directory)
        if model.model_id not in self._linked_models():
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        # The same key, time, step and value again: the store links them and adds no second point to the run.
        self._model_id = model.model_id
        linked = [Metric(m.key, m.value, m.timestamp, m.step, model_id=self._model_id) for m in self._totals]
        self._client.log_batch(self.run_id, metrics=linked)
        return model.model_id

    def _fill_model(self, model_id: str, directory: Path) -> None:
        try:
            with self._patience(), _without_hidden(directory) as links:
                self._client.log_model_artifacts(model_id, str(links))
        except BaseException:
            with suppress(Exception):
                self._client.finalize_logged_model(model_id, "FAILED")
            raise
        self._client.finalize_logged_model(model_id, "READY")

    def find_model(self, name: str) -> Any | None:
        """The logged model of this name that an earlier attempt made, whole or not."""
        if not self._found_again:
            return None
        named = f"source_run_id = '{self.run_id}' AND name = '{_model_name(name)}'"
        found = self._client.search_logged_models([self._server.experiment_id], named)
        return found[0] if found else None

    def _linked_models(self) -> set[str]:
        if not self._found_again:
            return set()
        outputs = self._client.get_run(self.run_id).outputs
        return {output.model_id for output in outputs.model_outputs} if outputs else set()

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
        while not stop.wait(SAMPLING_SECONDS):
            values: dict[str, float] = {}
            with suppress(Exception):
                for monitor in monitors:
                    monitor.collect_metrics()
                    values.update(monitor.aggregate_metrics())
                    monitor.clear_metrics()
            now = int(time.time() * 1000)
            # Counted from the run's beginning, so that an attempt that resumes it goes on, after a gap.
            step = int((now - self._begun) / (1000 * SAMPLING_SECONDS))
            try:
                metrics = [Metric(f"system/{key}", value, now, step) for key, value in values.items()]
                self._client.log_batch(self.run_id, metrics=metrics)
            except Exception:
                # The run's next own call finds out and says so.
                return

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
    except ValueError:
        # Its text has what it took for the port, which may be half of a password.
        raise _unusable(uri, "its host or its port cannot be read") from None
    dialect = parts.scheme.partition("+")[0]
    if dialect in ("http", "https") and not host:
        raise _unusable(uri, "it names no host")
    if dialect in DATABASE_PORTS and host:
        socket.create_connection((host, port or DATABASE_PORTS[dialect]), timeout=float(QUICK_SECONDS)).close()
    if (path := database_file(uri)) is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version")
    except (OSError, sqlite3.Error) as error:
        raise _unusable(uri, str(error)) from error
    return path.parent


def _unusable(uri: str, why: str) -> TrackingError:
    return TrackingError(f"{shown(uri)} cannot be used ({masked(why)}): give sqlite:///PATH.db or http://HOST:PORT")


def _is_refusal(error: Exception) -> bool:
    """Whether the server is well and only this call is wrong, such as a parameter changed."""
    status = getattr(error, "get_http_status_code", None)
    return status is not None and status() == 400


def shown(uri: str) -> str:
    """Return how a server is named in messages."""
    return f"MLflow at {masked(uri)}"


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return masked(text.splitlines()[0])[:200]


def failure(error: BaseException) -> str:
    """Return in a few words how a server failed."""
    # The first cause: what MLflow raises wraps the address and three layers of retries around it.
    while deeper := error.__cause__ or error.__context__:
        error = deeper
    silent = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
    return f"{'does not answer' if silent else 'failed'} ({_one_line(error)})"


@contextmanager
def _without_hidden(directory: Path) -> Iterator[Path]:
    """A folder of links to a directory's files but for the hidden: what a run goes on from may lie among them.

    MLflow uploads a folder or a file, and no file to a folder of a model.
    """
    with TemporaryDirectory() as folder:
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(directory.absolute(), folder, ignore=hidden, copy_function=os.symlink, dirs_exist_ok=True)
        yield Path(folder)


def _model_name(name: str) -> str:
    # Names of models have dots (Llama-3.1-8B), which MLflow keeps for itself.
    return re.sub(r"[/:.%\"']", "-", name)


def _stamp(event: dict[str, Any]) -> int:
    return int(event["time"] * 1000)
