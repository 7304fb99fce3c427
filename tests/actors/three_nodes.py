"""Runs a cluster of three nodes for `test_cluster.py`, which calls it in a fork, and uses it as the driver does."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.cluster_utils import Cluster
from rich.console import Console

import actors
import slimllm_ops
from actors import ray_workers
from actors.group import ShardGroup
from actors.node_state import NodeState
from actors.placement import Placement
from actors.pool import SolverPool
from actors.ray_workers import RayWorkers
from actors.serving import weight_server
from cluster import plan_workers
from cluster.session import session
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs, load_inputs
from orchestrator.pipeline import prune
from orchestrator.preflight import checks
from orchestrator.preflight.checks import inspect_cluster
from orchestrator.progress import Reporter
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.module_solves import eliminate_observed
from slimllm_ops.stream.passes import LayerStream

NODES = 3


def main(model: str, tokens: str, output: str, method: str) -> dict[str, Any]:
    """Use the cluster in parts, then for a run that loses a node."""
    head = {"num_cpus": 4, "include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(NODES - 1):
        cluster.add_node(wait=False, num_cpus=4)
    cluster.wait_for_nodes()
    common: dict[str, Any] = {"model": model, "calibration": tokens, "workers": NODES, "address": cluster.address}
    seen: dict[str, Any] = {}
    try:
        with session(cluster.address, (actors, slimllm_ops)) as resources:
            for shared in (False, True):
                plan = plan_workers(resources, NODES, None, shared_storage=shared)
                seen[f"weights_travel, {shared}"] = plan.weights_travel
            inputs = load_inputs(PruneConfig(**common), print)
            seen |= use_parts(inputs)
            # By now every node has a process that has imported torch.
            checks.NODE_SECONDS = 60.0
            found = inspect_cluster(resources, gpus=0.0).states
            seen["looked at"] = [isinstance(state, NodeState) for state in found]
            # Connected already: the processes of solves stay from one run to the next.
            common |= {"tracking_uri": "none", "sparsity": (0.3,)}
            lost = cluster.list_all_nodes()[-1]
            losing = Losing(lambda: cluster.remove_node(lost, allow_graceful=False))
            # A node that is gone for good need not be waited for as long as one that may come back.
            ray_workers.REPLACE_SECONDS = 3.0
            prune(PruneConfig(**common, output=output, method=method), losing)
            seen["told"] = losing.told.getvalue()
    finally:
        cluster.shutdown()
    return seen


class Losing(Reporter):
    """Tells a string, and lets a node be lost when the second layer is observed."""

    def __init__(self, lose: Callable[[], None]) -> None:
        self.told = io.StringIO()
        super().__init__(Console(file=self.told, width=400))
        self._lose = lose

    def layers(self, stage: str, num_layers: int, tokens: int, first: int = 0) -> Iterator[int]:
        """Yield the layers."""
        for layer in super().layers(stage, num_layers, tokens, first):
            if stage in ("pruning", "calibrating") and layer == 1 and first == 0:
                self._lose()
            yield layer


def use_parts(inputs: Inputs) -> dict[str, Any]:
    """Pass a layer and solve it, with weights that travel; then look at where everything ran."""
    branch = inputs.source.family.mlp
    with Placement(NODES, 2, 0.0) as placement, weight_server() as deliver:
        workers = RayWorkers(placement)
        shards = ShardGroup(workers, NODES, deliver=deliver)
        workers.start()
        nodes = ray.get([actor.__ray_call__.remote(node_of) for actor in workers._actors])
        solves = [ray.remote(sleeping_node).options(**placement.solve_options()).remote() for _ in range(NODES)]
        served: Any = deliver(inputs.source)
        ray.get([actor.__ray_call__.remote(refuse_files) for actor in workers._actors])
        shards.open_stream("served", inputs.source, inputs.calibration_blocks())
        shards.each("served", LayerStream.forward, 0)
        seen = shards.merge("served", LayerStream.observe_dense, 1, branch)
        pool = SolverPool(workers, served, threads=1)
        num_channels = inputs.source.config.intermediate_size
        ranking = pool.get(pool.submit(eliminate_observed, 1, branch, seen, num_channels, None)).ranking
        return {
            "actors": nodes,
            "solves": ray.get(solves),
            "driver": ray.get_runtime_context().get_node_id(),
            "server": ray.get(served.server.__ray_call__.remote(node_of)),
            "ranked": len(ranking.order),
            "error": error_of_a_lost_file(shards, inputs),
            "refused": refusal_of_paths(shards, inputs),
        }


def error_of_a_lost_file(shards: ShardGroup, inputs: Inputs) -> str:
    """Return what a worker's reader says of a file that the server does not find."""
    lost = Checkpoint(Path("/none"), inputs.source.config, inputs.source.family, inputs.source.files)
    try:
        shards.open_stream("lost", lost, inputs.calibration_blocks())
    except slimllm_ops.errors.CheckpointError as error:
        return str(error)
    return "no error"


def refusal_of_paths(shards: ShardGroup, inputs: Inputs) -> str:
    """Return what comes of sending a checkpoint that reads files: that workers refuse it shows that they can."""
    shards.deliver = lambda checkpoint: checkpoint
    try:
        shards.open_stream("by path", inputs.source, inputs.calibration_blocks())
    except ray.exceptions.RayTaskError as error:
        return str(error.cause)
    return "no error"


def node_of(_: object) -> str:
    """Return the node that an actor runs on."""
    return ray.get_runtime_context().get_node_id()


def sleeping_node() -> str:
    """Return the node that a task runs on, having held it long enough for the others to need theirs."""
    import time

    time.sleep(1)
    return ray.get_runtime_context().get_node_id()


def refuse_files(_: object) -> None:
    """Let an actor's process fail where it reads a checkpoint's file itself."""
    import slimllm_ops.checkpoint.reading

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a worker read a file itself")

    slimllm_ops.checkpoint.reading.read_tensors = refuse
