"""Returns freed memory to the system, and reports how much is free."""

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
    """Return blocks of 128 KiB or more to the system as soon as they are freed; do nothing without glibc.

    By default, glibc keeps freed blocks of up to 32 MiB, scattered over its heap, so a process seems to grow with every
    layer of a model, though it holds only one. Larger blocks, as in wide models, are newly mapped either way.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or for a CPU, of this machine or container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_of_machine(), _free_of_container())


def _free_of_machine() -> int:
    for line in MEMINFO.read_text().splitlines() if MEMINFO.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_container() -> int:
    """Return the bytes left under a container's limit (cgroup v2), or `sys.maxsize` without a limit."""
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if not limit.exists() or not limit.read_text().strip().isdigit():
        return sys.maxsize
    return max(int(limit.read_text()) - int(used.read_text()), 0)
