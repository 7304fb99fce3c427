"""Replaces a worker or a job's driver that Ray starts, or a process that reads from afar, by a fork (see server.py).

Python imports this module before it runs its program, because PYTHONPATH names the folder.
"""

import os
import sys

IS_WORKER = sys.orig_argv[1:2] and sys.orig_argv[1].endswith("/default_worker.py")
# A job's driver, and what talks to the hub or to a store for us.
MODULES = ("orchestrator", "orchestrator.sources.hub", "orchestrator.sources.storage.process")
IS_OURS = sys.orig_argv[1:3] == ["-P", "-m"] and sys.orig_argv[3] in MODULES

# A test may ask for a fork (server.py: FORKED).
IS_ASKED = bool(os.environ.pop("SLIMLLM_FORKED", None))


def run_in_fork(address: str) -> None:
    """Run this process's program in a fork; pass signals on to it, and end as it ends."""
    import json
    import signal
    import socket
    from pathlib import Path

    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        asked = {"words": sys.orig_argv[1:], "folder": str(Path.cwd()), "environment": dict(os.environ)}
        socket.send_fds(server, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
        fork = int(server.recv(16))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda given, _: os.kill(fork, given))
        # Tests that freeze the program must know which process runs it.
        Path(f"{address}-{os.getpid()}").write_text(str(fork))
        # This returns when the fork ends, so that this process lives as long as its fork.
        code = server.recv(16)
    # A fork that was killed gave no code, nor does a worker that Ray ends.
    if not code and not IS_WORKER:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(int(code or 0))


if (IS_WORKER or IS_OURS or IS_ASKED) and (server_address := os.environ.get("SLIMLLM_FORKED_WORKERS")):
    run_in_fork(server_address)
