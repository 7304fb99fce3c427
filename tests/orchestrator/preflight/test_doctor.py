"""`slimllm doctor` checks everything that a run needs, says what to fix, and changes nothing."""

import json
import re
import shutil
import socket
import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient

import cluster.session
from actors import node_state
from orchestrator.cli import main
from orchestrator.preflight import checks
from orchestrator.preflight import doctor as diagnosis
from orchestrator.sources import hub
from orchestrator.tracking import TrackingError, TrackingOptions
from orchestrator.tracking.reach import reach_store
from tests.orchestrator.tracked import TrackingServer

Usage = namedtuple("Usage", "total used free")
Doctor = Callable[..., Result]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Run the doctor in a folder of its own, with no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def invoke(*arguments: object) -> Result:
        result = CliRunner().invoke(main, ["doctor", *map(str, arguments)])
        assert isinstance(result.exception, SystemExit | None), result.exception
        assert "Traceback" not in result.output
        return result

    return invoke


def lines_of(result: Result) -> dict[str, str]:
    """Return what was said by what it is about; "" stands before what is well."""
    matches = [re.fullmatch(r"(ok|--)  ([^:]+): (.*)", line) for line in result.stdout.splitlines()]
    assert all(matches), result.stdout
    return {match[2]: ("" if match[1] == "ok" else "-- ") + match[3] for match in matches if match}


