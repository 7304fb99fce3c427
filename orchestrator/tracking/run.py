"""Logs a run: first to its journal, then to MLflow while its server answers."""

import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.secrets import masked
from orchestrator.tracking.journal import Journal
from orchestrator.tracking.options import JOURNAL_ONLY, StoredParent, TrackingError, TrackingOptions
from orchestrator.tracking.received import PRUNING
from orchestrator.tracking.server import Server, Warn
from orchestrator.tracking.stored_run import StoredRun


class Run:
    """A run in the journal and, while its server answers, in MLflow: see `tracked_run` and `child`.

    Attributes:
        logged_steps: The steps whose metrics were in the journal when this attempt at the run began.
    """

    def __init__(self, server: Server, journal: Journal, options: TrackingOptions, parent: "Run | None") -> None:
        self._server, self._journal, self._options, self._parent = server, journal, options, parent
        self._stored: StoredRun | None = None
        self._earlier = journal.events()
        self._uploaded = True
        metrics = [event for event in self._earlier if event["event"] == "metrics"]
        self.logged_steps = frozenset(event["step"] for event in metrics if event["step"] is not None)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None without a server."""
        return self._stored.run_id if self._stored else None

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment; None without a server."""
        return self._server.experiment_id if self._stored else None

    @property
    def tracking_uri(self) -> str | None:
        """Where the run is logged: "none" for its journal only, None without a server."""
        if self._options.journal_only:
            return JOURNAL_ONLY
        return self._server.uri if self._stored else None

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log the run's settings."""
        self._log({"event": "params", "params": params})

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Log tags of this attempt at the run; a later attempt may replace them."""
        self._log({"event": "tags", "tags": tags})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log measurements: with a step those of one layer or round, without one those of the whole run."""
        values = {key: float(value) for key, value in metrics.items()}
        self._log({"event": "metrics", "step": step, "metrics": values})

    def log_evaluated(self, maker: StoredParent, metrics: Mapping[str, float]) -> None:
        """Log measurements of a model to the run that made it, and to its versions, if they are in the same store."""
        values = {key: float(value) for key, value in metrics.items()}
        self._log({"event": "evaluated", "uri": maker.uri, "run_id": maker.run_id, "metrics": values})

    def log_note(self, text: str) -> None:
        """Log the description on the run's page, in Markdown."""
        self._log({"event": "note", "text": text})

    def log_dataset(
        self, name: str, digest: str, context: str, source: str, n_blocks: int, block_length: int, n_tokens: int
    ) -> None:
        """Log data that the run reads as one of its inputs; the context is "calibration" or "evaluation"."""
        fields = {"name": name, "digest": digest, "context": context, "source": source}
        sizes = {"n_blocks": n_blocks, "block_length": block_length, "n_tokens": n_tokens}
        self._log({"event": "dataset", **fields, **sizes})

    def log_artifacts(self, *paths: Path, to: str | None = None) -> None:
        """Upload files, and the files of directories, to a folder of the run's artifacts; the originals stay.

        The journal stores paths relative to itself, so the output can be moved and logged later.
        """
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist: nothing to log")
        self._log({"event": "artifacts", "paths": [self._from_journal(path) for path in paths], "to": to})

    def log_checkpoint(
        self,
        directory: Path,
        name: str,
        params: Mapping[str, object],
        *,
        measured: Mapping[str, float] | None = None,
        alias: str | None = None,
        description: str | None = None,
    ) -> str | None:
        """Upload a checkpoint as a logged model, linked with the run's metrics that have no step.

        Args:
            directory: The checkpoint.
            name: The logged model's name.
            params: The settings that made it: parameters of the logged model, and tags of its registered version.
            measured: More tags of the version.
            alias: The version's alias, until a newer version takes it; dots become dashes.
            description: One line that describes the version.

        Returns:
            models:/NAME/VERSION if it was registered, models:/ID if not, None without a server.
        """
        # MLflow would take a missing directory for an empty one, and consider the checkpoint logged.
        if not directory.is_dir():
            raise NotADirectoryError(f"{directory} is not a directory: nothing to log")
        place = self._from_journal(directory)
        version = {"measured": measured or {}, "alias": alias, "description": description}
        model = {"directory": place, "name": name, "params": params}
        return self._tell(self._journal.append({"event": "checkpoint", **model, **version}))

    @contextmanager
    def child(self, run_name: str, journal: Path | None = None) -> Iterator["Run"]:
        """Open a run nested in this one, in the same journal or in its own, which this run's journal then names."""
        if journal is not None:
            self._journal.append({"event": "child", "run_name": run_name, "journal": self._from_journal(journal)})
        own = Journal(journal) if journal else Journal(self._journal.path, child=run_name)
        with Run(self._server, own, self._child_options(run_name), parent=self)._open_and_close() as run:
            yield run

    def _child_options(self, run_name: str) -> TrackingOptions:
        return replace(self._options, run_name=run_name, parent=None)

    @contextmanager
    def _open_and_close(self) -> Iterator["Run"]:
        try:
            self._start()
            yield self
        except BaseException as error:
            # SystemExit is how a handler of SIGTERM or SIGHUP stops a run.
            killed = isinstance(error, (KeyboardInterrupt, SystemExit))
            self._end("KILLED" if killed else "FAILED", masked(f"{type(error).__name__}: {error}"))
            raise
        self._end("FINISHED")

    def _start(self) -> None:
        """Begin the run, or continue the one that an earlier attempt began and send MLflow its journal again."""
        options = self._options
        asked = {"run_name": options.run_name, "experiment": options.experiment, "register": options.register}
        # The first attempt chooses the key, by which later ones find the run in MLflow.
        key = next((event["key"] for event in self._earlier if "key" in event), uuid.uuid4().hex)
        start = self._journal.append({"event": "start", "key": key, "uri": self._server.uri, **asked})
        self._open(start["key"], (self._earlier or [start])[0]["time"])
        self._tell_again()

    def _open(self, key: str, begun: float) -> None:
        """Find the run in MLflow and reopen it, or create it."""
        server, name = self._server, self._options.run_name
        parent = self._parent.run_id if self._parent else self._options.parent_in(server.uri, server.experiment_id)
        if self._earlier and (found := server.ask(lambda: server.find_run(key))) is not None:
            self._stored = found
            server.ask(lambda: found.resume(name, parent))
        elif (created := server.ask(lambda: server.create_run(key, begun, name, parent))) is not None:
            self._stored = created
            place = {"uri": server.uri, "experiment_id": server.experiment_id, "run_id": created.run_id}
            self._journal.append({"event": "stored", **place})

    def _tell_again(self) -> None:
        """Send what was measured before this attempt; MLflow keeps each event once."""
        if self._stored is None or not self._earlier:
            return
        told = self._stored.params
        # If attempts had different settings, the last one counts, unless MLflow already has a value.
        given = {key: value for event in self._earlier for key, value in _params(event).items()}
        if missing := {key: value for key, value in given.items() if key not in told}:
            self._tell({"event": "params", "params": missing})
        for event in self._earlier:
            if event["event"] in ("metrics", "dataset", "note", "tags", "evaluated"):
                self._tell(event)

    def _end(self, status: str, error: str | None = None) -> None:
        event: dict[str, object] = {"event": "end", "status": status, "error": error}
        self._tell(self._append_if_possible(event))
        if status == "FINISHED":
            self._confirm()

    def _confirm(self) -> bool:
        """Return whether MLflow has everything; if so, note it in the journal."""
        if self._stored is None or not (self._server.alive and self._uploaded):
            return False
        self._append_if_possible({"event": "logged", "uri": self._server.uri, "run_id": self._stored.run_id})
        return True

    def _append_if_possible(self, event: dict[str, object]) -> dict[str, Any]:
        try:
            return self._journal.append(event)
        except OSError:
            # The disk may be full or the folder gone; MLflow should still learn that the run ended.
            return {**event, "time": time.time()}

    def _log(self, event: dict[str, object]) -> None:
        self._tell(self._journal.append(event))

    def _tell(self, event: dict[str, Any]) -> str | None:
        """Send MLflow an event of the journal, if there is a server; return the URI of a checkpoint's model."""
        if (stored := self._stored) is None:
            return None
        folder = self._journal.path.parent
        match event["event"]:
            case "artifacts":
                paths = [folder / path for path in event["paths"]]
                self._uploaded &= self._server.ask(lambda: stored.upload(paths, event["to"])) is not None
            case "checkpoint":
                return self._tell_checkpoint(stored, folder / event["directory"], event)
            case "evaluated" if event["uri"] != self._server.uri:
                pass
            case _:
                self._server.ask(lambda: stored.tell(event))
        return None

    def _tell_checkpoint(self, stored: StoredRun, directory: Path, event: dict[str, Any]) -> str | None:
        model_id = self._server.ask(lambda: stored.upload_model(directory, event["name"], event["params"]))
        self._uploaded &= model_id is not None
        if model_id is None or not (register := self._options.register):
            return model_id and f"models:/{model_id}"
        version = self._server.ask(lambda: stored.registry.register(model_id, register, event))
        self._uploaded &= version is not None
        return f"models:/{register}/{version}" if version else f"models:/{model_id}"

    def _from_journal(self, path: Path) -> str:
        return os.path.relpath(path, self._journal.path.parent)


