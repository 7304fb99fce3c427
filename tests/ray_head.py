"""Starts the head of a Ray cluster in processes of its own, as `ray start` does."""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# For what takes seconds on an idle machine.
SECONDS = 300
COMMAND = (sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block")


@contextmanager
def ray_head(*options: str, folder: Path, environment: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a head, and end it with the context.

    Args:
        options: What else `ray start` is given.
        folder: Its working directory, where its log lies.
        environment: All of its variables.
    """
    # No test reads what Ray's log monitor passes on, and it takes as much time as a worker.
    alike = ["--node-ip-address=127.0.0.1", "--disable-usage-stats", "--include-log-monitor=false"]
    command, log = [*COMMAND, *alike, *options], folder / "ray.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=folder)
    try:
        deadline = time.monotonic() + SECONDS
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)
