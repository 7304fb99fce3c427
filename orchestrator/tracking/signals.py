"""Ctrl-C and SIGTERM, which may come at any moment, and what must not be left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until what is inside is over.

    An exception that they raise in the middle of a transaction leaves it open, and the database locked for whatever
    the same process tells it next: that the run was killed.
    """
    # Elsewhere no handler runs, and none may be set.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    # None stands for a handler that is not Python's, which raises nothing and could not be put back.
    ours = [one for one in ENDING if signal.getsignal(one) is not None]
    before = {one: signal.signal(one, wait) for one in ours}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        if waiting:
            signal.raise_signal(waiting[0])
