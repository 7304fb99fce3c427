"""Opens a Ray session: a local Ray sized to the machine, or a connection to a cluster. Importing it imports Ray."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ray

from cluster.errors import ClusterError
from cluster.inside_job import carries_packages
from cluster.resources import Node, Resources

CONNECT_SECONDS = 10.0
# Settings of a local Ray. If all CPUs are taken, as in a run, Ray ends an idle process after one second. Then almost
# every solve would wait for a new process to start and import torch.
LOCAL_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_idle_worker_killing_time_threshold_ms": "60000"}
HEALTH_SECONDS = 30.0
AS_THE_CLUSTER = "check --address, and that RAY_AUTH_MODE and the versions of Ray and Python are those of the cluster"


@contextmanager
def session(address: str | None, packages: Sequence[ModuleType], *, verbose: bool = False) -> Iterator[Resources]:
    """Connect to the Ray at `address`, or start a local one, for as long as the context lasts.

    If the program is already connected, this uses that connection and leaves it open.

    Args:
        address: "host:port" of a cluster's head, "auto", or None for RAY_ADDRESS (in a job, its own cluster) or else a
            local Ray.
        packages: Packages that the workers import. A cluster receives them, unless this job already brings them.
        verbose: Whether to print the logs of Ray and the workers.

    Raises:
        ClusterError: Nothing answers at the address, or the program is connected to another one.
    """
    if ray.is_initialized():
        _require_connected_to(address)
        yield _resources()
        return
    address = address or os.environ.get("RAY_ADDRESS")
    logging: dict[str, Any] = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    if address is None:
        for name, value in LOCAL_RAY.items():
            os.environ.setdefault(name, value)
        with _sigterm_handler_kept():
            # "local" starts a new Ray, while None would join the one that last ran on this machine.
            ray.init("local", include_dashboard=False, **logging)
    else:
        require_answer(address)
        # Ray refuses a field that the job's own environment already sets.
        runtime_env = {} if carries_packages() else {"py_modules": _folders(packages)}
        try:
            with _sigterm_handler_kept():
                ray.init(address, runtime_env=runtime_env, **logging)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ClusterError(f"the Ray at {address} cannot be used: {reason}; {AS_THE_CLUSTER}") from error
    try:
        yield _resources()
    finally:
        ray.shutdown()


def _folders(packages: Sequence[ModuleType]) -> list[str]:
    """Return the folders of packages. Inside a job, Ray deep-copies its environment, and modules cannot be copied."""
    return [str(Path(package.__path__[0])) for package in packages]


def _require_connected_to(address: str | None) -> None:
    connected = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", connected):
        raise ClusterError(
            f"the address {address} was asked for, but this program is already connected to the Ray at {connected}: "
            f"leave the address out, or call ray.shutdown() first"
        )


@contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """Keep the program's own SIGTERM handler, which `ray.init` replaces with one that ends the process at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler):
            signal.signal(signal.SIGTERM, handler)


def require_answer(address: str) -> None:
    """Check that a Ray answers at an address, because Ray itself would wait for minutes.

    Raises:
        ClusterError: Nothing answers there, it is not Ray, or it denies access.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        if address == "auto":
            return
        raise ClusterError(f"--address {address!r} is not host:port, nor auto: pass the address of the head node")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray answers at {address} ({error}): start one there with `ray start --head`, or leave --address out"
        ) from error
    if not address.startswith("ray://"):
        _require_healthy(address)


def _require_healthy(address: str) -> None:
    """Check that Ray is what answers, and that it grants access.

    A child process asks, because Ray's client complains on stderr every second until it gives up.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=HEALTH_SECONDS, check=False)
        found = (answer.stdout + answer.stderr).strip().splitlines() or ["unhealthy"]
        healthy, reason = answer.returncode == 0, found[-1].partition(" Note: ")[0]
    except subprocess.TimeoutExpired:
        healthy, reason = False, f"no answer within {HEALTH_SECONDS:.0f} s"
    if not healthy:
        raise ClusterError(f"what answers at {address} is not a Ray that we can use ({reason}); {AS_THE_CLUSTER}")


def _resources() -> Resources:
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = tuple(
        Node(
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
            node["NodeID"],
            node["NodeManagerAddress"],
            here=node["NodeID"] == ray.get_runtime_context().get_node_id(),
        )
        for node in alive
    )
    return Resources(nodes, local=all(node.here for node in nodes))
