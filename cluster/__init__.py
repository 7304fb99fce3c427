"""Connecting to Ray, or starting it, and checking what it has before work is sent there."""

from cluster.errors import ClusterError
from cluster.session import (
    Node,
    Resources,
    WorkerPlan,
    find_room,
    plan_workers,
    session,
    spread_workers,
)

__all__ = [
    "ClusterError",
    "Node",
    "Resources",
    "WorkerPlan",
    "find_room",
    "plan_workers",
    "session",
    "spread_workers",
]
