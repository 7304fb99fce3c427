"""Turns errors into one line and an exit code: 2 if the user can fix it, 1 if not, or that of a signal."""

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from orchestrator.config import ConfigError
from orchestrator.json_values import json_value
from orchestrator.secrets import masked

FAILED = 1
REFUSED = 2
INTERRUPTED = 130
TERMINATED = 143
HUNG_UP = 129
# Two of SIGINT within this time are one Ctrl-C.
SAME_INTERRUPT_SECONDS = 0.5
# The signals that end a command as Ctrl-C does, with their exit codes and what it says.
ENDINGS = {signal.SIGTERM: (TERMINATED, "terminated"), signal.SIGHUP: (HUNG_UP, "the terminal is gone")}


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
    came: list[int] = []

    def end(signum: int, frame: object) -> NoReturn:
        came.append(signum)
        # The run, its actors and its record end as after Ctrl-C.
        raise SystemExit(ENDINGS[signal.Signals(signum)][0])

    # In a program's other threads, signals are the program's own affair.
    if threading.current_thread() is threading.main_thread():
        _handle_signals(end)
        _end_at_once_on_second_interrupt()
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        ending = _ending_of(error, came)
        if ending is None:
            raise
        if verbose:
            # Without its terminal, a program has nobody to tell.
            with suppress(OSError):
                click.echo(masked(traceback.format_exc()), err=True, nl=False)
        exit_with(*ending, as_json=as_json)


def _handle_signals(end: Callable[[int, object], NoReturn]) -> None:
    """End the program by a function when a signal of `ENDINGS` comes."""
    for one in ENDINGS:
        # nohup and its like have a program ignore SIGHUP.
        if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN:
            signal.signal(one, end)


def _end_at_once_on_second_interrupt() -> None:
    """Let the first Ctrl-C raise KeyboardInterrupt as usual, and a later one end the program where it stands.

    Whatever is written appears whole or not at all, so there is nothing to finish.
    """
    first: list[float] = []

    def interrupt(signum: int, frame: object) -> None:
        if not first:
            first.append(time.monotonic())
            raise KeyboardInterrupt
        # A terminal sends Ctrl-C to a group of processes, and some of them pass it on.
        if time.monotonic() - first[0] > SAME_INTERRUPT_SECONDS:
            os.write(2, b"slimllm: interrupted twice, ended at once; --resume continues\n")
            _kill_children()
            os._exit(INTERRUPTED)

    # A shell has its background jobs ignore Ctrl-C. A program may have its own handler.
    if getattr(signal.getsignal(signal.SIGINT), "__name__", "") in ("default_int_handler", "interrupt"):
        signal.signal(signal.SIGINT, interrupt)


def _kill_children() -> None:
    """End the processes that this one started, which cannot end by themselves as fast as it does."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()


def print_json(value: Any) -> None:
    """Print a result as one JSON value without the credentials of addresses; NaN becomes null, infinity "inf"."""
    click.echo(json.dumps(json_value(value), allow_nan=False))


def exit_with(text: str, code: int = REFUSED, *, as_json: bool = False) -> NoReturn:
    """Print the reason in one line, without its secrets, and exit."""
    # Mask first: in one line, a secret of several is no longer recognised.
    line = " ".join(masked(text).split())
    # Without its terminal, a program has nobody to tell.
    with suppress(OSError):
        if as_json:
            click.echo(json.dumps({"error": line, "exit_code": code}))
        click.echo(f"slimllm: {line}", err=True)
    raise _AlreadyReported(code)


def _ending_of(error: BaseException, came: Sequence[int]) -> tuple[str, int] | None:
    """Return an error's message and exit code; None for a bug and for an intended exit.

    Args:
        error: The error.
        came: The signals of `ENDINGS` that came.
    """
    match error:
        # A program that has lost its terminal cannot print, whatever it does.
        case OSError() if signal.SIGHUP in came:
            return _ended_by(signal.SIGHUP, error)
        case KeyboardInterrupt():
            return _with_notes("interrupted; no checkpoint was written", error), INTERRUPTED
        case _AlreadyReported():
            return None
        # While Ray waits for a worker, it replaces our SystemExit with its own, which has another code.
        case SystemExit():
            return _ended_by(came[0], error) if came else None
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


def _ended_by(number: int, error: BaseException) -> tuple[str, int]:
    """Return the message and exit code of a program that a signal ends."""
    code, what = ENDINGS[signal.Signals(number)]
    return _with_notes(f"{what}; no checkpoint was written", error), code


def _with_notes(text: str, error: BaseException) -> str:
    """Return a message with the notes added to its error: what is kept, and how to continue."""
    return "; ".join([text, *getattr(error, "__notes__", ())])
