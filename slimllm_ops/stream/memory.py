"""The memory of this process and its machine: giving back what was freed, and asking what is free."""

import ctypes
import os
import sys
from pathlib import Path

import torch

MAPPED_BYTES = 128 << 10
# From glibc's malloc.h.
M_MMAP_THRESHOLD = -3
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def return_large_blocks() -> None:
    """Let blocks of 128 KiB and more go back to the system as soon as they are freed; nothing without glibc.

    By itself, glibc keeps freed blocks of up to 32 MiB, scattered over its heap, so that a process seems to grow with
    every layer of a model though it holds one. Larger blocks, those of wide models, are mapped anew either way.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, or in this machine or container for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_of_machine(), _free_of_container())


def _free_of_machine() -> int:
    for line in MEMINFO.read_text().splitlines() if MEMINFO.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_container() -> int:
    """Return what a container's limit leaves (cgroup v2); without a limit, more than any machine has."""
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if not limit.exists() or not limit.read_text().strip().isdigit():
        return sys.maxsize
    return max(int(limit.read_text()) - int(used.read_text()), 0)
