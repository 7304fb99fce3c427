"""Defers Ctrl-C, SIGTERM and SIGHUP while something must not be left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defer Ctrl-C, SIGTERM and SIGHUP until the block ends.

    Their exception in the middle of a transaction would leave the database locked, and the process could not log that
    the run was killed.
    """
    # Handlers run, and can be set, only in the main thread.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    # None is a handler set outside Python, which raises nothing and could not be restored.
    ours = [one for one in ENDING if signal.getsignal(one) is not None]
    before = {one: signal.signal(one, wait) for one in ours}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        if waiting:
            signal.raise_signal(waiting[0])
