"""How many workers fit on a cluster, and which Ray a run connects to."""

import asyncio
import faulthandler
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray
from ray.runtime_env.runtime_env import _merge_runtime_env

import actors
import slimllm_ops
from cluster import ClusterError, Node, Resources, WorkerPlan, plan_workers, spread_workers
from cluster.session import session
from orchestrator.cli.exit_codes import exit_on_error


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


@pytest.fixture
def shut_down(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `ray.init` does to the handler, without the seconds that it takes; each time that Ray was shut down."""
    times: list[bool] = []

    def start(*arguments: object, **settings: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *event: None)
        # The system's handler, which Python does not know of.
        faulthandler.register(signal.SIGTERM, file=sys.__stderr__)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    # The Ray of other tests keeps its token.
    monkeypatch.setattr("cluster.local_ray._reload", lambda: None)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "shutdown", lambda: times.append(True))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return times


@pytest.fixture
def handler() -> Iterator[Mock]:
    """The SIGTERM handler of the program."""
    mine = Mock()
    before = signal.signal(signal.SIGTERM, mine)
    yield mine
    faulthandler.unregister(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def test_the_programs_own_sigterm_handler_outlives_the_start_of_ray(shut_down: list[bool], handler: Mock) -> None:
    with session(None, ()):
        assert signal.getsignal(signal.SIGTERM) is handler
    assert shut_down == [True]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with session(None, ()):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_thread_of_a_program_that_handles_sigterm_starts_ray(shut_down: list[bool], handler: Mock) -> None:
    def run() -> object:
        with session(None, ()), exit_on_error():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor() as threads:
        assert threads.submit(run).result() is handler
    assert asyncio.run(asyncio.to_thread(run)) is handler
    assert signal.getsignal(signal.SIGTERM) is handler
    signal.raise_signal(signal.SIGTERM)
    handler.assert_called_once()
    assert shut_down == [True, True]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError("no space"), RuntimeError("died")])
@pytest.mark.parametrize("moment", ["init", "nodes"])
def test_whatever_goes_wrong_while_ray_starts_it_is_shut_down(
    shut_down: list[bool], handler: Mock, monkeypatch: pytest.MonkeyPatch, error: Exception, moment: str
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        signal.signal(signal.SIGTERM, lambda *event: None)
        raise error

    monkeypatch.setattr(ray, moment, fail)
    with pytest.raises(type(error)), session(None, ()):
        pytest.fail("Ray did not start")
    assert shut_down == [True]
    if moment == "init":
        assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
def test_a_real_ray_starts_in_a_thread_while_the_main_thread_handles_signals() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_THREAD], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "True", "False"]


IN_A_THREAD = """
import asyncio, os, signal, time
import ray
from cluster.session import session
from orchestrator.cli.exit_codes import exit_on_error

told = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *event: told.append(event[0]))

def run():
    with session(None, ()) as resources:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        time.sleep(0.5)
        return len(resources.nodes)

print(asyncio.run(asyncio.to_thread(run)), set(told) == {signal.SIGTERM, signal.SIGINT}, ray.is_initialized())
"""


@pytest.mark.parametrize(
    ("option", "variable"), [("local", None), (None, "local"), ("local", "127.0.0.1:1"), (None, "")]
)
def test_local_starts_a_new_ray_as_it_does_for_ray(
    shut_down: list[bool], monkeypatch: pytest.MonkeyPatch, option: str | None, variable: str | None
) -> None:
    asked = []
    monkeypatch.setattr(ray, "init", lambda address, **settings: asked.append(address))
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    with session(option, ()):
        assert asked == ["local"]


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("127.0.0.1:1", "no Ray answers at 127.0.0.1:1 .*, or unset RAY_ADDRESS, which names it"),
        ("ray://127.0.0.1:1", "no Ray answers at ray://127.0.0.1:1 .*, or unset RAY_ADDRESS"),
        ("127.0.0.1:99999", "no Ray answers at 127.0.0.1:99999 .*, or unset RAY_ADDRESS"),
        ("http://127.0.0.1:8265", "^RAY_ADDRESS 'http://127.0.0.1:8265' is a job server, .*: .* the head's host:port"),
        ("head", "^RAY_ADDRESS 'head' is not host:port, nor auto, nor local"),
    ],
)
def test_a_variable_that_names_no_ray_is_named(
    shut_down: list[bool], monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    with pytest.raises(ClusterError, match=said) as error, session(None, ()):
        pytest.fail("there is no Ray")
    assert "--address" not in str(error.value)
    with pytest.raises(ClusterError, match="--address"), session(variable, ()):
        pytest.fail("there is no Ray")


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [([(4, 0), (4, 0)], 3, [2, 1]), ([(2, 0), (8, 0)], 4, [1, 3]), ([(4, 0)], 2, [2]), ([(8, 1), (8, 4)], 5, [1, 4])],
)
def test_workers_are_dealt_out_as_far_as_there_is_room(
    nodes: list[tuple[int, int]], workers: int, expected: list[int]
) -> None:
    plan = WorkerPlan(workers, 2, float(nodes[0][1]), weights_travel=False)
    assert spread_workers(cluster(*nodes), plan) == expected
