"""A node's free memory and disk, its packages and its speed, inspected before work is sent there.

This process inspects its own node. A Ray task inspects each other node, within a time limit.
"""

import os
import platform
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from tempfile import gettempdir

import torch

from slimllm_ops.stream.memory import free_memory
from slimllm_ops.stream.operations import Rates

# Packages that workers compute with; Ray itself refuses a cluster with another version of Ray or Python.
PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "numpy")


@dataclass(frozen=True)
class Gpu:
    """A node's GPU: its name, and its free bytes."""

    name: str
    free: int


@dataclass(frozen=True)
class NodeState:
    """The state of a node.

    Attributes:
        host: The node's name.
        packages: The version of each package that workers compute with; "" if it is missing.
        free_memory: In bytes.
        temporary: The folder for temporary files.
        free_disk: Bytes free in that folder.
        rates: Rates of the device that workers will use; None if that is a GPU and the inspection left GPUs alone.
        gpu: The GPU that torch sees; None if it sees none, or if the inspection left GPUs alone.
    """

    host: str
    packages: dict[str, str]
    free_memory: int
    temporary: str
    free_disk: int
    rates: Rates | None
    gpu: Gpu | None


def inspect_node(device: str, threads: int) -> NodeState:
    """Inspect the node that this process runs on.

    Args:
        device: The device whose rates to measure: "cpu", "cuda" if torch sees one, or "" for none.
        threads: CPU threads that a worker computes with.
    """
    gpu = _gpu() if device == "cuda" else None
    return NodeState(
        host=socket.gethostname(),
        packages={"python": platform.python_version()} | installed_versions(),
        free_memory=free_memory(torch.device("cpu")),
        temporary=gettempdir(),
        free_disk=shutil.disk_usage(gettempdir()).free,
        rates=_rates(device, threads) if device == "cpu" or gpu else None,
        gpu=gpu,
    )


def inspect_nodes(
    nodes: Sequence[tuple[str, bool]], device: str, threads: int, gpus: float, seconds: float
) -> list[NodeState | str]:
    """Inspect all nodes at once; return the state of each, or the reason why there is none.

    Args:
        nodes: Ray's name of each (empty without Ray), and whether this process runs on it.
        device: As in `inspect_node`.
        threads: As in `inspect_node`.
        gpus: The share of a GPU that a worker will have; inspecting a GPU takes the same share.
        seconds: How long to wait for the other nodes.
    """
    # On Ray, only a task that holds a share of a GPU may use it.
    others = [node for node, here in nodes if node and (not here or device == "cuda")]
    answers = _ask_nodes(others, device, threads, gpus if device == "cuda" else 0, seconds) if others else {}
    return [answers[node] if node in answers else inspect_node(device, threads) for node, _ in nodes]


def _ask_nodes(
    nodes: Sequence[str], device: str, threads: int, gpus: float, seconds: float
) -> dict[str, NodeState | str]:
    # A local run does not import Ray.
    from actors.node_tasks import ask_nodes

    return ask_nodes(nodes, inspect_node, device, threads, gpus=gpus, seconds=seconds)


def _gpu() -> Gpu | None:
    if not torch.cuda.is_available():
        return None
    return Gpu(torch.cuda.get_device_name(), free_memory(torch.device("cuda")))


def _rates(device: str, threads: int) -> Rates:
    before = torch.get_num_threads()
    # Ray may be told of more CPUs than there are.
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    try:
        return Rates.measure(torch.device(device))
    finally:
        torch.set_num_threads(before)


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that workers compute with; "" for a missing one."""
    return {name: installed_version(name) for name in PACKAGES}


@cache
def installed_version(package: str) -> str:
    """Return the version of a package, or "" if it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
