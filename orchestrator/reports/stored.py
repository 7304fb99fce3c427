"""Reads runs in MLflow for a report: the files of each run's record, and its seconds."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from orchestrator.reports.sources import COMPARISON, EVALUATION, PLAN, SPEED, read_directory, seconds_of
from orchestrator.reports.values import Sources
from orchestrator.tracking.options import TrackingError, TrackingOptions, database_file
from orchestrator.tracking.reach import ENVIRONMENT, describe_failure, server_name
from orchestrator.tracking.stored_run import PARENT_TAG
from slimllm_ops.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_ID = re.compile(r"(?:runs:/)?([0-9a-f]{32})/?")
FOLDER = PLAN.parent.as_posix()
WANTED = (PLAN.as_posix(), COMPARISON, *(f"{FOLDER}/{name}" for name in (EVALUATION, SPEED)), EVALUATION, SPEED)


def find_run_id(named: str) -> str | None:
    """Return the id in the name of a run, `ID` or `runs:/ID`; None if it names none."""
    found = RUN_ID.fullmatch(named)
    return found[1] if found else None


def read_stored(run_id: str, tracking_uri: str | None) -> Sources:
    """Return what a run's artifacts hold, or those of its children, as a sweep and a comparison have them.

    Raises:
        InputError: The run has no record, or a broken one.
        TrackingError: MLflow does not answer, or does not have the run.
    """
    options = TrackingOptions(tracking_uri=tracking_uri)
    if options.journal_only:
        raise TrackingError(f"run {run_id} is one of MLflow, and the tracking URI is none: pass --tracking-uri URI")
    with _client(options.resolved_uri, run_id) as client:
        run = client.get_run(run_id)
        children = _children(client, run)
        found = sum((_read(client, one) for one in (run, *children)), Sources())
    if not found:
        raise InputError(
            f"run {run_id} in {server_name(options.resolved_uri)} has neither {WANTED[0]} nor {COMPARISON} among its "
            "artifacts: pass the id of a run of slimllm prune, tune or compare"
        )
    return found


@contextmanager
def _client(uri: str, run_id: str) -> Iterator["MlflowClient"]:
    """Yield a client of a store, and turn what MLflow raises into an error that names the run."""
    file = database_file(uri)
    if file is not None and not file.is_file():
        raise TrackingError(f"run {run_id} cannot be read: {server_name(uri)} is no file; pass --tracking-uri")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # urllib3 says "Retrying", but our own line follows.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow import MlflowClient

    try:
        yield MlflowClient(tracking_uri=uri)
    except InputError:
        raise
    # Any exception: MLflow lets through what its libraries raise.
    except Exception as error:
        raise TrackingError(
            f"run {run_id} cannot be read: {server_name(uri)} {describe_failure(error)}; check it and --tracking-uri"
        ) from None


def _children(client: "MlflowClient", run: Any) -> list[Any]:
    """Return a run's children that are prunings, by name; a training that is nested in a pruning is none."""
    found = client.search_runs([run.info.experiment_id], f"tags.`{PARENT_TAG}` = '{run.info.run_id}'")
    if _artifacts(client, run.info.run_id, FOLDER) & {PLAN.as_posix()}:
        return []
    return sorted(found, key=lambda one: str(one.info.run_name))


def _read(client: "MlflowClient", run: Any) -> Sources:
    """Return what the artifacts of one run hold."""
    run_id = run.info.run_id
    held = _artifacts(client, run_id, None) | _artifacts(client, run_id, FOLDER)
    wanted = [name for name in WANTED if name in held]
    if not wanted:
        return Sources()
    with TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        for name in wanted:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            # Where the file lands in the folder depends on the store.
            Path(client.download_artifacts(run_id, name, folder)).replace(output / name)
        found = read_directory(output)
    seconds = seconds_of(run.data.metrics)
    return replace(
        found, runs=tuple(replace(one, directory=None, run_id=run_id, seconds=seconds) for one in found.runs)
    )


def _artifacts(client: "MlflowClient", run_id: str, folder: str | None) -> set[str]:
    return {file.path for file in client.list_artifacts(run_id, folder) if not file.is_dir}
