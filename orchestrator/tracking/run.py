"""A run: in its journal first, and in MLflow as long as there is a server."""

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.tracking.journal import Journal, plain
from orchestrator.tracking.options import TrackingError, TrackingOptions
from orchestrator.tracking.store import Server, StoredRun, Warn, failure, shown


class Run:
    """A run in the journal and, as long as there is a server, in MLflow: see `tracked_run` and `child`."""

    def __init__(self, server: Server, journal: Journal, options: TrackingOptions, parent: "Run | None") -> None:
        self._server, self._journal, self._options, self._parent = server, journal, options, parent
        self._stored: StoredRun | None = None

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
        model_id = self._server.ask(lambda: stored.upload_model(directory, name, plain(params)))
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
    server = Server(options, warn or (lambda line: print(f"warning: {line}", file=sys.stderr)))
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
    server = Server(options, print)
    try:
        server.connect()
        return _replay(events, server)
    except TrackingError:
        raise
    except Exception as error:
        raise ConnectionError(f"{shown(server.uri)} {failure(error)}; the run is not logged") from error


def _replay(events: list[dict[str, Any]], server: Server) -> str:
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


def _require_directory(directory: Path) -> None:
    # MLflow would take a missing directory for an empty one, and the checkpoint for logged.
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory: nothing to log")
