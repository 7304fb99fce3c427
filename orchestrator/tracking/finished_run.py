"""Logs a finished run to MLflow from its output, after the run had no server or lost it."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.completion import ASKED, MARK, find_damage, is_marked
from orchestrator.secrets import masked
from orchestrator.tracking.journal import Journal
from orchestrator.tracking.options import JOURNAL_ONLY, TrackingError, TrackingOptions
from orchestrator.tracking.reach import server_name
from orchestrator.tracking.received import CHILD, COMPARISON, PRUNING, require_inside, require_names
from orchestrator.tracking.run import Run, warn_on_stderr
from orchestrator.tracking.server import RequiredServer, Warn
from orchestrator.tracking.stored_run import StoredRun

JOURNALS = (PRUNING, COMPARISON)
WEIGHTS = "*.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoggedOutput:
    """An output's run in MLflow, and whether MLflow had all of it before."""

    run_id: str
    experiment_id: str
    tracking_uri: str
    before: bool


def log_output(
    output: Path,
    *,
    experiment: str | None = None,
    tracking_uri: str | None = None,
    run_name: str | None = None,
    register: str | None = None,
    warn: Warn | None = None,
) -> LoggedOutput:
    """Log a finished output: add what MLflow lacks of its run. Repeating the call is harmless.

    Args:
        output: The directory that `prune` or `compare` wrote; its journal gets a line that says where it is logged.
        experiment: By default the run's own experiment; any other gets a new run.
        tracking_uri: By default that of `TrackingOptions`.
        run_name: By default the run's own name.
        register: By default the registered model's name that the run was given, if any.
        warn: Called with one line when the server refuses something; prints to stderr by default.

    Raises:
        TrackingError: The output has no finished run, its journal or a link leads out of it, or the server does not
            answer or refuses part of it.
    """
    if TrackingOptions(tracking_uri=tracking_uri).journal_only:
        raise TrackingError(
            "slimllm log writes to MLflow, and the tracking URI is none: pass --tracking-uri with a store, "
            "sqlite:///PATH.db or http://HOST:PORT"
        )
    journal = _finished_journal(output)
    start = _last(journal.events(), "start")
    options = TrackingOptions(
        experiment=experiment or start["experiment"],
        tracking_uri=tracking_uri,
        run_name=run_name or start["run_name"],
        register=register or start["register"],
    )
    server = RequiredServer(options, warn or warn_on_stderr)
    server.ask(server.connect)
    run = _FinishedRun(server, journal, options, parent=None)
    before = run.is_logged()
    if before is None and not run.log():
        raise TrackingError(f"{server_name(server.uri)} refused part of {output}: fix that, and log it again")
    run_id = before or run.run_id
    assert run_id is not None, "a run whose log is whole was created"
    return LoggedOutput(
        run_id=run_id,
        experiment_id=server.experiment_id,
        tracking_uri=server.uri,
        before=before is not None,
    )


def how_to_log(output: Path, place: Path | str | None = None) -> str | None:
    """Return the command that logs what MLflow lacks of a finished output; None if it has everything.

    The command names the run's own store, or "URI" if the run had none.

    Args:
        output: The directory of the output.
        place: The output's final location, if it is not `output`.
    """
    runs = [journal.events() for journal in _journals(output)]
    if all(events[-1]["event"] == "logged" for events in runs):
        return None
    uri = _last(runs[0], "start")["uri"]
    store = "URI" if uri == JOURNAL_ONLY else shlex.quote(uri)
    return f"slimllm log {shlex.quote(str(place or output))} --tracking-uri {store}"


def where_to_look(tracking_uri: str, experiment_id: str | None, run_id: str | None) -> str:
    """Return the URL of a run's page, or the command that serves the pages of a database."""
    if tracking_uri.startswith("http"):
        return f"{masked(tracking_uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"mlflow ui --backend-store-uri {shlex.quote(masked(tracking_uri))}"


