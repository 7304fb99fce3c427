"""Defines where a run is logged."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from orchestrator.config import PruneConfig
from orchestrator.secrets import uris_masked

# The tracking URI of a run that writes only its journal.
JOURNAL_ONLY = "none"


class TrackingError(ValueError):
    """An option that cannot be used, whatever the server does; the message says what to give instead."""


@dataclass(frozen=True)
class StoredParent:
    """A run in MLflow that another run can be nested in: its store, its experiment and its id."""

    uri: str
    experiment_id: str
    run_id: str


@dataclass(frozen=True, kw_only=True)
class TrackingOptions:
    """Where a run is logged.

    Attributes:
        experiment: MLflow experiment, created if it is missing.
        tracking_uri: By default $MLFLOW_TRACKING_URI, or else `mlflow.db` in the working directory; "none" writes only
            the journal.
        run_name: By default MLflow invents one.
        register: Registered model that the checkpoint becomes a version of; None registers nothing.
        parent: The run to nest this one in, if it is in the same experiment of the same store.
    """

    experiment: str = PruneConfig.experiment
    tracking_uri: str | None = None
    run_name: str | None = None
    register: str | None = None
    parent: StoredParent | None = None

    def __post_init__(self) -> None:
        # These are shown wherever the run is listed, and name it: they must not depend on the environment.
        object.__setattr__(self, "experiment", uris_masked(self.experiment))
        object.__setattr__(self, "run_name", self.run_name and uris_masked(self.run_name))
        if not self.experiment.strip():
            raise TrackingError("the experiment's name is empty: give a name")
        # MLflow would say so too, but only after the checkpoint is uploaded.
        if self.register is not None and (not self.register.strip() or set(self.register) & set("/:")):
            raise TrackingError(f"the registered model's name is {self.register!r}: give one without '/' and ':'")
        if self.register is not None and self.journal_only:
            raise TrackingError(
                "--register needs MLflow, which --tracking-uri none turns off: pass a store, or drop one of the two"
            )

    @property
    def resolved_uri(self) -> str:
        """The tracking URI with the default filled in."""
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or database_uri(Path.cwd() / "mlflow.db")

    @property
    def journal_only(self) -> bool:
        """Whether the run is logged only to its journal."""
        return self.resolved_uri == JOURNAL_ONLY

    def parent_in(self, uri: str, experiment_id: str) -> str | None:
        """Return the id of the run to nest this one in, if an experiment of a store has it."""
        parent = self.parent
        return parent.run_id if parent and (parent.uri, parent.experiment_id) == (uri, experiment_id) else None


def database_uri(path: Path) -> str:
    """Return the tracking URI of an SQLite file, whatever its path holds: `database_file` reads it."""
    quoted = str(path).replace("%", "%25").replace("?", "%3F")
    # SQLAlchemy reads %25 as %. MLflow does not: it would make folders of these names beside, unless a driver is named.
    return f"{'sqlite' if quoted == str(path) else 'sqlite+pysqlite'}:///{quoted}"


def database_file(uri: str) -> Path | None:
    """Return the absolute path of a tracking URI's SQLite file, as SQLAlchemy reads it; None if it has none."""
    scheme, separator, rest = uri.partition(":///")
    if not separator or scheme.partition("+")[0] != "sqlite":
        return None
    # With `uri=true`, SQLite reads the rest: "file:PATH?mode=memory".
    database = unquote(rest.partition("?")[0])
    return None if database == ":memory:" or database.startswith("file:") else Path(database).absolute()
