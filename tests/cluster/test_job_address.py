"""A job server's address comes in the forms that Ray's commands take, and an error names where it came from."""

import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from cluster import ClusterError, job_address, job_client
from cluster.job_address import find_address
from cluster.jobs import JobServer

# The first bytes of a head's port: it speaks HTTP/2, as gRPC does.
OF_A_HEAD = bytes.fromhex("000018040000000000000400400000")
OF_A_SERVER = b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_client, "REFUSING_SECONDS", 0.1)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """Listen at a port and answer everybody with these bytes; the address."""
    servers = []

    def answer(begins: bytes) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(begins)

        threading.Thread(target=accept, daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    yield answer
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def test_the_option_counts_before_the_variables_and_rays_first_variable_before_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def named(given: str | None = None) -> tuple[str, str | None]:
        found = find_address(given)
        return found.address, found.named_by

    assert named() == ("http://127.0.0.1:8265", None)
    monkeypatch.setenv("RAY_ADDRESS", "http://one:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    assert named() == ("http://one:1", "RAY_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://two:2")
    assert named() == ("https://two:2", "RAY_API_SERVER_ADDRESS")
    assert named("http://three:3") == ("http://three:3", "--address")


def test_an_address_without_a_scheme_is_that_of_a_head_or_of_a_job_server(
    answering: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(job_address, "require_answer", lambda *named: asked.append(named))
    server, head = answering(OF_A_SERVER), answering(OF_A_HEAD)
    assert find_address(server).address == f"http://{server}"
    assert asked == []
    monkeypatch.setenv("RAY_ADDRESS", head)
    assert find_address(None).address == head
    assert asked == [(head, "RAY_ADDRESS")]


def test_auto_is_the_ray_of_this_machine_whatever_the_other_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(job_address, "require_answer", lambda *named: asked.append(named))

    def found() -> str:
        assert not os.environ["RAY_ADDRESS"], "Ray would take it before auto"
        return "10.1.2.3:6379"

    monkeypatch.setattr(job_address, "find_local_head", found)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert find_address("auto").address == "10.1.2.3:6379"
    assert asked == [("10.1.2.3:6379", "--address")]
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1"


def test_auto_where_no_ray_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(job_address, "find_local_head", find)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ClusterError, match=r"^RAY_ADDRESS is 'auto', and no Ray runs on this machine: pass .*:8265$"):
        find_address(None)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "local",
            "^NAME is 'local', a new Ray, and a job needs one that runs: pass the cluster's job server as --addr",
        ),
        ("127.0.0.1:1", "^no Ray job server answers at http://127.0.0.1:1: check NAME.*, and make sure that the head"),
        ("http://127.0.0.1:1", "^no Ray job server answers at http://127.0.0.1:1: check NAME"),
        ("127.0.0.1:99999", "http://127.0.0.1:99999.*check NAME|refused: .*99999"),
        ("ray://127.0.0.1:1", "^no Ray answers at ray://127.0.0.1:1 .*NAME"),
        ("ray://head", "^NAME 'ray://head' is not host:port"),
    ],
)
@pytest.mark.parametrize("name", ["--address", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_an_error_names_the_option_or_variable_that_gave_the_address(
    monkeypatch: pytest.MonkeyPatch, address: str, said: str, name: str
) -> None:
    if name.startswith("RAY"):
        monkeypatch.setenv(name, address)
    with pytest.raises(ClusterError, match=said.replace("NAME", name)) as error:
        JobServer(address if name == "--address" else None)
    assert len(str(error.value).splitlines()) == 1


def test_a_server_that_is_no_job_server_is_told_with_where_it_is_named(
    answering: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address := answering(OF_A_SERVER))
    with pytest.raises(
        ClusterError, match=f"^the server at http://{address} is not a Ray job server: check RAY_ADDRESS"
    ):
        JobServer()