class _FinishedRun(Run):
    """A run whose journal is complete."""

    @property
    def _checkpoints(self) -> list[dict[str, Any]]:
        return [event for event in self._earlier if event["event"] == "checkpoint"]

    def children(self) -> list["_FinishedRun"]:
        """Return the runs nested in this one, which are finished too."""
        found = _children(self._journal)
        return [
            _FinishedRun(self._server, journal, self._child_options(name), parent=self)
            for name, journal in found.items()
        ]

    def is_logged(self) -> str | None:
        """Return MLflow's id of the run if MLflow has it and its children, with models and files; else None."""
        key = _last(self._earlier, "start")["key"]
        stored = self._server.ask(lambda: self._server.find_run(key))
        confirmed = {event["run_id"] for event in self._earlier if event["event"] == "logged"}
        if stored is None or stored.run_id not in confirmed or stored.status != "FINISHED":
            return None
        models = all(self._has_model(stored, event) for event in self._checkpoints)
        return stored.run_id if models and all(child.is_logged() for child in self.children()) else None

    def _has_model(self, stored: StoredRun, checkpoint: dict[str, Any]) -> bool:
        model = self._server.ask(lambda: stored.find_model(checkpoint["name"]))
        if model is None or model.status != "READY":
            return False
        register = self._options.register
        return register is None or bool(
            self._server.ask(lambda: stored.registry.has(model.model_id, register, checkpoint))
        )

    def log(self) -> bool:
        """Log the whole run and its children; return whether MLflow accepted all files and models."""
        start = _last(self._earlier, "start")
        self._open(start["key"], self._earlier[0]["time"])
        self._tell_again()
        for event in self._uploads():
            self._tell(event)
        children = [child.log() for child in self.children()]
        self._tell(_last(self._earlier, "end"))
        return self._confirm() and all(children)

    def _uploads(self) -> list[dict[str, Any]]:
        """Return each upload once, even if several attempts made it."""
        uploads = [event for event in self._earlier if event["event"] in ("artifacts", "checkpoint")]
        return list({json.dumps(event | {"time": None}): event for event in uploads}.values())


def _finished_journal(output: Path) -> Journal:
    """Return the journal of an output's run, after checking that the output is complete."""
    if not output.is_dir():
        raise TrackingError(f"{output} does not exist: pass a directory that `slimllm prune` wrote")
    _kind_of(output)
    require_inside(output)
    journals = _journals(output)
    _require_whole(output)
    for journal in journals:
        events = journal.events()
        ended = [event for event in events if event["event"] in ("start", "end")]
        if len(ended) < 2 or ended[-1].get("status") != "FINISHED":
            raise TrackingError(f"the run of {journal.path} has not finished: log it once it has")
        for event in events:
            if event["event"] == "checkpoint":
                _require_weights(journal.path.parent / event["directory"])
    return journals[0]


def _require_whole(output: Path) -> None:
    """Refuse an output that has lost its mark, or with a file that is not as the mark says."""
    if not is_marked(output):
        # Only a command that writes an output whole marks it; a program of one's own may log without it.
        if (output / ASKED).exists():
            raise TrackingError(f"{output} is incomplete (it has no {MARK}): prune again with --resume or --overwrite")
    elif damage := find_damage(output):
        raise TrackingError(f"{output} is damaged: {damage}; get it back, or prune again")


def _require_weights(checkpoint: Path) -> None:
    if not any(checkpoint.glob(WEIGHTS)):
        raise TrackingError(
            f"{checkpoint.resolve()} has no weights ({WEIGHTS}): pass a complete output, or prune again"
        )


def _journals(output: Path) -> list[Journal]:
    """Return the journal of an output's run and those of its children, which name only what runs write."""
    kind = _kind_of(output)
    journal = _open_journal(output / kind)
    require_names(journal.path, kind, Journal.read(journal.path))
    children = list(_children(journal).values())
    for child in children:
        if child.path != journal.path:
            require_names(child.path, CHILD, Journal.read(child.path))
    return [journal, *children]


def _kind_of(output: Path) -> str:
    """Return which journal an output has."""
    for name in JOURNALS:
        if (output / name).is_file():
            return name
    raise TrackingError(
        f"{output} has no {JOURNALS[0]}, which every run writes: pass a directory that `slimllm prune` wrote"
    )


def _children(journal: Journal) -> dict[str, Journal]:
    """Return the journals of a run's children by name: files of their own, or their lines of the run's file."""
    if journal.child is not None:
        return {}
    found: dict[str, Journal] = {}
    for event in Journal.read(journal.path):
        if event["event"] == "child":
            found[event["run_name"]] = _open_journal(journal.path.parent / event["journal"])
        elif "child" in event:
            found[event["child"]] = Journal(journal.path, child=event["child"])
    return found


def _open_journal(path: Path) -> Journal:
    try:
        with path.open("rb+"):
            return Journal(path)
    except OSError as error:
        raise TrackingError(
            f"{path} cannot be written ({error.strerror}): slimllm log also writes to the run's journal"
        ) from error


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return [event for event in events if event["event"] == kind][-1]
