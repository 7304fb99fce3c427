"""Opens a Ray session: a local Ray (local_ray.py), or a connection to a cluster. Importing it imports Ray."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ray

from cluster.driver_paths import paths_of_a_cluster, paths_of_a_new_ray
from cluster.errors import ClusterError
from cluster.inside_job import carries_packages
from cluster.local_ray import local_ray
from cluster.ray_private import HEALTH_CHECK
from cluster.resources import Node, Resources
from cluster.signals import sigterm_handler_kept
from cluster.sockets import require_room_for_sockets

CONNECT_SECONDS = 10.0
HEALTH_SECONDS = 30.0
AS_THE_CLUSTER = "check {}, and that RAY_AUTH_MODE and the versions of Ray and Python are those of the cluster"
ADDRESS_OPTION, ADDRESS_VARIABLE = "--address", "RAY_ADDRESS"
# Ray's word for a new Ray on this machine.
NEW = "local"


@contextmanager
def session(address: str | None, packages: Sequence[ModuleType], *, verbose: bool = False) -> Iterator[Resources]:
    """Connect to the Ray at `address`, or start a local one, for as long as the context lasts.

    If the program is already connected, this uses that connection and leaves it open.

    Args:
        address: "host:port" of a cluster's head, "auto", "local" for a new Ray on this machine, or None for RAY_ADDRESS
            (in a job, its own cluster) or else a local Ray.
        packages: Packages that the workers import. A cluster receives them, unless this job already brings them.
        verbose: Whether to print the logs of Ray and the workers.

    Raises:
        ClusterError: Nothing answers at the address, the program is connected to another one, or Ray's files have no
            place here.
    """
    if ray.is_initialized():
        _require_connected_to(address)
        yield read_resources()
        return
    named_by = ADDRESS_OPTION if address else ADDRESS_VARIABLE
    address = _resolve(address)
    if address == NEW:
        require_room_for_sockets()
        with local_ray(job_config=paths_of_a_new_ray(Path(__file__).parents[1]), **_logging(verbose)):
            yield read_resources()
        return
    require_answer(address, named_by)
    try:
        with sigterm_handler_kept():
            _connect(address, named_by, packages, verbose)
        yield read_resources()
    finally:
        ray.shutdown()


def starts_a_ray(address: str | None) -> bool:
    """Return whether a session with this address starts a Ray on this machine."""
    return not ray.is_initialized() and _resolve(address) == NEW


def _resolve(address: str | None) -> str:
    return address or os.environ.get(ADDRESS_VARIABLE) or NEW


def _connect(address: str, named_by: str, packages: Sequence[ModuleType], verbose: bool) -> None:
    # Ray refuses a field that the job's own environment already sets.
    runtime_env = {} if carries_packages() else {"py_modules": _folders(packages)}
    try:
        ray.init(address, runtime_env=runtime_env, **paths_of_a_cluster(address), **_logging(verbose))
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(
            f"the Ray at {address} cannot be used: {reason}; {AS_THE_CLUSTER.format(named_by)}"
        ) from error


def _logging(verbose: bool) -> dict[str, Any]:
    return {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}


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


def require_answer(address: str, named_by: str = ADDRESS_OPTION) -> None:
    """Check that a Ray answers at an address, because Ray itself would wait for minutes.

    Args:
        address: The address to ask.
        named_by: The option or variable that named it, for messages.

    Raises:
        ClusterError: Nothing answers there, it is not Ray or its job server, or it denies access.
    """
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{named_by} {address!r} is a job server, for `slimllm submit`: to connect, pass the head's host:port"
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        if address == "auto":
            return
        raise ClusterError(
            f"{named_by} {address!r} is not host:port, nor auto, nor local: pass the address of the head node"
        )
    without = "leave --address out" if named_by == ADDRESS_OPTION else f"unset {named_by}, which names it"
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ClusterError(
            f"no Ray answers at {address} ({error}): start one there with `ray start --head`, or {without}"
        ) from error
    if not address.startswith("ray://"):
        _require_healthy(address, named_by)


def _require_healthy(address: str, named_by: str) -> None:
    """Check that Ray is what answers, and that it grants access.

    A child process asks, because Ray's client complains on stderr every second until it gives up.
    """
    command = [sys.executable, "-P", "-c", HEALTH_CHECK, address]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=HEALTH_SECONDS, check=False)
        found = (answer.stdout + answer.stderr).strip().splitlines() or ["unhealthy"]
        healthy, reason = answer.returncode == 0, found[-1].partition(" Note: ")[0]
    except subprocess.TimeoutExpired:
        healthy, reason = False, f"no answer within {HEALTH_SECONDS:.0f} s"
    if not healthy:
        raise ClusterError(
            f"what answers at {address} is not a Ray that we can use ({reason}); {AS_THE_CLUSTER.format(named_by)}"
        )


def read_resources() -> Resources:
    """Return the resources of the cluster that this program is connected to."""
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
