"""How many workers fit on a cluster, and which Ray a run connects to."""

import signal
from pathlib import Path

import pytest
import ray
from ray.runtime_env.runtime_env import _merge_runtime_env

import actors
import slimllm_ops
from cluster import ClusterError, Node, Resources, WorkerPlan, plan_workers, spread_workers
from cluster.session import session


def cluster(*nodes: tuple[int, int]) -> Resources:
    return Resources(tuple(Node(cpus, gpus) for cpus, gpus in nodes))


@pytest.mark.parametrize(
    ("resources", "asked", "expected"),
    [
        # A worker for each four cores, at least one; all cores are used.
        (cluster((1, 0)), (None, None), (1, 1, 0.0)),
        (cluster((2, 0)), (None, None), (1, 2, 0.0)),
        (cluster((16, 0)), (None, None), (4, 4, 0.0)),
        (cluster((8, 0), (4, 0)), (None, None), (3, 4, 0.0)),
        # A worker for each GPU where there are any.
        (cluster((16, 2)), (None, None), (2, 8, 1.0)),
        (cluster((16, 2)), (None, 0.5), (4, 4, 0.5)),
        (cluster((16, 2)), (None, 0.0), (4, 4, 0.0)),
        # With the CPUs that fall to it: another run may have the others.
        (cluster((16, 2)), (1, None), (1, 8, 1.0)),
        # No worker is wider than its node.
        (cluster((4, 0), (4, 0)), (1, None), (1, 4, 0.0)),
        (cluster((6, 0), (2, 0)), (4, None), (4, 2, 0.0)),
        (cluster((8, 0)), (5, None), (5, 1, 0.0)),
    ],
)
def test_workers_are_as_many_and_as_wide_as_there_is_room(
    resources: Resources, asked: tuple[int | None, float | None], expected: tuple[int, int, float]
) -> None:
    plan = plan_workers(resources, *asked)
    assert (plan.num_workers, plan.cpus_per_worker, plan.gpus_per_worker) == expected
    assert resources.room(plan.cpus_per_worker, plan.gpus_per_worker) >= plan.num_workers


@pytest.mark.parametrize(
    ("resources", "asked"),
    [
        (cluster((2, 0)), (3, None)),
        (cluster((2, 0)), (None, 1.0)),
        (cluster((2, 0)), (1, 1.0)),
        (cluster((16, 2)), (3, None)),
        (cluster((16, 1), (16, 1)), (1, 2.0)),
    ],
)
def test_more_than_there_is_room_for_is_refused(resources: Resources, asked: tuple[int | None, float | None]) -> None:
    with pytest.raises(ClusterError, match=r"asked for, the cluster has room for \d: .* lower --workers"):
        plan_workers(resources, *asked)


@pytest.mark.parametrize(
    ("local", "shared_storage", "travel"),
    [(True, False, False), (True, True, False), (False, True, False), (False, False, True)],
)
def test_weights_travel_to_nodes_that_do_not_see_the_drivers_files(
    local: bool, shared_storage: bool, travel: bool
) -> None:
    resources = Resources((Node(2, 0), Node(2, 0)), local)
    assert plan_workers(resources, None, None, shared_storage).weights_travel is travel


@pytest.mark.usefixtures("local_ray")
def test_a_connection_that_is_there_is_used_and_left_open() -> None:
    address = ray.get_runtime_context().gcs_address
    for asked in (None, "auto", address):
        with session(asked, ()) as resources:
            assert (resources.cpus, resources.gpus, resources.local) == (8, 0, True)
        assert ray.is_initialized()


def test_what_is_sent_to_a_cluster_can_be_sent_from_inside_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray merges a driver's environment with that of its job, which it copies deeply: modules cannot be copied."""
    sent = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, *, runtime_env, **others: sent.append(runtime_env))
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with session("auto", (actors, slimllm_ops)):
        (environment,) = sent
    merged = _merge_runtime_env({"env_vars": {"A": "B"}}, environment)
    assert [(Path(folder).name, Path(folder, "__init__.py").is_file()) for folder in merged["py_modules"]] == [
        ("actors", True),
        ("slimllm_ops", True),
    ]


@pytest.mark.usefixtures("local_ray")
def test_a_connection_to_another_ray_is_not_taken_for_the_one_asked_for() -> None:
    with pytest.raises(ClusterError, match=r"10.1.2.3:6379 was asked for, but .* already connected"):
        session("10.1.2.3:6379", ()).__enter__()


def test_the_programs_own_sigterm_handler_outlives_the_start_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(signum: int, frame: object) -> None: ...

    # What `ray.init` does to the handler, without the seconds that it takes.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: signal.signal(signal.SIGTERM, lambda *event: None))
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.signal(signal.SIGTERM, mine)
    try:
        with session(None, ()):
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [([(4, 0), (4, 0)], 3, [2, 1]), ([(2, 0), (8, 0)], 4, [1, 3]), ([(4, 0)], 2, [2]), ([(8, 1), (8, 4)], 5, [1, 4])],
)
def test_workers_are_dealt_out_as_far_as_there_is_room(
    nodes: list[tuple[int, int]], workers: int, expected: list[int]
) -> None:
    plan = WorkerPlan(workers, 2, float(nodes[0][1]), weights_travel=False)
    assert spread_workers(cluster(*nodes), plan) == expected
