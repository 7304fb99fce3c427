"""Giving freed memory back to the system at once."""

import ctypes
import sys

MAPPED_BYTES = 1 << 20
# From glibc's malloc.h.
M_MMAP_THRESHOLD = -3


def return_large_blocks() -> None:
    """Let blocks of 1 MiB and more go back to the system as soon as they are freed; nothing without glibc.

    By itself, glibc keeps freed blocks of up to 32 MiB, scattered over its heap, so that a process seems to grow with
    every layer of a model though it holds one. Larger blocks, those of wide models, are mapped anew either way.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
