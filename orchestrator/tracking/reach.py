"""Checks whether MLflow can be reached, names it in messages, and limits how long a call may take.

`reach_store` leaves nothing behind: no run, no experiment, no file.
"""

import logging
import os
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.secrets import masked
from orchestrator.tracking.options import JOURNAL_ONLY, TrackingError, TrackingOptions, database_file

# A call is tried twice, so a server that drops packets costs 8 s, once. MLflow's own limits: 16 minutes.
QUICK_SECONDS = "4"
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": QUICK_SECONDS,
    # MLflow would obey "503, retry after 120 s".
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def reach_store(options: TrackingOptions) -> str:
    """Return in a few words whether runs can be logged; take a few seconds at most.

    Raises:
        TrackingError: Nothing can be logged there.
    """
    if options.journal_only:
        return f"{JOURNAL_ONLY}: only the journal"
    uri = options.resolved_uri
    try:
        if (path := database_file(uri)) is not None:
            return f"{server_name(uri)}, {_try_file(path)}"
        if (dialect := urlsplit(uri).scheme.partition("+")[0]) in DATABASE_PORTS:
            # MLflow would create tables when it connects.
            parts = urlsplit(uri)
            address = parts.hostname or "localhost", parts.port or DATABASE_PORTS[dialect]
            socket.create_connection(address, timeout=float(QUICK_SECONDS)).close()
        else:
            _ask_server(uri)
    # Any exception: MLflow lets through what its libraries raise.
    except Exception as error:
        raise TrackingError(f"{server_name(uri)} {describe_failure(error)}") from None
    return f"{server_name(uri)} answers"


def _try_file(path: Path) -> str:
    if path.exists():
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=float(QUICK_SECONDS))) as database:
            # A transaction that is rolled back shows that the file is writable, and writes nothing.
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
        return "which can be written"
    nearest = next(parent for parent in path.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{nearest} is not a writable folder")
    return "which the first run will create"


def _ask_server(uri: str) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # urllib3 says "Retrying", but our own line follows.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def prepare_store(uri: str) -> Path | None:
    """Refuse at once a URI that cannot work, which MLflow would retry for minutes; return an SQLite file's folder.

    Artifacts go into that folder; MLflow's own default is the working directory, wherever the file is.
    """
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError:
        # The error's text quotes what it took for the port, which may be half of a password.
        raise uri_error(uri, "its host or its port cannot be read") from None
    dialect = parts.scheme.partition("+")[0]
    if dialect in ("http", "https") and not host:
        raise uri_error(uri, "it names no host")
    if dialect in DATABASE_PORTS and host:
        socket.create_connection((host, port or DATABASE_PORTS[dialect]), timeout=float(QUICK_SECONDS)).close()
    if (path := database_file(uri)) is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version")
    except (OSError, sqlite3.Error) as error:
        raise uri_error(uri, str(error)) from error
    return path.parent


def uri_error(uri: str, why: str) -> TrackingError:
    """Return the error that says why a URI cannot be used, and what to give instead."""
    return TrackingError(
        f"{server_name(uri)} cannot be used ({masked(why)}): give sqlite:///PATH.db or http://HOST:PORT"
    )


def server_name(uri: str) -> str:
    """Return a server's name for messages."""
    return f"MLflow at {masked(uri)}"


def error_line(error: BaseException) -> str:
    """Return the first line of an error's text, short and without secrets."""
    text = str(error).strip() or type(error).__name__
    return masked(text.splitlines()[0])[:200]


def describe_failure(error: BaseException) -> str:
    """Return in a few words how a server failed."""
    # Find the first cause: MLflow wraps it in the address and three layers of retries.
    while deeper := error.__cause__ or error.__context__:
        error = deeper
    silent = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
    return f"{'does not answer' if silent else 'failed'} ({error_line(error)})"
