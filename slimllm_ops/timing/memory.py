"""Reads the peak memory of this process: of the machine's memory, and of the GPU."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What the kernel takes for "forget the peak".
FORGET = "5"


@dataclass(frozen=True)
class PeakMemory:
    """Peak bytes: of the whole process in memory (RSS), and of its tensors on the GPU (None without one)."""

    process: int
    gpu: int | None


def reset_peak() -> None:
    """Forget the peak so far; where the system does not allow it, the peak of the process stays."""
    with suppress(OSError):
        RESET.write_text(FORGET)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def read_peak() -> PeakMemory:
    """Return the peak since it was reset."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    kilobytes = next(int(words[1]) for words in lines if words[0] == "VmHWM:")
    return PeakMemory(kilobytes * 1024, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None)
