"""Finds a cluster's job server from what a user gives: the forms that Ray's own commands take, and its variables."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.ray_private import find_local_head
from cluster.session import ADDRESS_OPTION, ADDRESS_VARIABLE, CONNECT_SECONDS, NEW, require_answer

# Ray's own client reads it before anything else, and RAY_ADDRESS if it is missing.
SERVER_VARIABLE = "RAY_API_SERVER_ADDRESS"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# How an answer in HTTP begins.
HTTP = b"HTTP/"
PASS_ANOTHER = "pass the cluster's job server as --address, such as http://HEAD:8265"


@dataclass(frozen=True)
class JobAddress:
    """An address, and the option or variable that names it; None for the default."""

    address: str
    named_by: str | None

    @property
    def remedy(self) -> str:
        """What to do if the address is wrong."""
        if self.named_by is None:
            return PASS_ANOTHER
        return "check --address" if self.named_by == ADDRESS_OPTION else f"check {self.named_by}, which names it"


def find_address(given: str | None) -> JobAddress:
    """Return the address of a job server, or of a head that Ray can ask for its own.

    Args:
        given: "http://host:port" of a job server, "host:port" of a job server or of a head, "ray://host:port" of a
            head, "auto" for the Ray of this machine, or None for Ray's variables, or else this machine's job server.

    Raises:
        ClusterError: No Ray answers there, or a new Ray is asked for.
    """
    if given is not None:
        found = JobAddress(given, ADDRESS_OPTION)
    else:
        named = ((os.environ.get(name), name) for name in (SERVER_VARIABLE, ADDRESS_VARIABLE))
        found = next((JobAddress(value, name) for value, name in named if value), JobAddress(DEFAULT_ADDRESS, None))
    return JobAddress(_checked(found.address, found.named_by), found.named_by)


def _checked(address: str, named_by: str | None) -> str:
    """Return the address with its scheme, or a head's address once the head answers; Ray would wait minutes for it."""
    if named_by is None or address.startswith(("http://", "https://")):
        return address
    if address == NEW:
        raise ClusterError(f"{named_by} is {NEW!r}, a new Ray, and a job needs one that runs: {PASS_ANOTHER}")
    if address == "auto":
        address = _head_of_this_machine(named_by)
    elif "://" not in address and not _is_head(address):
        return f"http://{address}"
    require_answer(address, named_by)
    return address


def _head_of_this_machine(named_by: str) -> str:
    # Ray takes this variable before the address that it is given.
    with variable_set(ADDRESS_VARIABLE, ""):
        try:
            found = find_local_head()
        except ConnectionError:
            found = None
    if found is None:
        raise ClusterError(f"{named_by} is 'auto', and no Ray runs on this machine: {PASS_ANOTHER}")
    return found


def _is_head(address: str) -> bool:
    """Return whether what answers there does not speak HTTP, as the port of a head."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS) as connection:
            connection.sendall(b"GET /api/version HTTP/1.0\r\n\r\n")
            begins = connection.recv(len(HTTP))
    except (OSError, ValueError, OverflowError):
        return False
    return begins not in (b"", HTTP)


@contextmanager
def variable_set(name: str, value: str) -> Iterator[None]:
    """Set a variable while the block runs: Ray reads the address from it, even if it is given another."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
