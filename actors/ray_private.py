"""Uses private interfaces of Ray. tests/actors/test_ray_private.py says what we expect of each name."""

import json
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.experimental.internal_kv import internal_kv_get_gcs_client

RPC_SECONDS = 10


def is_ray_client() -> bool:
    """Return whether this program is connected through a Ray client (ray://), which has no connection to the head."""
    return bool(ray.util.client.ray.is_connected())


def has_second_autoscaler() -> bool:
    """Return whether the cluster has version 2 of Ray's autoscaler."""
    return bool(is_autoscaler_v2(fetch_from_server=True))


def cluster_status() -> Any:
    """Return the state of the cluster and of its autoscaler, as version 2 reports it."""
    reply = GetClusterStatusReply()
    reply.ParseFromString(internal_kv_get_gcs_client().get_cluster_status(timeout_s=RPC_SECONDS))
    return reply


def first_autoscaler_report() -> dict[str, Any]:
    """Return what version 1 of the autoscaler reports last; empty if it has not reported."""
    found = internal_kv_get_gcs_client().internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode())
    return json.loads(found or "{}").get("autoscaler_report") or {}
