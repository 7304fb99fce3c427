"""A run in MLflow, with a journal beside it that is written first and is enough to log the run later.

    with tracked_run(TrackingOptions(), output / "pruning" / "metrics.jsonl") as run:
        run.log_params({"sparsity": 0.2})
        run.log_metrics({"heads_kept": 24}, step=layer)
        run.log_checkpoint(output, "pruned", params={"sparsity": 0.2})

Whatever is logged is one event, a line of JSON in the journal. A line is told to MLflow by `_StoredRun.tell`,
when it is logged and when it is replayed alike, so that both give the same run. A server that does not answer
costs one warning: the run goes on, and `replay` logs it from the journal once the server is back.

MLflow is imported at the first call (2 s). Every call names its run: there is no active run, no global URI.
"""

import json
import logging
import math
import os
import re
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

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


class TrackingError(ValueError):
    """An option that cannot be used, whatever the server does; one line that says what to give instead."""


@dataclass(frozen=True, kw_only=True)
class TrackingOptions:
    """Where a run is logged.

    Attributes:
        experiment: MLflow experiment, created where it is missing.
        tracking_uri: By default $MLFLOW_TRACKING_URI, or else `mlflow.db` in the working directory.
        run_name: By default MLflow invents one.
        register: Name under which the checkpoint becomes a model version; None registers nothing.
    """

    experiment: str = "slimllm"
    tracking_uri: str | None = None
    run_name: str | None = None
    register: str | None = None

    def __post_init__(self) -> None:
        if not self.experiment.strip():
            raise TrackingError("the experiment's name is empty: give a name")
        # MLflow would say so too, but only after the checkpoint is uploaded.
        if self.register is not None and (not self.register.strip() or set(self.register) & set("/:")):
            raise TrackingError(f"the registered model's name is {self.register!r}: give one without '/' and ':'")

    @property
    def resolved_uri(self) -> str:
        """The tracking URI with the default filled in."""
        default = f"sqlite:///{Path.cwd() / 'mlflow.db'}"
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default


