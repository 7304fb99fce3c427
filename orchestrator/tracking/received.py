"""Checks an output that others may have written, before its journal is followed.

A journal names files and folders. Those that a run writes have a few forms, and no other name is followed. What is sent
to a server lies in the output: a link that leads out of it would send a file of the user's.
"""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any

from orchestrator.tracking.options import TrackingError
from slimllm_ops.errors import shown
from slimllm_ops.files import stays_inside

# The journals of `prune`, and of `compare`, `evaluate` and `bench`; and the forms of the paths in each, relative to its
# folder.
PRUNING, COMPARISON, CHILD = "pruning/metrics.jsonl", "metrics.jsonl", "child"
OF_A_MODEL = {"artifacts": r"\.|run\.toml", "checkpoint": r"\.\."}
FORMS = {
    PRUNING: OF_A_MODEL | {"child": r"\.\./(?!\.)[^/]+/pruning/metrics\.jsonl"},
    # Runs are nested one deep.
    CHILD: OF_A_MODEL,
    COMPARISON: {
        "artifacts": r"(comparison|evaluation|bench)\.(json|csv|md)|report\.html|perplexity(-\d+)?\.png|run\.toml"
    },
}
# The folders of artifacts, and the key by which MLflow finds a run.
FOLDERS = (None, "pruning")
KEY = r"[0-9a-f]{32}"
# What is read of each event, and its types.
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "start": {"key": (str,), "uri": (str,), "experiment": (str,), "run_name": (str, NoneType)},
    "params": {"params": (dict,)},
    "tags": {"tags": (dict,)},
    "metrics": {"step": (int, NoneType), "metrics": (dict,)},
    "note": {"text": (str,)},
    "evaluated": {"uri": (str,), "run_id": (str,), "metrics": (dict,)},
    "dataset": {"name": (str,), "digest": (str,), "context": (str,), "source": (str,)},
    "artifacts": {"paths": (list,), "to": (str, NoneType)},
    "checkpoint": {"directory": (str,), "name": (str,), "params": (dict,)},
    "child": {"run_name": (str,), "journal": (str,)},
    "end": {"status": (str,)},
    "logged": {"run_id": (str,)},
}


def require_names(journal: Path, kind: str, events: Iterable[dict[str, Any]]) -> None:
    """Check that a journal's events have what is read of them, and name only what a run writes.

    Args:
        journal: The journal's file.
        kind: PRUNING, COMPARISON or CHILD.
        events: Its events.

    Raises:
        TrackingError: An event is of no run, or names something else.
    """
    for event in events:
        what = event["event"]
        if not _is_whole(event):
            raise TrackingError(f"{journal}: an event {shown(str(what))!r} is not as a run writes it: get a fresh copy")
        for path in _paths(event):
            form = FORMS[kind].get(what)
            if not (isinstance(path, str) and form and re.fullmatch(form, path)):
                raise TrackingError(
                    f"{journal}: an event {what!r} names {shown(str(path))!r}, which no run writes there: nothing is "
                    f"logged of an output that names other files"
                )


def require_inside(output: Path) -> None:
    """Check that everything visible in an output is a file or a folder there; hidden files are never sent.

    Raises:
        TrackingError: A link leads out of it, other than to a cache's file, or to a folder; or there is a pipe or the
            like.
    """
    for folder, folders, files in os.walk(output):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *(name for name in files if not name.startswith("."))):
            path = Path(folder, name)
            if path.is_symlink() and not (path.is_file() and stays_inside(path, output)):
                raise TrackingError(
                    f"{path} is a link to {shown(str(path.readlink()), 200)}: slimllm log sends only files that lie in "
                    f"the output, so put the file itself in its place, or remove it"
                )
            if not path.is_symlink() and stat.S_IFMT(path.lstat().st_mode) not in (stat.S_IFDIR, stat.S_IFREG):
                raise TrackingError(f"{path} is neither a file nor a folder: remove it")


def _is_whole(event: dict[str, Any]) -> bool:
    """Return whether an event has what is read of it; kinds that no version knows are not read."""
    if type(event["time"]) not in (int, float) or type(event.get("child", "")) is not str:
        return False
    if not isinstance(event["event"], str):
        return False
    fields = FIELDS.get(event["event"], {})
    if not all(type(event.get(name, ...)) in types for name, types in fields.items()):
        return False
    if event["event"] == "start" and not re.fullmatch(KEY, event["key"]):
        return False
    return event["event"] != "artifacts" or event["to"] in FOLDERS


def _paths(event: dict[str, Any]) -> list[Any]:
    match event["event"]:
        case "artifacts":
            return event["paths"]
        case "checkpoint":
            return [event["directory"]]
        case "child":
            return [event["journal"]]
        case _:
            return []
