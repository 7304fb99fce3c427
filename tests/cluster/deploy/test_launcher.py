"""The cluster launcher's file passes Ray's own validator, and matches the placement of workers."""

from typing import Any

import pytest
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster import Node, Resources, plan_workers
from tests.cluster.deploy.commands import DEPLOY, IMAGE, documents


@pytest.fixture
def launcher() -> dict[str, Any]:
    (config,) = documents(DEPLOY / "launcher" / "aws.yaml")
    return config


def test_ray_takes_it(launcher: dict[str, Any]) -> None:
    prepared = prepare_config(launcher)
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    # No command of the defaults is left: those install another Ray.
    assert prepared["setup_commands"] == []


def test_what_ray_does_not_take_is_found(launcher: dict[str, Any]) -> None:
    launcher["idle_timeout_minuts"] = 5
    with pytest.raises(ValidationError, match="idle_timeout_minuts"):
        validate_config(prepare_config(launcher))


def test_a_worker_is_placed_on_each_gpu_of_the_first_nodes(launcher: dict[str, Any]) -> None:
    types = launcher["available_node_types"]
    nodes = [Node(types["head"]["resources"]["CPU"], 0)]
    gpu = types["gpu"]
    nodes += [Node(gpu["resources"]["CPU"], gpu["resources"]["GPU"])] * gpu["min_workers"]
    plan = plan_workers(Resources(tuple(nodes), local=False), None, None)
    assert (plan.num_workers, plan.cpus_per_worker, plan.gpus_per_worker) == (4, 12, 1.0)
    assert gpu["max_workers"] <= launcher["max_workers"]


def test_all_nodes_run_the_image_and_show_the_token_that_is_sent_to_them(launcher: dict[str, Any]) -> None:
    docker = launcher["docker"]
    assert docker["image"] == IMAGE
    assert "--env=RAY_AUTH_MODE=token" in docker["run_options"]
    ((remote, local),) = launcher["file_mounts"].items()
    assert f"--env=RAY_AUTH_TOKEN_PATH={remote}" in docker["run_options"]
    # Where `ray get-auth-token --generate` writes, and where a client on this machine looks.
    assert local == "~/.ray/auth_token"
