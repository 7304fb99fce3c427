"""Checks whether a run fits on its machines, for `slimllm doctor` and before every run."""

import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from actors.node_state import NodeState, inspect_nodes, installed_versions
from cluster import Node, Resources, WorkerPlan, spread_workers
from orchestrator.config import ConfigError
from orchestrator.output.place import staging_place
from orchestrator.preflight.estimate import Estimate, readable
from orchestrator.preflight.stages import LIBRARIES
from orchestrator.tracking import TrackingOptions, database_file

NODE_SECONDS = 10.0
# The estimate is within 30 % of measurements (tests/orchestrator/preflight/test_estimate.py). A run certainly fails if
# even 70 % of the estimate does not fit.
MEMORY_MARGIN = 0.3
# The size of what is written is known, except for small files.
DISK_MARGIN = 0.1


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        ok: Whether it is as a run needs it.
        found: What was found.
        remedy: What to do if it is not ok.
        certain: Whether a run would certainly fail because of it.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""
    certain: bool = False


class Writing(Protocol):
    """The settings of where a run writes, as every config declares them."""

    @property
    def resume(self) -> bool:
        """Whether the run continues an unfinished one."""

    @property
    def tracking_uri(self) -> str | None:
        """Where the run is logged."""


@dataclass(frozen=True)
class Nodes:
    """A cluster's nodes, each with its state or the reason why it has none."""

    resources: Resources
    states: tuple[NodeState | str, ...]

    def pairs(self) -> Iterator[tuple[Node, NodeState | str]]:
        """Yield every node with its state."""
        yield from zip(self.resources.nodes, self.states, strict=True)


def inspect_cluster(resources: Resources, gpus: float) -> Nodes:
    """Inspect every node, for NODE_SECONDS at most.

    Args:
        resources: The cluster.
        gpus: The share of a GPU that the inspection of a node may use; with 0 it leaves GPUs alone.
    """
    # Without ids, only this node can be inspected.
    nodes = [(node.node_id, node.here) for node in resources.nodes]
    return Nodes(resources, tuple(inspect_nodes(nodes, gpus, NODE_SECONDS)))


def check_fit(config: Writing, output: Path, estimate: Estimate, nodes: Nodes, workers: WorkerPlan) -> list[Check]:
    """Check that a run has room: memory and temporary disk on every node, and disk where it writes."""
    return [*check_memory(estimate, nodes, workers), *check_disks(config, output, estimate, nodes, workers)]


def check_memory(estimate: Estimate, nodes: Nodes, workers: WorkerPlan) -> list[Check]:
    """Compare the memory that each node's workers need with what is free there."""
    counts = spread_workers(nodes.resources, workers)
    shared = estimate.shared // max(1, sum(count > 0 for count in counts))
    check = _check_gpu_memory if estimate.device == "cuda" else _check_host_memory
    return [
        check(estimate, state, count, shared + node.here * estimate.further_driver, workers)
        for (node, state), count in zip(nodes.pairs(), counts, strict=True)
        if count and isinstance(state, NodeState)
    ]


def _check_host_memory(estimate: Estimate, state: NodeState, count: int, beside: int, workers: WorkerPlan) -> Check:
    return _compare_memory(estimate, state.host, state.free_memory, count, beside, LIBRARIES)


def _check_gpu_memory(estimate: Estimate, state: NodeState, count: int, beside: int, workers: WorkerPlan) -> Check:
    if state.gpu is None:
        return Check(f"memory, {state.host}", True, "its GPUs were not checked; workers check them before they begin")
    sharers = min(count, int(1 / workers.gpus_per_worker))
    return _compare_memory(estimate, f"{state.gpu.name} of {state.host}", state.gpu.free, sharers, 0, 0)


def _compare_memory(estimate: Estimate, where: str, free: int, count: int, beside: int, libraries: int) -> Check:
    """Compare the memory of some workers, their solves and `beside` with what is free."""
    # Each bundle runs a worker and a solve.
    needed = count * (estimate.worker + estimate.solve) + beside
    least = count * (estimate.required + libraries)
    solves = f", each with a solve of {readable(estimate.solve)}" if estimate.solve else ""
    each = f"{count} worker(s) of {readable(estimate.worker)}{solves}"
    found = f"{readable(max(needed, least))} of {readable(free)} free, for {each}"
    return Check(
        f"memory, {where}",
        max(needed, least) <= free,
        found,
        "pass --offload, fewer --workers or more nodes, or calibrate on fewer or shorter blocks",
        certain=(1 - MEMORY_MARGIN) * count * estimate.required > free,
    )