@pytest.mark.usefixtures("local_ray")
def test_without_a_model_what_needs_none_is_looked_at(doctor: Doctor, tmp_path: Path) -> None:
    result = doctor()
    assert result.exit_code == 0, result.output
    lines = lines_of(result)
    node = next(name for name in lines if name.startswith("node "))
    assert list(lines) == ["versions", "Ray", "authentication", node, "disk", "tracking", "hub"]
    assert f"torch {diagnosis.version('torch')}" in lines["versions"]
    assert lines["Ray"].endswith("of this machine, 1 node(s) with 8 CPUs and 0 GPUs")
    assert re.search(r"8 CPUs, 0 GPUs, [\d.]+ [GM]B of memory free", lines[node])
    assert "which the first run will create" in lines["tracking"]
    assert "not needed" in lines["hub"]
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("local_ray")
def test_with_a_model_what_it_needs_is_compared_with_what_is_there(
    doctor: Doctor, gqa_model: Path, tracking_uri: str, tmp_path: Path
) -> None:
    result = doctor(gqa_model, "--method", "gram", "--offload", "--tracking-uri", tracking_uri, "--workers", 2)
    assert result.exit_code == 0, result.output
    lines = lines_of(result)
    assert "llama, 3 layers of hidden size 32" in lines["model"]
    assert lines["estimate"].startswith("2 worker(s) with ")
    assert {name.partition(",")[0] for name in lines} >= {"memory", "disk", "temporary disk", "output"}
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("local_ray")
def test_what_is_to_be_mended_is_said_with_a_remedy_and_code_2(
    doctor: Doctor,
    gqa_model: Path,
    tmp_path: Path,
    free_port: tuple[int, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node_state, "free_memory", lambda device: 10_000)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    down = f"http://someone:pass@127.0.0.1:{free_port[0]}"
    result = doctor(gqa_model, "--output", "taken", "--tracking-uri", down, "--json", "--calibration", "me/data")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found["ok"] is False
    wrong = {check["name"].partition(",")[0]: check for check in found["checks"] if not check["ok"]}
    assert set(wrong) == {"memory", "disk", "tracking", "hub", "output"}
    assert "--offload" in wrong["memory"]["remedy"]
    assert "--output" in wrong["disk"]["remedy"]
    assert "HF_HUB_OFFLINE is set" in wrong["hub"]["found"]
    assert "me/data" in wrong["hub"]["remedy"]
    assert "is not empty: choose another --output" in wrong["output"]["found"]
    assert "does not answer" in wrong["tracking"]["found"]
    assert "pass@" not in result.output


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("mode", "folder", "readable"), [(0o644, 0o755, True), (0o600, 0o755, False), (0o644, 0o700, False)]
)
def test_a_token_that_others_can_read_is_told(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, mode: int, folder: int, readable: bool
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    # Everyone may enter this one's parents, unlike those of tmp_path.
    with tempfile.TemporaryDirectory() as home:
        token = Path(home, ".ray", "auth_token")
        token.parent.mkdir()
        token.write_text("a" * 64)
        token.chmod(mode)
        token.parent.chmod(0o755)
        Path(home).chmod(folder)
        for name, value in {"HOME": home, "RAY_AUTH_TOKEN_PATH": str(token)}.items():
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                result = doctor()
            line = lines_of(result)["authentication"]
            assert (result.exit_code, line.startswith(f"-- others can read {token}")) == (2 * readable, readable), line


@pytest.mark.usefixtures("local_ray")
def test_authentication_that_is_off_is_told(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(doctor())["authentication"] == "Ray asks for a token"
    monkeypatch.setattr(diagnosis, "asks_for_token", lambda: False)
    assert lines_of(doctor())["authentication"].startswith("off: whoever can reach the Ray at this address runs code")


@pytest.mark.usefixtures("local_ray")
def test_more_workers_than_there_are(doctor: Doctor, gqa_model: Path) -> None:
    result = doctor(gqa_model, "--workers", 9)
    lines = lines_of(result)
    assert (result.exit_code, [name for name in lines if lines[name].startswith("-- ")]) == (2, ["workers"])
    assert "has room for 8" in lines["workers"]


def test_a_ray_that_does_not_answer_and_a_broken_model(
    doctor: Doctor, gqa_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.session.ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = f"127.0.0.1:{taken.getsockname()[1]}"
    lines = lines_of(doctor(gqa_model, "--address", free))
    assert lines["Ray"].startswith(f"-- no Ray answers at {free}")
    assert "free in" in lines["disk"]
    broken = tmp_path / "broken"
    shutil.copytree(gqa_model, broken)
    (broken / "config.json").write_text("{")
    lines = lines_of(doctor(broken, "--address", "nonsense"))
    assert lines["model"].startswith("-- ")
    assert "is not valid JSON" in lines["model"]
    assert "is not host:port" in lines["Ray"]
    assert "output" not in lines


@pytest.mark.usefixtures("local_ray")
def test_what_the_doctor_stumbles_over_is_a_line_too(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*arguments: object) -> None:
        raise RuntimeError("the floor\nis uneven")

    for module, name, line in (
        (diagnosis, "requires", "versions"),
        (diagnosis, "inspect_cluster", "Ray"),
        (diagnosis, "reach_store", "tracking"),
        (hub, "reach_hub", "hub"),
    ):
        with monkeypatch.context() as context:
            context.setattr(module, name, stumble)
            result = doctor()
        said = [one for one in result.stdout.splitlines() if one.startswith(f"--  {line}: ")]
        assert (result.exit_code, len(said)) == (2, 1), result.output
        assert "RuntimeError: the floor" in said[0]


def test_versions_that_do_not_fit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=99", "no-such-package>=1", "numpy>=1", "gguf>=99; extra == 'gguf'"]
    monkeypatch.setattr(diagnosis, "requires", {"slimllm-prune": needs}.__getitem__)
    check = diagnosis.check_versions()
    assert (check.ok, check.remedy) == (False, "install torch>=99, no-such-package>=1")


def test_where_the_package_is_not_installed_the_versions_are_told_and_not_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Ray job carries the code, and the cluster's Python has no metadata of it."""
    monkeypatch.setattr(diagnosis, "DISTRIBUTION", "no-such-package")
    check = diagnosis.check_versions()
    assert (check.ok, check.remedy) == (True, "")
    assert f"torch {diagnosis.version('torch')}" in check.found
    assert check.found.endswith("; no-such-package is not installed, so nothing says which versions fit")


# ---- Where runs are logged


def test_a_server_that_answers_is_left_as_it_is(server: TrackingServer) -> None:
    client = MlflowClient(server.address)
    before = [one.name for one in client.search_experiments()]
    assert reach_store(TrackingOptions(tracking_uri=server.address, experiment="none yet")).endswith(" answers")
    assert [one.name for one in client.search_experiments()] == before


def test_a_store_in_a_file_is_tried_and_left_as_it_is(other_store: Path, tmp_path: Path) -> None:
    path = other_store / "mlflow.db"
    before = path.read_bytes()
    assert "which can be written" in reach_store(TrackingOptions(tracking_uri=f"sqlite:///{path}"))
    assert path.read_bytes() == before
    (tmp_path / "garbage.db").write_bytes(b"no database, and long enough to tell" * 100)
    (tmp_path / "file").touch()
    for name, said in {"garbage.db": "not a database", "file/mlflow.db": "is not a writable folder"}.items():
        with pytest.raises(TrackingError, match=said):
            reach_store(TrackingOptions(tracking_uri=f"sqlite:///{tmp_path}/{name}"))
    with pytest.raises(TrackingError, match="does not answer"):
        reach_store(TrackingOptions(tracking_uri="postgresql://127.0.0.1:1/mlflow"))
