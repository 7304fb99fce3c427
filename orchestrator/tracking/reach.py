"""Whether runs can be logged at a place, asked without leaving anything there: no run, no experiment, no file."""

import logging
import os
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.tracking.options import JOURNAL_ONLY, TrackingError, TrackingOptions, database_file
from orchestrator.tracking.server import DATABASE_PORTS, ENVIRONMENT, QUICK_SECONDS, failure, shown


def reach_store(options: TrackingOptions) -> str:
    """Return in a few words what was found where runs are to be logged; some seconds at most.

    Raises:
        TrackingError: nothing can be logged there.
    """
    if options.journal_only:
        return f"{JOURNAL_ONLY}: only the journal"
    uri = options.resolved_uri
    try:
        if (path := database_file(uri)) is not None:
            return f"{shown(uri)}, {_try_file(path)}"
        if (dialect := urlsplit(uri).scheme.partition("+")[0]) in DATABASE_PORTS:
            # MLflow would set up tables as it connects.
            parts = urlsplit(uri)
            address = parts.hostname or "localhost", parts.port or DATABASE_PORTS[dialect]
            socket.create_connection(address, timeout=float(QUICK_SECONDS)).close()
        else:
            _ask_server(uri)
    # Any: MLflow raises what the libraries beneath it raise.
    except Exception as error:
        raise TrackingError(f"{shown(uri)} {failure(error)}") from None
    return f"{shown(uri)} answers"


def _try_file(path: Path) -> str:
    if path.exists():
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=float(QUICK_SECONDS))) as database:
            # Begun and taken back: that it can be written is known, and nothing is.
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
        return "which can be written"
    nearest = next(parent for parent in path.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{nearest} is no folder to write in")
    return "which the first run will make"


def _ask_server(uri: str) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # It says "Retrying" where one line of ours follows.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
