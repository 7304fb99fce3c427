"""Runs the command line as a user does, and samples the memory of its processes.

It samples private memory: RSS less what is shared, which every process counts. USS is a little more exact, but reading
it walks every page, and would take a processor of its own.
"""

import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import psutil

SAMPLING_SECONDS = 0.1
# A process's role, by the start of its title: Ray names a worker's process after what it runs.
ROLES = {"ray::Shard": "worker"} | dict.fromkeys(("ray::eliminate", "ray::rank", "ray::decide"), "solve")


@dataclass
class Measured:
    """One command's seconds and peak private bytes: of each process, and of all together; with the processes' roles."""

    seconds: float = 0.0
    together: int = 0
    peaks: dict[int, int] = field(default_factory=dict)
    roles: dict[int, str] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """The peak of the largest process."""
        return max(self.peaks.values())

    def peak(self, role: str) -> int:
        """Return the peak of the largest process with a role, or 0 if there was none."""
        return max((self.peaks[pid] for pid, played in self.roles.items() if played == role), default=0)


def run_slimllm(arguments: list[str]) -> Measured:
    """Run `slimllm` with arguments, and sample its processes' memory; exit if it fails."""
    command = [sys.executable, "-P", "-m", "orchestrator", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    measured = Measured(roles={process.pid: "driver"})
    sampler = threading.Thread(target=_sample, args=(process, measured))
    sampler.start()
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    measured.seconds = time.perf_counter() - start
    sampler.join()
    return measured


def _sample(process: subprocess.Popen[bytes], measured: Measured) -> None:
    while process.poll() is None:
        sizes = {one.pid: _look_at(one, measured) for one in _family(process.pid)}
        for pid, size in sizes.items():
            measured.peaks[pid] = max(measured.peaks.get(pid, 0), size)
        measured.together = max(measured.together, sum(sizes.values()))
        time.sleep(SAMPLING_SECONDS)


def private_memory(process: psutil.Process) -> int:
    """Return the bytes that are a process's alone."""
    memory = process.memory_info()
    return memory.rss - memory.shared


def _look_at(process: psutil.Process, measured: Measured) -> int:
    """Return a process's private memory, and note its role."""
    try:
        title = " ".join(process.cmdline())
        for start, role in ROLES.items():
            if title.startswith(start):
                measured.roles[process.pid] = role
        return private_memory(process)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
