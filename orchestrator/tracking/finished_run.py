"""A run that has ended, told to MLflow from what it left: its server was never there, or was lost on the way."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.secrets import masked
from orchestrator.tracking.journal import Journal
from orchestrator.tracking.options import JOURNAL_ONLY, TrackingError, TrackingOptions
from orchestrator.tracking.reach import server_name
from orchestrator.tracking.run import Run, warn_on_stderr
from orchestrator.tracking.server import RequiredServer, Warn
from orchestrator.tracking.stored_run import StoredRun

# The journal of a pruned model, or of several; that of a comparison.
JOURNALS = ("pruning/metrics.jsonl", "metrics.jsonl")
WEIGHTS = "*.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoggedOutput:
    """Where MLflow has an output, and whether it had all of it before."""

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
    """Log a finished output: what MLflow has of its run stays, what is missing is added. Twice does nothing.

    Args:
        output: The directory that `prune` or `compare` wrote; the journal in it gets a line of where it is logged.
        experiment: By default the one that the run was to be logged in; in another the run is logged anew.
        tracking_uri: By default that of `TrackingOptions`.
        run_name: By default the name that the run was given.
        register: By default the name that the run was to register its model under, if any.
        warn: Called with one line when the server refuses something; prints to stderr by default.

    Raises:
        TrackingError: There is no finished run in the output, or the server does not answer or refuses part of it.
    """
    if TrackingOptions(tracking_uri=tracking_uri).journal_only:
        raise TrackingError(
            "slimllm log writes to MLflow, and the tracking URI is none: pass --tracking-uri with a store, "
            "sqlite:///PATH.db or http://HOST:PORT"
        )
    start = _require_finished(output)
    options = TrackingOptions(
        experiment=experiment or start["experiment"],
        tracking_uri=tracking_uri,
        run_name=run_name or start["run_name"],
        register=register or start["register"],
    )
    server = RequiredServer(options, warn or warn_on_stderr)
    server.ask(server.connect)
    run = _FinishedRun(server, _journals(output)[0], options, parent=None)
    before = run.is_logged()
    if before is None and not run.log():
        raise TrackingError(f"{server_name(server.uri)} refused a part of {output}: mend that, and log it again")
    run_id = before or run.run_id
    assert run_id is not None, "a run whose log is whole was created"
    return LoggedOutput(
        run_id=run_id,
        experiment_id=server.experiment_id,
        tracking_uri=server.uri,
        before=before is not None,
    )


def how_to_log(output: Path, place: Path | str | None = None) -> str | None:
    """Return the command that gives MLflow what it lacks of a finished output; None where it has everything.

    The command names the store that the run was for. For a run without one it says URI.

    Args:
        output: The directory of the output.
        place: Where it is in the end, if not there.
    """
    runs = [journal.events() for journal in _journals(output)]
    if all(events[-1]["event"] == "logged" for events in runs):
        return None
    uri = _last(runs[0], "start")["uri"]
    store = "URI" if uri == JOURNAL_ONLY else shlex.quote(uri)
    return f"slimllm log {shlex.quote(str(place or output))} --tracking-uri {store}"


def where_to_look(tracking_uri: str, experiment_id: str | None, run_id: str | None) -> str:
    """Return the address of a run's page, or the command that serves such pages from a database."""
    if tracking_uri.startswith("http"):
        return f"{masked(tracking_uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"mlflow ui --backend-store-uri {masked(tracking_uri)}"


class _FinishedRun(Run):
    """A run that a journal holds to its end."""

    @property
    def _checkpoints(self) -> list[dict[str, Any]]:
        return [event for event in self._earlier if event["event"] == "checkpoint"]

    def children(self) -> list["_FinishedRun"]:
        """The runs nested in this one, which are as finished."""
        found = _children(self._journal)
        return [
            _FinishedRun(self._server, journal, self._child_options(name), parent=self)
            for name, journal in found.items()
        ]

    def is_logged(self) -> str | None:
        """MLflow's id of the run if it has this one and its children, with models and files; None if not."""
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
        """Tell MLflow all of it, its children inside it; return whether nothing of files and models was refused."""
        start = _last(self._earlier, "start")
        self._open(start["key"], self._earlier[0]["time"])
        self._tell_again()
        for event in self._uploads():
            self._tell(event)
        children = [child.log() for child in self.children()]
        self._tell(_last(self._earlier, "end"))
        return self._confirm() and all(children)

    def _uploads(self) -> list[dict[str, Any]]:
        """Each upload once, whichever attempts made it."""
        uploads = [event for event in self._earlier if event["event"] in ("artifacts", "checkpoint")]
        return list({json.dumps(event | {"time": None}): event for event in uploads}.values())


def _require_finished(output: Path) -> dict[str, Any]:
    """Return the start of an output's run, after a check that there is all that can be logged."""
    if not output.is_dir():
        raise TrackingError(f"{output} is not there: pass a directory that `slimllm prune` wrote")
    journals = _journals(output)
    for journal in journals:
        events = journal.events()
        ended = [event for event in events if event["event"] in ("start", "end")]
        if len(ended) < 2 or ended[-1].get("status") != "FINISHED":
            raise TrackingError(f"the run of {journal.path} has not finished: there is nothing to log before it has")
        for event in events:
            if event["event"] == "checkpoint":
                _require_weights(journal.path.parent / event["directory"])
    return _last(journals[0].events(), "start")


def _require_weights(checkpoint: Path) -> None:
    if not any(checkpoint.glob(WEIGHTS)):
        raise TrackingError(f"{checkpoint.resolve()} has no weights ({WEIGHTS}): pass a whole output, or prune again")


def _journals(output: Path) -> list[Journal]:
    """Return the journal of an output's run and those of its children."""
    for name in JOURNALS:
        if (output / name).is_file():
            journal = _open_journal(output / name)
            return [journal, *_children(journal).values()]
    raise TrackingError(
        f"{output} has no {JOURNALS[0]}, which every run leaves: pass a directory that `slimllm prune` wrote"
    )


def _children(journal: Journal) -> dict[str, Journal]:
    """Return the journals of a run's children by name: their own, or their share in the run's."""
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
            f"{path} cannot be written ({error.strerror}): a run is logged into its journal too"
        ) from error


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return [event for event in events if event["event"] == kind][-1]
