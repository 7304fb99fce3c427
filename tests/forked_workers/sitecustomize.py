"""Replaces a worker that Ray starts by a fork (see server.py).

Python imports this module before it runs its program, because PYTHONPATH names the folder.
"""

import os
import sys

if os.environ.get("SLIMLLM_FORKED_WORKERS") and sys.orig_argv[1:2] and sys.orig_argv[1].endswith("/default_worker.py"):
    import json
    import socket
    from pathlib import Path

    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["SLIMLLM_FORKED_WORKERS"])
        asked = json.dumps({"words": sys.orig_argv[1:], "folder": str(Path.cwd()), "environment": dict(os.environ)})
        socket.send_fds(server, [asked.encode()], [0, 1, 2])
        server.shutdown(socket.SHUT_WR)
        # This returns when the fork ends, so that this process lives as long as its fork.
        server.recv(1)
    os._exit(0)
