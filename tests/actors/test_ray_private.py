"""What we expect of Ray's private names, with the Ray that is installed."""

import inspect

from ray._private import ray_constants
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated import autoscaler_pb2

from actors import ray_private


def test_the_names_are_there_with_what_is_read_of_them() -> None:
    assert isinstance(ray_constants.DEBUG_AUTOSCALING_STATUS, str)
    assert "fetch_from_server" in inspect.signature(is_autoscaler_v2).parameters
    reply = autoscaler_pb2.GetClusterStatusReply()
    assert {
        "pending_instance_requests",
        "pending_instances",
        "infeasible_cluster_resource_constraints",
        "last_seen_cluster_resource_state_version",
    } <= set(reply.autoscaling_state.DESCRIPTOR.fields_by_name)
    assert "cluster_resource_state_version" in reply.cluster_resource_state.DESCRIPTOR.fields_by_name


def test_a_ray_of_this_machine_answers(local_ray: None) -> None:
    assert ray_private.is_ray_client() is False
    assert ray_private.has_second_autoscaler() in (True, False)
    before = ray_private.cluster_status().cluster_resource_state.cluster_resource_state_version
    assert ray_private.cluster_status().cluster_resource_state.cluster_resource_state_version > before >= 0
    assert isinstance(ray_private.first_autoscaler_report(), dict)
