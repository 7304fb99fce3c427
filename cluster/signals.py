"""Keeps a program's own handler of SIGTERM where Ray replaces it."""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# More than the structure in which any system describes a signal's handler.
_HANDLER_BYTES = 1024


@contextmanager
def sigterm_handler_kept() -> Iterator[None]:
    """Keep the program's own SIGTERM handler while Ray starts, in any thread.

    Ray replaces two: Python's handler, if it starts in the main thread, by one that ends the process at once; and the
    system's, always, by one that aborts it.
    """
    libc, system = ctypes.CDLL(None), ctypes.create_string_buffer(_HANDLER_BYTES)
    handler = signal.getsignal(signal.SIGTERM)
    libc.sigaction(int(signal.SIGTERM), None, system)
    try:
        yield
    finally:
        if handler is not signal.SIG_DFL:
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
            # The system's can be set by any thread, and also if it is from outside Python.
            libc.sigaction(int(signal.SIGTERM), system, None)
