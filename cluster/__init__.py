"""Connects to Ray or starts it, and checks its resources before work is sent there.

This module exports the values, which do not need Ray. The connection is in `cluster.session`, which imports Ray.
"""

from cluster.errors import ClusterError
from cluster.resources import Node, Resources, WorkerPlan, find_lacking, find_room, plan_workers, spread_workers

__all__ = [
    "ClusterError",
    "Node",
    "Resources",
    "WorkerPlan",
    "find_lacking",
    "find_room",
    "plan_workers",
    "spread_workers",
]
