"""Asks a cluster that scales itself for room, and waits until its nodes are there."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.autoscaler.sdk import request_resources

from actors.ray_private import cluster_status, first_autoscaler_report, has_second_autoscaler, is_ray_client
from actors.waiting import head_answers, require_head

# Ray's autoscaler gives a node as long to start.
GROW_SECONDS = 900.0
# How long an autoscaler may start nothing, and how long a cluster may not say whether it has one.
IDLE_SECONDS = 60.0
SILENT_SECONDS = 15.0
POLL_SECONDS = 1.0
# The types of nodes in a cluster that does not scale itself, by version 1 of Ray's autoscaler: node_ and their id.
UNMANAGED = "node_"

Bundle = Mapping[str, float]
Lacking = Callable[[], Sequence[Bundle]]


@dataclass(frozen=True)
class Outlook:
    """What a cluster's autoscaler says: whether it starts nodes now, and whether it will start none for what we asked.

    A cluster that does not scale itself has an autoscaler too, which starts nothing.
    """

    starting: bool
    hopeless: bool


@contextmanager
def grown(lacking: Lacking, note: Callable[[str], None]) -> Iterator[None]:
    """Let a cluster grow until nothing is lacking or it grows no more; it keeps that size while the context lasts.

    Ray has one request for each cluster, so this replaces the request of another program.

    Args:
        lacking: Returns the bundles of resources that the cluster has no room for; empty if it has room for all.
        note: Receives a line when the wait begins.

    Raises:
        HeadLostError: Ray's head is gone.
    """
    asked = False

    def ask(bundles: Sequence[Bundle]) -> None:
        nonlocal asked
        if not asked:
            note(f"the cluster is asked to grow, for {_described(bundles)}: waiting for up to {GROW_SECONDS:.0f} s")
        asked = True
        request_resources(bundles=[dict(bundle) for bundle in bundles])

    try:
        # A Ray client has no connection to the autoscaler.
        if not is_ray_client():
            _wait(lacking, ask)
        yield
    finally:
        # If the head is gone, Ray would ask it for a minute and then end this process.
        if asked and head_answers():
            request_resources()


def _wait(lacking: Lacking, ask: Callable[[Sequence[Bundle]], None]) -> None:
    """Wait until nothing is lacking, and stop where the cluster will not grow."""
    if lacking():
        _wait_for_first_report()
    begun = busy = time.monotonic()
    asked, seen, alive = [], None, 0  # type: list[Bundle], int | None, int
    while bundles := list(lacking()):
        outlook = _outlook(seen)
        if outlook is not None and outlook.hopeless:
            return
        # What is lacking can change with the first nodes that come: they may have GPUs.
        if bundles != asked:
            ask(bundles)
            asked, seen = bundles, _version()
        now, before, alive = time.monotonic(), alive, sum(node["Alive"] for node in ray.nodes())
        if alive != before or (outlook is not None and outlook.starting):
            busy = now
        patience = SILENT_SECONDS if outlook is None else IDLE_SECONDS
        if now - busy > patience or now - begun > GROW_SECONDS:
            return
        time.sleep(POLL_SECONDS)
        require_head()


def _wait_for_first_report() -> None:
    """Wait for version 1 of the autoscaler, which reports unasked, but not in a Ray's first seconds."""
    begun = time.monotonic()
    while not has_second_autoscaler() and _first_outlook() is None:
        if time.monotonic() - begun > SILENT_SECONDS:
            return
        time.sleep(POLL_SECONDS)
        require_head()


def _outlook(seen: int | None) -> Outlook | None:
    """Return what the autoscaler says; None if it has not answered.

    Args:
        seen: The version of the cluster's state when it was asked; None if it was not asked yet.
    """
    if not has_second_autoscaler():
        return _first_outlook()
    state = cluster_status().autoscaling_state
    if seen is None or state.last_seen_cluster_resource_state_version <= seen:
        return None
    return Outlook(
        starting=bool(state.pending_instance_requests or state.pending_instances),
        hopeless=bool(state.infeasible_cluster_resource_constraints),
    )


def _first_outlook() -> Outlook | None:
    """Return what version 1 of the autoscaler says."""
    report = first_autoscaler_report()
    types = (report.get("node_type_mapping") or {}).values()
    if not types:
        return None
    return Outlook(
        starting=bool(report["pending_launches"] or report["pending_nodes"]),
        hopeless=all(one.startswith(UNMANAGED) for one in types),
    )


def _version() -> int:
    return int(cluster_status().cluster_resource_state.cluster_resource_state_version)


def _described(bundles: Sequence[Bundle]) -> str:
    return f"{len(bundles)} times " + " and ".join(f"{amount:g} {name}" for name, amount in bundles[0].items())
