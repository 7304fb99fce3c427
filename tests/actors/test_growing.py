"""A cluster that scales itself is asked for the workers of a run; one that does not refuses at once."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from actors import growing
from cluster import Node, Resources, WorkerPlan, find_lacking
from tests.actors.scaling_cluster import scaling_cluster
from tests.forks import Ended, Forks, slimllm

ROOT = Path(__file__).parents[2]
IMPORTS = """
import ray, orchestrator.cli, orchestrator.pipeline, actors.growing, actors.ray_workers, actors.serving
"""
# What the cluster is still asked for, by either version of the autoscaler.
REQUESTS = """
import json, ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from actors.ray_private import cluster_status
ray.init({address!r}, logging_level="ERROR")
first = json.loads(internal_kv_get_gcs_client().internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")
constraints = cluster_status().cluster_resource_state.cluster_resource_constraints
print(len(first) + sum(one.count for each in constraints for one in each.resource_requests))
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": path}
    forks = Forks(IMPORTS, environment, tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


def prune(forks: Forks, address: str, model: Path, tokens: Path, output: Path, workers: int) -> Ended:
    words = ("prune", model, "--calibration", tokens, "--address", address, "--workers", workers, "--output", output)
    return forks.run(slimllm(*words, "--tracking-uri", "none", "--json"))


def requests(forks: Forks, address: str) -> int:
    ended = forks.run(REQUESTS.format(address=address))
    assert ended.code == 0, ended.stderr
    return int(ended.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("second", [False, True], ids=["v1", "v2"])
def test_a_cluster_without_workers_grows_to_what_a_run_needs(
    forks: Forks, gqa_model: Path, token_file: Path, tmp_path: Path, *, second: bool
) -> None:
    with scaling_cluster(second=second, cpus=2, at_most=2) as address:
        given: Any = (forks, address, gqa_model, token_file, tmp_path / "out")
        if second:
            # More than it can ever have; the first version does not say so, and is given a minute.
            refused = prune(*given, workers=9)
            assert refused.code == 2, refused.stderr
            error = json.loads(refused.stdout)["error"]
            assert error.startswith("9 workers of 0 GPUs were asked for, the cluster has room for 0: 1 node(s)")
            assert list(tmp_path.iterdir()) == []
            assert requests(forks, address) == 0
        done = prune(*given, workers=3)
        assert done.code == 0, done.stderr
        assert "the cluster is asked to grow, for 3 times 1 CPU: waiting for up to 900 s" in done.stderr
        assert (tmp_path / "out" / "config.json").is_file()
        assert requests(forks, address) == 0


@pytest.mark.slow
@pytest.mark.parametrize("second", [False, True], ids=["v1", "v2"])
def test_a_cluster_that_was_started_by_hand_is_refused_at_once(
    forks: Forks, gqa_model: Path, token_file: Path, tmp_path: Path, *, second: bool
) -> None:
    with scaling_cluster(second=second, alone=True) as address:
        refused = prune(forks, address, gqa_model, token_file, tmp_path / "out", workers=1)
        assert refused.code == 2, refused.stderr
        assert "1 workers of 0 GPUs were asked for, the cluster has room for 0" in refused.stderr
        assert ("asked to grow" in refused.stderr) == second
        assert list(tmp_path.iterdir()) == []
        assert requests(forks, address) == 0


@pytest.mark.usefixtures("local_ray")
def test_what_scales_nothing_is_not_asked_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        pytest.fail("it was asked to grow")

    monkeypatch.setattr(growing, "request_resources", fail)
    # The autoscaler of a Ray that has just started says nothing for a few seconds.
    report, silent = growing._first_outlook, iter([True, True])
    monkeypatch.setattr(growing, "_first_outlook", lambda: None if next(silent, False) else report())
    monkeypatch.setattr(growing, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(growing, "SILENT_SECONDS", 60.0)
    with growing.grown(lambda: [{"CPU": 9.0}], pytest.fail):
        pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What an autoscaler is asked for, without one: None stands for a request that is withdrawn."""
    requests: list[object] = []
    monkeypatch.setattr(growing, "request_resources", lambda bundles=None: requests.append(bundles))
    monkeypatch.setattr(growing, "_version", lambda: 0)
    monkeypatch.setattr(growing, "POLL_SECONDS", 0.01)
    return requests


STARTING, IDLE = growing.Outlook(starting=True, hopeless=False), growing.Outlook(starting=False, hopeless=False)


@pytest.mark.usefixtures("local_ray")
def test_the_request_follows_what_is_lacking_and_is_withdrawn_in_the_end(
    asked: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "_outlook", lambda seen: STARTING)
    one, other = [{"CPU": 1.0}] * 2, [{"CPU": 1.0, "GPU": 1.0}] * 2
    lacking, told = iter([one, one, other, []]), list[str]()
    with suppress(KeyError), growing.grown(lambda: next(lacking), told.append):
        assert asked == [one, other]
        assert told == ["the cluster is asked to grow, for 2 times 1 CPU: waiting for up to 900 s"]
        raise KeyError
    assert asked == [one, other, None]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("limit", "outlook"), [("GROW_SECONDS", STARTING), ("IDLE_SECONDS", IDLE), ("SILENT_SECONDS", None)]
)
def test_the_wait_has_a_limit_whatever_the_autoscaler_does(
    asked: list[object], monkeypatch: pytest.MonkeyPatch, limit: str, outlook: growing.Outlook | None
) -> None:
    monkeypatch.setattr(growing, "_outlook", lambda seen: outlook)
    monkeypatch.setattr(growing, limit, 0.1)
    with growing.grown(lambda: [{"CPU": 1.0}], lambda line: None):
        pass
    assert asked == [[{"CPU": 1.0}], None]


def cluster(*nodes: tuple[int, int]) -> Resources:
    return Resources(tuple(Node(cpus, gpus) for cpus, gpus in nodes))


@pytest.mark.parametrize(
    ("resources", "asked", "lacking"),
    [
        (cluster((0, 0)), (None, None), [{"CPU": 1}]),
        (cluster((0, 0)), (3, None), [{"CPU": 1}] * 3),
        (cluster((0, 0), (2, 0)), (3, None), [{"CPU": 1}] * 3),
        (cluster((0, 0), (2, 0)), (2, None), []),
        (cluster((0, 0), (2, 0)), (None, None), []),
        (cluster((4, 0)), (2, 1.0), [{"CPU": 1, "GPU": 1}] * 2),
        (cluster((4, 0)), (2, 0.5), [{"CPU": 1, "GPU": 0.5}] * 2),
        # The first node that came has a GPU, so each worker gets one.
        (cluster((0, 0), (8, 1)), (2, None), [{"CPU": 1, "GPU": 1}] * 2),
        (cluster((0, 0), (8, 1)), (2, 0.0), []),
    ],
)
def test_what_a_run_lacks_is_what_it_would_be_refused_for(
    resources: Resources, asked: tuple[int | None, float | None], lacking: list[dict[str, float]]
) -> None:
    assert find_lacking(resources, *asked) == lacking


def test_a_resumed_run_lacks_room_for_the_workers_it_began_with_if_none_of_them_fits() -> None:
    settled = WorkerPlan(2, 4, 0.0, weights_travel=True)
    assert find_lacking(cluster((0, 0), (2, 0)), 5, None, settled) == [{"CPU": 4}] * 2
    assert find_lacking(cluster((0, 0), (4, 0)), 5, None, settled) == []
