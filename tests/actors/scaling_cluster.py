"""A Ray cluster that scales itself, on this machine: Ray's own autoscaler starts nodes as processes."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG

from tests.ports import free_ports
from tests.ray_head import ray_head

HEAD, WORKER = "ray.head.default", "worker"


@contextmanager
def scaling_cluster(*, second: bool, cpus: int = 2, at_most: int = 2, alone: bool = False) -> Iterator[str]:
    """Start a head without CPUs; yield its address.

    Args:
        second: Whether the autoscaler is Ray's version 2.
        cpus: CPUs of each node that the cluster adds.
        at_most: How many nodes it adds at most.
        alone: Whether it has an autoscaler that adds none, as where a cluster was started by hand.
    """
    ports = free_ports(5)
    # Ray's sockets lie in it, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="slimllm-", dir="/tmp"))
    config = folder / "cluster.json"
    config.write_text(json.dumps(configuration(f"127.0.0.1:{ports[0]}", cpus, at_most)))
    names = ("port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    names += ("ray-client-server-port",)
    options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    options += ["--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}"]
    options += [f"--autoscaling-config={config}"] * (not alone)
    started: list[psutil.Process] = []
    try:
        with ray_head(*options, folder=folder, environment=os.environ | environment(second)) as process:
            try:
                yield f"127.0.0.1:{ports[0]}"
            finally:
                started = psutil.Process(process.pid).children(recursive=True)
    finally:
        # The autoscaler's nodes outlive it.
        for one in started:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        shutil.rmtree(folder, ignore_errors=True)


def environment(second: bool) -> dict[str, str]:
    """The variables of such a cluster; it is asked each second instead of every five."""
    common = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled"}
    if not second:
        return common
    ids = {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
    return common | ids | {"RAY_enable_autoscaler_v2": "1", "RAY_NODE_TYPE_NAME": HEAD}


def configuration(address: str, cpus: int, at_most: int) -> dict[str, object]:
    """What `ray up` would be given."""
    return BASE_READONLY_CONFIG | {
        "cluster_name": "scaling",
        "max_workers": at_most,
        "idle_timeout_minutes": 5,
        "provider": {
            # Its own name, "fake_multinode", needs a file that Ray's wheel lacks.
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            WORKER: {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": 0, "max_workers": at_most},
        },
    }
