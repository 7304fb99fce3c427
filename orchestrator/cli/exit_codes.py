"""How commands end: what the user can mend in one line and code 2, what failed in 1, Ctrl-C in 130, SIGTERM in 143."""

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
    """The end of a process whose error was printed already."""


@contextmanager
def exit_on_error(*, as_json: bool = False, verbose: bool = False) -> Iterator[None]:
    """Run what is inside; end the process with a line and a code where it cannot go on.

    Args:
        as_json: whether stdout gets the error too, as an object with `error` and `exit_code`.
        verbose: whether the traceback comes before the line.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Its warnings are about configs (ids of special tokens, say) that pruning takes over as they are.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    terminated = threading.Event()

    def terminate(signum: int, frame: object) -> NoReturn:
        terminated.set()
        # The run ends as after Ctrl-C, its actors and its record too.
        raise SystemExit(TERMINATED)

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
    """Print a result for machines: one JSON object, without secrets; NaN is null, infinity "inf"."""
    from orchestrator.tracking.journal import json_value

    click.echo(json.dumps(json_value(value), allow_nan=False))


def exit_with(text: str, code: int = REFUSED, *, as_json: bool = False) -> NoReturn:
    """Say in one line why, without the secrets in it, and end the process."""
    line = masked(" ".join(text.split()))
    if as_json:
        click.echo(json.dumps({"error": line, "exit_code": code}))
    click.echo(f"slimllm: {line}", err=True)
    raise _AlreadyReported(code)


def _ending_of(error: BaseException, terminated: bool) -> tuple[str, int] | None:
    """Return what is said of an error, and the code; None for a bug, and for an end that was meant."""
    match error:
        case KeyboardInterrupt():
            return _with_notes("interrupted; no checkpoint was written", error), INTERRUPTED
        case _AlreadyReported():
            return None
        # Where Ray waits for a worker, it puts a SystemExit of its own, with another code, in the place of ours.
        case SystemExit():
            return (_with_notes("terminated; no checkpoint was written", error), TERMINATED) if terminated else None
        case ConfigError():
            return _with_notes(str(error), error), REFUSED
    # What else there is takes seconds to import, and a wrong setting is known before; so is, where Ray is imported
    # already, what is wrong with a cluster.
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
        # A disk that is full or gone. The command line's own files are checked before, with messages of their own.
        place = f" {error.filename}" if error.filename else ""
        return _with_notes(f"the system refused{place}: {error.strerror or error}", error), FAILED
    return None


def _with_notes(text: str, error: BaseException) -> str:
    """Return a message with what was noted on its error's way: what is kept, and how to go on."""
    return "; ".join([text, *getattr(error, "__notes__", ())])
