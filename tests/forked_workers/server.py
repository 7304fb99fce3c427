"""Runs Ray's workers, the drivers of jobs and what talks to stores as forks of one process that has imported much.

A process that imports torch and transformers itself takes five seconds of CPU time, and the tests start hundreds of
them. The server does not import Ray, because Ray reads settings from the environment at import, such as the
authentication mode. So do the hub's libraries: a fork that talks to a store or to the hub imports them again.
"""

import atexit
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parent
# With these variables `python -c PROGRAM`, `-m MODULE` or `FILE` is a fork, in which none of NOT_IMPORTED is imported.
FORKED = {"SLIMLLM_FORKED": "1"}
NOT_IMPORTED = {"ray", "mlflow", "datasets", "matplotlib", "orchestrator", "slimllm_ops"}
WORKERS_IMPORT = (
    *("aiohttp", "jsonschema", "psutil", "pyarrow", "requests", "yaml"),
    *("transformers.generation", "transformers.models.llama.modeling_llama"),
    # What talks to a store or to the hub imports these.
    *("dill", "multiprocess", "pandas", "pyarrow.dataset", "pyarrow.parquet", "s3fs", "xxhash"),
)
READ_THE_ENVIRONMENT = {"datasets", "huggingface_hub", "transformers"}


@contextmanager
def forked_workers() -> Iterator[dict[str, str]]:
    """Serve forks while the context lasts; yield the environment variables that make Ray use them."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address = f"{folder}/socket"
        listener.bind(address)
        listener.listen(128)
        command = [sys.executable, __file__, str(listener.fileno())]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True)
        # Only the server holds it now. If the server dies, requests fail at once.
        listener.close()
        path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
        try:
            yield {"SLIMLLM_FORKED_WORKERS": address, "PYTHONPATH": path}
        finally:
            server.communicate(timeout=60)


def serve(listener: socket.socket) -> None:
    """Fork for each worker that asks, until stdin closes because the tests have ended."""
    # Nobody waits for the forks: the system removes those that have ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        worker, _ = listener.accept()
        # Import at the first request: a run of a few tests may need no worker.
        _import_what_workers_import()
        if os.fork() == 0:
            listener.close()
            _become(worker)
        worker.close()


def _import_what_workers_import() -> None:
    for name in WORKERS_IMPORT:
        importlib.import_module(name)
    assert NOT_IMPORTED.isdisjoint(sys.modules)
    # The garbage collector leaves these objects alone from now on, and so the forks share their memory.
    gc.freeze()


def _become(asking: socket.socket) -> None:
    """Continue as the process that asks: with its program, files, folder and environment."""
    # If a worker dies, Ray kills its process group, which must not be the server's.
    os.setpgrp()
    asking.send(b"%16d" % os.getpid())
    text, streams, _, _ = socket.recv_fds(asking, 1 << 16, 3)
    while not text.endswith(b"\n"):
        text += asking.recv(1 << 16)
    asked = json.loads(text)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Those of the server were made for files of another kind.
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), line_buffering=os.isatty(1))  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), line_buffering=True, errors="backslashreplace")  # noqa: SIM115
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(asking,), daemon=True).start()
    ended = [1]
    # Functions that are registered first run last, so the program's own run before this one.
    atexit.register(lambda: asking.send(b"%16d" % ended[0]))
    try:
        _run(asked["words"])
        sys.exit(0)
    except SystemExit as end:
        ended[0] = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


def _end_with(asking: socket.socket) -> None:
    """End this process when the one that it replaces is killed."""
    if not asking.recv(1):
        os.kill(os.getpid(), signal.SIGKILL)


def _run(words: list[str]) -> None:
    """Run `python WORDS`, for a program that is a file, a module or text, perhaps with -P."""
    is_safe, words = words[0] == "-P", words[words[0] == "-P" :]
    is_module, is_text = words[0] == "-m", words[0] == "-c"
    program = words[1] if is_module or is_text else words[0]
    sys.argv[:] = words[1:] if is_module else [words[0], *words[2:]] if is_text else words
    first = str(Path(program).parent) if not (is_module or is_text) else str(Path.cwd())
    sys.path[:1] = [*([] if is_safe else [first]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    # Python does so when it starts. The server may have imported one itself, and a cluster's head has another
    # (job_server.py).
    sys.modules.pop("sitecustomize", None)
    if program.startswith("orchestrator.sources."):
        for name in [name for name in sys.modules if name.partition(".")[0] in READ_THE_ENVIRONMENT]:
            del sys.modules[name]
    importlib.import_module("sitecustomize")
    if is_text:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    elif is_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
