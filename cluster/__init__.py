"""Connecting to Ray, or starting it, and checking what it has before work is sent there.

This package names the values, which need no Ray. The connection is `cluster.session`, which imports Ray.
"""

from cluster.errors import ClusterError
from cluster.resources import Node, Resources, WorkerPlan, find_room, plan_workers, spread_workers

__all__ = [
    "ClusterError",
    "Node",
    "Resources",
    "WorkerPlan",
    "find_room",
    "plan_workers",
    "spread_workers",
]