@contextmanager
def tracked_run(options: TrackingOptions, journal: Path, warn: Warn | None = None) -> Iterator[Run]:
    """Log the block as a run that ends FINISHED, FAILED on an exception, or KILLED on Ctrl-C, SIGTERM or SIGHUP.

    If the journal exists, its run continues. MLflow continues it too if the experiment has it; if not, MLflow gets a
    new run with the whole journal.

    Args:
        options: Where to log; MLflow is not imported if that is the journal only.
        journal: The `metrics.jsonl` to append to; its folder is created if it is missing.
        warn: Called with one line when the server does not answer or refuses something; prints to stderr by default.

    Raises:
        TrackingError: The options or the journal cannot be used, whatever the server does.
    """
    server = Server(options, warn or warn_on_stderr)
    server.ask(server.connect)
    run = Run(server, Journal(journal), options, parent=None)
    with run._open_and_close(), _system_metrics(run):
        yield run


def stored_parent(output: Path) -> StoredParent | None:
    """Return the run that wrote an output, if its journal says where it is in MLflow."""
    try:
        return Journal(output / PRUNING).stored()
    except TrackingError:
        return None


def warn_on_stderr(line: str) -> None:
    """Print a warning."""
    print(f"warning: {masked(line)}", file=sys.stderr)


@contextmanager
def _system_metrics(run: Run) -> Iterator[None]:
    # MLflow's own monitor waits for the server when it is stopped, and used to need a global URI.
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


def _params(event: dict[str, Any]) -> dict[str, Any]:
    return event["params"] if event["event"] == "params" else {}