def check_disks(config: Writing, output: Path, estimate: Estimate, nodes: Nodes, workers: WorkerPlan) -> list[Check]:
    """Compare what a run writes with the free disk there: output, MLflow's files, spilled states."""
    return [
        _check_output_disk(config, output, estimate),
        *_check_temporary_disks(estimate, nodes, workers),
    ]


def _check_output_disk(config: Writing, output: Path, estimate: Estimate) -> Check:
    place = nearest_directory(output)
    written, free = estimate.output + estimate.beside, shutil.disk_usage(place).free
    if config.resume:
        # The run does not write again what an earlier attempt wrote.
        free += sum(path.stat().st_size for path in staging_place(output).rglob("*") if path.is_file())
    store = database_file(TrackingOptions(tracking_uri=config.tracking_uri).resolved_uri)
    # MLflow's copy of the checkpoint, if it is on the same disk.
    copied = estimate.tracked if store is not None and _disk_of(store) == _disk_of(place) else 0
    copy = f", {readable(copied)} of them MLflow's copy" if copied else ""
    return Check(
        "disk",
        written + copied <= free,
        f"{readable(written + copied)} of {readable(free)} free in {place}{copy}",
        "make room there, or choose another --output",
        certain=(1 - DISK_MARGIN) * written > free,
    )


def _check_temporary_disks(estimate: Estimate, nodes: Nodes, workers: WorkerPlan) -> list[Check]:
    counts = spread_workers(nodes.resources, workers)
    return [
        Check(
            f"temporary disk, {state.host}",
            count * estimate.spilled <= state.free_disk,
            f"{readable(count * estimate.spilled)} of {readable(state.free_disk)} free in {state.temporary}",
            "set TMPDIR there to a folder with room, or drop --offload",
            certain=(1 - DISK_MARGIN) * count * estimate.spilled > state.free_disk,
        )
        for (_, state), count in zip(nodes.pairs(), counts, strict=True)
        if estimate.spilled and count and isinstance(state, NodeState)
    ]


def check_nodes(nodes: Nodes, workers: WorkerPlan | None) -> list[Check]:
    """Check each node: what it has, whether its packages match this program's, and whether torch sees its GPUs."""
    here = {"python": platform.python_version()} | installed_versions()
    return [_check_node(node, state, here, workers) for node, state in nodes.pairs()]


def _check_node(node: Node, state: NodeState | str, here: dict[str, str], workers: WorkerPlan | None) -> Check:
    has = f"{node.cpus} CPUs, {node.gpus} GPUs"
    if isinstance(state, str):
        remedy = "check that it is alive, and that torch and transformers are installed there as here"
        return Check(f"node {node.address}", False, f"{has}; {state}", remedy)
    name, found = f"node {state.host}", f"{has}, {readable(state.free_memory)} of memory free"
    differing = [f"{name} {version or 'missing'}" for name, version in state.packages.items() if version != here[name]]
    if differing:
        ours = ", ".join(
            f"{name} {here[name]}" for name in here if any(one.startswith(f"{name} ") for one in differing)
        )
        return Check(name, False, f"{found}; {', '.join(differing)}", f"install the same versions as here: {ours}")
    if state.gpu is not None:
        found += f", {readable(state.gpu.free)} on {state.gpu.name}"
    elif node.gpus and workers is not None and workers.gpus_per_worker:
        remedy = "install a torch built for CUDA and a driver for it, or pass --gpus-per-worker 0"
        return Check(name, False, f"{found}; torch sees no GPU", remedy)
    return Check(name, True, found)


def refuse_certain_failure(checks: Sequence[Check], warn: Callable[[str], None]) -> None:
    """Warn of what may fail.

    Raises:
        ConfigError: Something will certainly fail.
    """
    for check in checks:
        line = f"{check.name}: {check.found}: {check.remedy}"
        if check.certain:
            raise ConfigError(line)
        if not check.ok:
            warn(line)


def nearest_directory(path: Path) -> Path:
    """Return a path, or the nearest existing folder above it."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def _disk_of(path: Path) -> int:
    return nearest_directory(path).stat().st_dev
