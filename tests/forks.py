"""Starts a Python process with the needed packages imported, and runs each program in a fork of it.

Importing torch, transformers and Ray takes seconds, even on an idle machine. A fork has them already, and leaves
nothing behind for the next program.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# Reads one program a line, as JSON, and answers each with a line.
SERVER = """
import json, os, signal, sys, tempfile, threading, traceback

def run(asked):
    os.chdir(asked["folder"])
    os.environ.update(asked["environment"])
    signal.alarm(asked["seconds"])
    try:
        exec(compile(asked["program"], "<forked>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

def fork(asked, *streams):
    if (child := os.fork()) == 0:
        # A group of its own gets the signals of a terminal, and hears Ctrl-C even if the tests are deaf to it.
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream.fileno(), number)
        code = run(asked)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child

def start(asked):
    with open(os.devnull) as nobody, open(asked["out"], "w") as out, open(asked["err"], "w") as err:
        child = fork(asked, nobody, out, err)
    # Whoever waits for it is not its parent, and would wait for a zombie.
    threading.Thread(target=reap, args=(child, asked["code"]), daemon=True).start()
    return child

def reap(child, path):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(path + ".partial", "w") as file:
        file.write(str(code))
    os.rename(path + ".partial", path)

def finish(asked):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nobody:
        child = fork(asked, nobody, out, err)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
        return [code, *texts]

for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps(finish(asked) if asked["seconds"] else start(asked)), flush=True)
"""

# What runs, and an MLflow server, import sooner or later, which takes seconds.
RUN_IMPORTS = """
import gc
import alembic.command, git, grpc, matplotlib.backends.backend_agg, matplotlib.figure
import pyarrow.json, pyarrow.pandas_compat, sqlalchemy.dialects.sqlite
import ray.dashboard.optional_deps, transformers.models.llama.modeling_llama
import mlflow, mlflow.server, mlflow.server.handlers, mlflow.store.tracking.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_workspace_store, mlflow.system_metrics.system_metrics_monitor
import actors.local, actors.ray_workers, cluster.session
import orchestrator.cli, orchestrator.cli.summary, orchestrator.pipeline
import slimllm_ops.models.pruned.pruned_llama
# The garbage collector leaves all of this alone in the forks.
gc.freeze()
"""


def slimllm(*words: object) -> str:
    """Return the program that the command line runs for these words."""
    given = ["slimllm", *map(str, words)]
    return f"import sys; sys.argv[:] = {given!r}; from orchestrator.cli import main; main()"


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


class Started:
    """A program that runs in a fork."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.process = psutil.Process(pid)
        self._folder = folder

    def wait(self, seconds: int = 180) -> Ended:
        """Wait for its end, and return that."""
        code, deadline = self._folder / "code", time.monotonic() + seconds
        while not code.exists():
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.02)
        return Ended(int(code.read_text()), *self.printed())

    def printed(self) -> tuple[str, str]:
        """Return its stdout and stderr so far."""
        return (self._folder / "out").read_text(), (self._folder / "err").read_text()


class Forks:
    """Programs in forks of one process, which starts with the first of them.

    Args:
        imports: Python source that runs before the first fork.
        environment: All variables of the process.
        folder: Its working directory.
        isolated: Whether neither PYTHONPATH nor the working directory is searched for modules.
    """

    def __init__(self, imports: str, environment: dict[str, str], folder: Path, *, isolated: bool = False) -> None:
        self._command = [sys.executable, *["-I"] * isolated, "-c", imports + SERVER]
        self._environment, self._folder = environment, folder
        self._process: subprocess.Popen[str] | None = None

    def run(self, program: str, folder: Path | None = None, seconds: int = 180, **environment: str) -> Ended:
        """Run a program to its end, with nobody to ask.

        Args:
            program: Python source.
            folder: Its working directory, by default that of the process.
            seconds: It is killed after that.
            environment: More variables.
        """
        return Ended(*self._ask(program, folder, seconds, environment))

    def start(self, program: str, folder: Path | None = None, **environment: str) -> Started:
        """Start a program in a session of its own; whoever starts it waits for it or ends it."""
        files = Path(tempfile.mkdtemp(dir=self._folder))
        places = {name: str(files / name) for name in ("out", "err", "code")}
        return Started(self._ask(program, folder, 0, environment, **places), files)

    def _ask(self, program: str, folder: Path | None, seconds: int, environment: dict[str, str], **places: str) -> Any:
        process = self._process = self._process or self._begin()
        assert process.stdin is not None
        assert process.stdout is not None
        where = str(folder or self._folder)
        asked = {"program": program, "folder": where, "seconds": seconds, "environment": environment} | places
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the process that runs programs has ended: {process.wait(timeout=60)}"
        return json.loads(answer)

    def _begin(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self._command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=60)
