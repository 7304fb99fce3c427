"""Where the sockets of a local Ray fit."""

import os
import time
from pathlib import Path

import pytest
from ray._common.utils import get_default_ray_temp_dir
from ray._private.utils import validate_socket_filepath

from cluster import ClusterError
from cluster.sockets import require_room_for_sockets
from orchestrator.config import PruneConfig
from orchestrator.pipeline import calibrate, prune


def ray_refuses() -> bool:
    """Return whether Ray would refuse its own socket in the folder that it chooses."""
    session = f"session_{time.strftime('%Y-%m-%d_%H-%M-%S')}_123456_{os.getpid()}"
    try:
        place = Path(get_default_ray_temp_dir()).parent / "ray-abcdefgh" / "ray"
        validate_socket_filepath(str(place / session / "sockets" / "plasma_store"))
    except OSError:
        return True
    return False


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_path_that_ray_refuses_is_refused_and_no_other(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(other, raising=False)
    seen = set()
    for length in range(20, 60):
        monkeypatch.setenv(name, "/tmp/" + "é" + "x" * length)
        seen.add(refused := ray_refuses())
        if refused:
            with pytest.raises(ClusterError, match=f"^{name} is .* bytes too long: set RAY_TMPDIR to a folder"):
                require_room_for_sockets()
        else:
            require_room_for_sockets()
    assert seen == {True, False}


@pytest.mark.parametrize("run", [prune, calibrate])
def test_it_is_refused_before_anything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: object) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", f"/tmp/{'x' * 100}")
    with pytest.raises(ClusterError, match="set RAY_TMPDIR"):
        run(PruneConfig(model="nowhere/at/all"))  # type: ignore[operator]
    assert not list(tmp_path.iterdir())
