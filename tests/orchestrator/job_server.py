"""Helpers for tests of jobs: a cluster head with a token, a terminal to type in, and a proxy that can be cut off."""

import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.version import DISTRIBUTION
from tests.forked_workers.server import FOLDER
from tests.forks import Forks, Started, slimllm
from tests.ports import free_ports
from tests.ray_head import SECONDS, ray_head

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
RAY_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
# What a command that speaks to a job server imports: seconds, once for all commands.
CLIENT = """
import aiohttp, requests, ray.job_submission
import cluster.jobs, orchestrator.cli
"""
# The cluster's Python has what slimllm needs and not slimllm, as a cluster's image has.
WITHOUT_SLIMLLM = """
import importlib.metadata, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "slimllm" not in getattr(finder, "__module__", "")]
distribution = importlib.metadata.distribution
def distribution_of_others(name):
    if name == "DISTRIBUTION":
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)
importlib.metadata.distribution = distribution_of_others
""".replace("DISTRIBUTION", DISTRIBUTION)
# Python imports only one module of this name, so the head's runs the other one (tests/forked_workers).
THEN_ASK_FOR_A_FORK = f"import runpy; runpy.run_path({str(FOLDER / 'sitecustomize.py')!r})"


def plain_environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in RAY_VARIABLES}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return environment | {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Head:
    """A cluster's head in processes of its own."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    port: int
    # Where nodes and programs connect to, and where Ray's clients do.
    head_port: int
    client_port: int
    environment: dict[str, str]
    client: Forks

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *words: object) -> "subprocess.Popen[str]":
        """Start a command of slimllm in a process that imports Ray anew, as a client with the cluster's token."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        command = [str(BIN / "slimllm"), *map(str, words)]
        return subprocess.Popen(command, env=self.environment, text=True, start_new_session=True, **streams)

    def fork(self, *words: object, first: str = "") -> Started:
        """Start a command in a fork, which has a session of its own; `first` is a program that runs before it."""
        return self.client.start(f"{first}\n{slimllm(*words)}")

    def run(self, *words: object, code: int = 0, **environment: str) -> tuple[str, str]:
        """Run a command to its end, in a fork with more variables; return what it said on stdout and on stderr."""
        ended = self.client.run(slimllm(*words), seconds=SECONDS, **environment)
        assert ended.code == code, ended.stdout + ended.stderr
        return ended.stdout, ended.stderr

    def state(self, job_id: str) -> dict[str, Any]:
        listed, _ = self.run("jobs", "list", "--json")
        (state,) = [job for job in json.loads(listed) if job["job_id"] == job_id]
        return state

    def log_file(self, job_id: str) -> Path:
        return self.folder / "session_latest" / "logs" / f"job-driver-{job_id}.log"

    def driver(self, output: Path) -> psutil.Process:
        """The process of the job that writes this output: a fork (tests/forked_workers)."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            # A worker of Ray starts it, and workers are forks: it does not descend from the head.
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if process.cmdline()[1:4] == ["-P", "-m", "orchestrator"] and str(output) in process.cmdline():
                        fork = Path(f"{os.environ['SLIMLLM_FORKED_WORKERS']}-{process.pid}")
                        if fork.exists() and fork.read_text():
                            return psutil.Process(int(fork.read_text()))
            time.sleep(0.05)
        raise AssertionError(f"no job writes {output}")

    def frozen(self, output: Path, is_time: Callable[[], bool]) -> psutil.Process:
        """The process of a job, stopped at a time of its life, so that it is neither done nor further on."""
        driver = self.driver(output)
        wait_for(is_time)
        driver.suspend()
        return driver


def thaw_when_told_to_end(driver: psutil.Process) -> None:
    """Let a frozen process go on when SIGTERM waits for it."""
    status = Path(f"/proc/{driver.pid}/status")
    told = 1 << (signal.SIGTERM - 1)
    wait_for(lambda: bool(int(status.read_text().partition("ShdPnd:")[2].split()[0], 16) & told))
    driver.resume()


def wait_for(is_time: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_time():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def started_head(folder: Path) -> Iterator[Head]:
    """A cluster's head for as long as the context lasts; its token and its own log lie in the folder."""
    (folder / "token").write_text("0123456789abcdef" * 4)
    (folder / "python").mkdir()
    (folder / "python" / "sitecustomize.py").write_text(WITHOUT_SLIMLLM + THEN_ASK_FOR_A_FORK)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    of_head = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(folder / "python")}
    there = plain_environment() | token | of_head
    travelled = subprocess.run(["python", "-c", "import orchestrator"], env=there, cwd=folder, capture_output=True)
    assert b"ModuleNotFoundError" in travelled.stderr
    # A job is sent to the agent of its node by this port: two clusters on one machine must not share it.
    ports = free_ports(6)
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("metrics-export-port", "ray-client-server-port")
    # Ray's sockets lie in it, and their paths must be short.
    with_short_path = Path(tempfile.mkdtemp(prefix="slimllm-", dir="/tmp"))
    options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    options += ["--num-cpus=4", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    try:
        with ray_head(*options, f"--temp-dir={with_short_path}", folder=folder, environment=there) as process:
            here = plain_environment() | token | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
            client = Forks(CLIENT, here | {"PYTHONPATH": str(ROOT)}, folder)
            try:
                yield Head(process, with_short_path, ports[1], ports[0], ports[5], here, client)
            finally:
                client.close()
    finally:
        shutil.rmtree(with_short_path, ignore_errors=True)


# The first terminal that the leader of a session opens is its own.
READY = "ready"
ON_A_TERMINAL = f"""
import os, sys
for number in range(3):
    os.dup2(os.open({{!r}}, os.O_RDWR), number)
sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)
print("{READY}", flush=True)
"""


class Terminal:
    """A command on a terminal, to read from and to type at."""

    def __init__(self, head: Head, *words: object) -> None:
        self._end, its_end = pty.openpty()
        self._read = ""
        self.started = head.fork(*words, first=ON_A_TERMINAL.format(os.ttyname(its_end)))
        self.read_to(READY)
        os.close(its_end)

    def type(self, text: str) -> None:
        """Type a text once the command waits for it: Python's readline misses a Ctrl-C that comes before."""
        wait_for(lambda: self.started.process.status() == psutil.STATUS_SLEEPING)
        os.write(self._end, text.encode())

    def read_to(self, text: str) -> str:
        """Wait until it shows a text; return all up to there."""
        deadline = time.monotonic() + SECONDS
        while text not in self._read:
            assert time.monotonic() < deadline, self._read
            if select.select([self._end], [], [], 0.2)[0]:
                try:
                    self._read += os.read(self._end, 1 << 16).decode()
                except OSError as error:
                    raise AssertionError(self._read) from error
        shown, _, self._read = self._read.partition(text)
        return shown + text

    def end(self) -> int:
        """Wait for the command's end; return its exit code."""
        code = self.started.wait(SECONDS).code
        os.close(self._end)
        return code


class Proxy:
    """What may stand before a job server: it passes everything on, until its connections are cut or it is closed."""

    def __init__(self, port: int) -> None:
        self._behind, self._pairs = port, []  # type: int, list[socket.socket]
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                behind = socket.create_connection(("127.0.0.1", self._behind))
                self._pairs += [client, behind]
                for source, sink in ((client, behind), (behind, client)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for one in self._pairs:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
