"""A local Ray is its run's alone: nobody else on this machine or another can reach it."""

import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from cluster import ClusterError
from cluster.local_ray import _require_loopback, private_folder

# Starts a Ray as a run does, and tells what there is to see from outside.
STARTED = """
import json, os, stat, tempfile
from pathlib import Path
import grpc
import psutil
import ray
from cluster.session import session

# Ray sets this one when it begins.
os.environ["PYTHONBREAKPOINT"] = "ray.util.rpdb._driver_set_trace"
before = dict(os.environ)
told = {}
with session(None, ()) as resources:
    @ray.remote
    def read():
        return os.environ["RAY_AUTH_MODE"], Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()

    told["mode"], told["token"] = ray.get(read.remote())
    told["variables"] = sorted(set(before.items()) ^ set(os.environ.items()))
    (folder,) = Path(tempfile.gettempdir()).iterdir()
    told["mode of the folder"] = stat.S_IMODE(folder.stat().st_mode)
    told["mode of the token"] = stat.S_IMODE((folder / "token").stat().st_mode)
    told["nodes"] = [node.address for node in resources.nodes]
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    inodes = set()
    for process in family:
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(link))
            except OSError:
                pass
    told["listening"] = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and f"socket:[{line.split()[9]}]" in inodes
    ]
    told["udp"] = [
        line.split()[1]
        for table in ("udp", "udp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if f"socket:[{line.split()[9]}]" in inodes
    ]
    # Another user of this machine, who knows where it is.
    channel = grpc.insecure_channel(ray.get_runtime_context().gcs_address)
    ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")

    def answer(*headers):
        try:
            ask(b"", timeout=60, metadata=headers)
            return "OK"
        except grpc.RpcError as error:
            return error.code().name

    told["its own"] = answer(("authorization", f"Bearer {told['token']}"))
    told["another token"] = answer(("authorization", f"Bearer {'a' * 64}"))
    told["no token"] = answer()
    told["variables"] = sorted(set(before.items()) ^ set(os.environ.items()))
told["left"] = os.listdir(tempfile.gettempdir())
told["variables after"] = sorted(set(before.items()) ^ set(os.environ.items()))
print(json.dumps(told))
"""
# 127.0.0.1, alone, in an IPv6 socket, and ::1, as /proc/net writes them.
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")


def told_by_a_ray(folder: Path, **variables: str) -> dict[str, Any]:
    home = folder / "home"
    temporary = folder / "t"
    home.mkdir()
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary)} | variables
    done = subprocess.run(
        [sys.executable, "-c", STARTED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(home.iterdir()), "Ray wrote into the home folder"
    return json.loads(done.stdout.splitlines()[-1])


def test_nobody_else_can_reach_a_local_ray() -> None:
    # Even a user who has turned authentication off for other clusters.
    with tempfile.TemporaryDirectory() as folder:  # a short path, for Ray's sockets
        told = told_by_a_ray(Path(folder), RAY_AUTH_MODE="disabled")
    assert told["mode"] == "token"
    assert len(told["token"]) == 64
    # The driver, the head, the node's manager, its agents and a worker.
    assert len(told["listening"]) >= 5
    assert {place.partition(":")[0] for place in [*told["listening"], *told["udp"]]} <= set(LOOPBACK)
    assert told["nodes"] == ["127.0.0.1"]
    assert (told["mode of the folder"], told["mode of the token"]) == (0o700, 0o600)
    assert (told["its own"], told["another token"], told["no token"]) == ("OK", "UNAUTHENTICATED", "UNAUTHENTICATED")
    assert told["variables"] == told["variables after"] == told["left"] == []


def test_each_run_has_its_own_folder_and_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with private_folder() as one, private_folder() as other:
        assert one != other
        assert {one.parent, other.parent} == {tmp_path}
        assert (one / "token").read_text() != (other / "token").read_text()
        assert stat.S_IMODE(one.stat().st_mode) == 0o700
        assert stat.S_IMODE((one / "token").stat().st_mode) == 0o600
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match=r"/none \(No such file or directory\): set RAY_TMPDIR"), private_folder():
        pytest.fail("there is no folder")


@pytest.mark.parametrize(("address", "refused"), [("127.0.0.1", False), ("::1", False), ("10.1.2.3", True)])
def test_a_ray_that_others_can_reach_is_refused(monkeypatch: pytest.MonkeyPatch, address: str, refused: bool) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeManagerAddress": address}])
    if refused:
        with pytest.raises(ClusterError, match=r"listens on 10\.1\.2\.3, where other machines can reach it"):
            _require_loopback()
    else:
        _require_loopback()
