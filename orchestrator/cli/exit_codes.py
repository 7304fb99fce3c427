"""Turns errors into one line and an exit code: 2 if the user can fix it, 1 if not, 130 for Ctrl-C, 143 for SIGTERM."""

import json
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from orchestrator.config import ConfigError
from orchestrator.secrets import masked

FAILED = 1
REFUSED = 2
INTERRUPTED = 130
TERMINATED = 143


class _AlreadyReported(SystemExit):
    """The exit of a process that has already printed its error."""


@contextmanager
def exit_on_error(*, as_json: bool = False, verbose: bool = False) -> Iterator[None]:
    """Run the block; on an error, print one line and exit with the error's code.

    Args:
        as_json: Whether to print the error on stdout too, as an object with `error` and `exit_code`.
        verbose: Whether to print the traceback before the line.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # transformers' warnings are about config entries, such as special token ids, that pruning copies unchanged.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    terminated = threading.Event()

    def terminate(signum: int, frame: object) -> NoReturn:
        terminated.set()
        # The run, its actors and its record end as after Ctrl-C.
        raise SystemExit(TERMINATED)

    # In a program's other threads, signals are the program's own affair.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        ending = _ending_of(error, terminated.is_set())
        if ending is None:
            raise
        if verbose:
            traceback.print_exc()
        exit_with(*ending, as_json=as_json)


def print_json(value: Any) -> None:
    """Print a result as one JSON value without secrets; NaN becomes null, infinity "inf"."""
    from orchestrator.tracking.journal import json_value

    click.echo(json.dumps(json_value(value), allow_nan=False))


def exit_with(text: str, code: int = REFUSED, *, as_json: bool = False) -> NoReturn:
    """Print the reason in one line, without its secrets, and exit."""
    line = masked(" ".join(text.split()))
    if as_json:
        click.echo(json.dumps({"error": line, "exit_code": code}))
    click.echo(f"slimllm: {line}", err=True)
    raise _AlreadyReported(code)


def _ending_of(error: BaseException, terminated: bool) -> tuple[str, int] | None:
    """Return an error's message and exit code; None for a bug and for an intended exit."""
    match error:
        case KeyboardInterrupt():
            return _with_notes("interrupted; no checkpoint was written", error), INTERRUPTED
        case _AlreadyReported():
            return None
        # While Ray waits for a worker, it replaces our SystemExit with its own, which has another code.
        case SystemExit():
            return (_with_notes("terminated; no checkpoint was written", error), TERMINATED) if terminated else None
        case ConfigError():
            return _with_notes(str(error), error), REFUSED
    # The other error classes take seconds to import. Wrong settings and cluster errors are found before that, so check
    # for those first.
    from cluster import ClusterError

    if isinstance(error, ClusterError):
        return _with_notes(str(error), error), REFUSED
    from actors.errors import ShardError
    from orchestrator.output.destination import DeliveryError
    from orchestrator.pipeline import USER_ERRORS
    from slimllm_ops.errors import MiscountError, ReadBackError

    if isinstance(error, USER_ERRORS):
        return _with_notes(str(error), error), REFUSED
    if isinstance(error, ShardError | ReadBackError | MiscountError | DeliveryError):
        return _with_notes(str(error), error), FAILED
    if isinstance(error, OSError):
        # The disk is full or gone. Files named on the command line are checked earlier, with their own messages.
        place = f" {error.filename}" if error.filename else ""
        return _with_notes(f"the system refused{place}: {error.strerror or error}", error), FAILED
    return None


def _with_notes(text: str, error: BaseException) -> str:
    """Return a message with the notes added to its error: what is kept, and how to continue."""
    return "; ".join([text, *getattr(error, "__notes__", ())])