class Journal:
    """A file of events, one JSON object a line. Set `path` when the file has moved."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def append(self, event: dict[str, object]) -> dict[str, Any]:
        """Write an event and return it as a reader of the file will see it."""
        line = json.dumps(_plain({"time": time.time(), **event}), allow_nan=False)
        # Opened for each line: nothing stays in a buffer, and the folder may be renamed between two lines.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return json.loads(line)

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """The events of a journal; a last line cut short by a crash is left out."""
        lines = path.read_text(encoding="utf-8").splitlines()
        events = []
        for number, line in enumerate(lines, start=1):
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise TrackingError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not events:
            raise TrackingError(f"{path}: no events to log")
        return events


class Run:
    """A run in the journal and, as long as there is a server, in MLflow: see `tracked_run` and `child`."""

    def __init__(self, server: "_Server", journal: Journal, options: TrackingOptions, parent: "Run | None") -> None:
        self._server, self._journal, self._options, self._parent = server, journal, options, parent
        self._stored: _StoredRun | None = None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None when there is no server."""
        return self._stored.run_id if self._stored else None

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment; None when there is no server."""
        return self._server.experiment_id if self._stored else None

    @property
    def tracking_uri(self) -> str | None:
        """Where the run is logged; None when there is no server."""
        return self._server.uri if self._stored else None

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log what the run was asked to do."""
        self._log({"event": "params", "params": params})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log measurements: of one layer or round with a step, of the whole run without."""
        values = {key: float(value) for key, value in metrics.items()}
        self._log({"event": "metrics", "step": step, "metrics": values})

    def log_dataset(
        self,
        name: str,
        digest: str,
        context: str,
        source: str,
        n_blocks: int,
        block_length: int,
    ) -> None:
        """Log which data the run read, as an input of the run; the context is "calibration" or "evaluation"."""
        fields = {"name": name, "digest": digest, "context": context, "source": source}
        self._log({"event": "dataset", **fields, "n_blocks": n_blocks, "block_length": block_length})

    def log_artifacts(self, directory: Path, artifact_path: str | None = None) -> None:
        """Upload the files of a directory, which stay where they are."""
        _require_directory(directory)
        if stored := self._stored:
            self._server.ask(lambda: stored.upload(directory, artifact_path))

    def log_checkpoint(self, directory: Path, name: str, params: Mapping[str, object]) -> str | None:
        """Upload a checkpoint as a logged model, linked with the run's metrics that have no step.

        Returns:
            models:/NAME/VERSION if it was registered, models:/ID if not, None when there is no server.
        """
        _require_directory(directory)
        if not (stored := self._stored):
            return None
        model_id = self._server.ask(lambda: stored.upload_model(directory, name, _plain(params)))
        if model_id is None or not (register := self._options.register):
            return model_id and f"models:/{model_id}"
        version = self._server.ask(lambda: stored.register(model_id, register))
        return f"models:/{register}/{version}" if version else f"models:/{model_id}"

    def move_journal(self, path: Path) -> None:
        """Go on in the same journal at its new place."""
        self._journal.path = path

    @contextmanager
    def child(self, run_name: str, journal: Path | None = None) -> Iterator["Run"]:
        """A run nested in this one: in its journal, or in one of its own, which replays as its own run."""
        options = TrackingOptions(
            experiment=self._options.experiment, run_name=run_name, register=self._options.register
        )
        run = Run(self._server, Journal(journal) if journal else self._journal, options, parent=self)
        with run._recorded():
            yield run

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        try:
            self._start()
            yield
        except BaseException as error:
            # SystemExit is how a SIGTERM handler stops a run.
            killed = isinstance(error, (KeyboardInterrupt, SystemExit))
            self._end("KILLED" if killed else "FAILED", f"{type(error).__name__}: {error}")
            raise
        self._end("FINISHED")

    def _start(self) -> None:
        event = self._append({"event": "start", "run_name": self._options.run_name})
        parent = self._parent.run_id if self._parent else None
        self._stored = self._server.ask(lambda: self._server.create_run(event, parent))

    def _end(self, status: str, error: str | None = None) -> None:
        event: dict[str, object] = {"event": "end", "status": status, "error": error}
        try:
            written = self._append(event)
        except OSError:
            # A disk that is full or a folder that is gone ends many a run; MLflow shall know that it ended.
            written = {**event, "time": time.time()}
        self._tell(written)

    def _log(self, event: dict[str, object]) -> None:
        self._tell(self._append(event))

    def _tell(self, written: dict[str, Any]) -> None:
        if stored := self._stored:
            self._server.ask(lambda: stored.tell(written))

    def _append(self, event: dict[str, object]) -> dict[str, Any]:
        shared = self._parent is not None and self._journal is self._parent._journal
        return self._journal.append({**event, "child": self._options.run_name} if shared else event)


@contextmanager
def tracked_run(options: TrackingOptions, journal: Path, warn: Warn | None = None) -> Iterator[Run]:
    """Log what happens inside as a run that is FINISHED, FAILED on an exception or KILLED on Ctrl-C.

    Args:
        options: Where to log.
        journal: The `metrics.jsonl` to append to; its folder is made where it is missing.
        warn: Called with one line when the server does not answer or refuses; prints to stderr by default.

    Raises:
        TrackingError: The options cannot be used, whatever the server does.
    """
    server = _Server(options, warn or (lambda line: print(f"warning: {line}", file=sys.stderr)))
    server.ask(server.connect)
    run = Run(server, Journal(journal), options, parent=None)
    with run._recorded(), _system_metrics(run):
        yield run


def replay(journal: Path, options: TrackingOptions) -> str:
    """Log a run from its journal, with the times, the status and the children it had.

    A journal in which a resumed run went on gives one run; of a parameter given twice the last value counts.
    Artifacts are not in the journal.

    Returns:
        The id of the new run.

    Raises:
        TrackingError: The options or the journal cannot be used.
        ConnectionError: The server does not answer, or refuses the run.
    """
    events = Journal.read(journal)
    if options.run_name:
        events[0]["run_name"] = options.run_name
    server = _Server(options, print)
    try:
        server.connect()
        return _replay(events, server)
    except TrackingError:
        raise
    except Exception as error:
        raise ConnectionError(f"{_shown(server.uri)} {_failure(error)}; the run is not logged") from error


def _replay(events: list[dict[str, Any]], server: "_Server") -> str:
    run_ids: dict[str | None, str] = {}
    # The run itself (None) has the first event, so it is there when its children need it.
    for child in dict.fromkeys(event.get("child") for event in events):
        own = [event for event in events if event.get("child") == child]
        stored = server.create_run(own[0], run_ids.get(None))
        run_ids[child] = stored.run_id
        try:
            for event in _as_one_attempt(own):
                stored.tell(event)
        except BaseException:
            with suppress(Exception):
                server.client.set_terminated(stored.run_id, "FAILED")
            raise
    return run_ids[None]


def _as_one_attempt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """MLflow takes a parameter once and an end once; attempts that were resumed wrote several."""
    params: dict[str, Any] = {}
    for event in events:
        params.update(event.get("params", {}))
    between = [event for event in events if event["event"] not in ("params", "end")]
    last = events[-1]
    # Without an end the process was killed with no time to say so.
    end = last if last["event"] == "end" else {"event": "end", "status": "KILLED", "time": last["time"]}
    return [{"event": "params", "params": params, "time": events[0]["time"]}, *between, end]


class _Server:
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
                self._warn(f"{_shown(self.uri)} refused to log: {_one_line(error)}")
            else:
                self._alive = False
                self._warn(
                    f"{_shown(self.uri)} {_failure(error)}; the run goes on without it, and its journal can be "
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

    def create_run(self, start: dict[str, Any], parent_id: str | None) -> "_StoredRun":
        """A run that starts when its first event was written."""
        from mlflow.tracking.context.registry import resolve_tags

        tags = resolve_tags({"mlflow.parentRunId": parent_id} if parent_id else {})
        run = self.client.create_run(
            self.experiment_id, start_time=_stamp(start), tags=tags, run_name=start.get("run_name")
        )
        return _StoredRun(self, run.info.run_id)


class _StoredRun:
    """A run in MLflow, addressed by its id. Every method raises what MLflow raises."""

    def __init__(self, server: _Server, run_id: str) -> None:
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


@contextmanager
def _system_metrics(run: Run) -> Iterator[None]:
    # MLflow's own monitor waits for the server when told to finish, and used to need a global URI.
    if not (stored := run._stored):
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=stored.sample_system, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=1)


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


def _require_directory(directory: Path) -> None:
    # MLflow would take a missing directory for an empty one, and the checkpoint for logged.
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory: nothing to log")


def _unusable(uri: str, why: str) -> TrackingError:
    return TrackingError(f"{_shown(uri)} cannot be used ({why}): give sqlite:///PATH.db or http://HOST:PORT")


def _is_refusal(error: Exception) -> bool:
    """Whether the server is well and only this call is wrong, such as a parameter changed."""
    status = getattr(error, "get_http_status_code", None)
    return status is not None and status() == 400


def _shown(uri: str) -> str:
    return f"MLflow at {_without_password(uri)}"


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return _without_password(text.splitlines()[0])[:200]


def _failure(error: BaseException) -> str:
    # The first cause: what MLflow raises wraps the address and three layers of retries around it.
    while deeper := error.__cause__ or error.__context__:
        error = deeper
    silent = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
    return f"{'does not answer' if silent else 'failed'} ({_one_line(error)})"


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _stamp(event: dict[str, Any]) -> int:
    return int(event["time"] * 1000)


def _plain(value: object) -> Any:
    """What JSON can hold: NaN becomes null, infinity "inf" or "-inf", what it does not know its text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None if math.isnan(value) else str(float(value))
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _ if hasattr(value, "tolist"):
            return _plain(value.tolist())
        case _:
            return str(value)
