"""A node's free memory and disk, and its packages, inspected before work is sent there.

This process inspects its own node. A Ray task inspects each other node, within a time limit.
"""

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
        gpu: The GPU that torch sees; None if it sees none, or if the inspection left GPUs alone.
    """

    host: str
    packages: dict[str, str]
    free_memory: int
    temporary: str
    free_disk: int
    gpu: Gpu | None


def inspect_node(uses_gpu: bool) -> NodeState:
    """Inspect the node that this process runs on, and its GPU if this process may use it."""
    return NodeState(
        host=socket.gethostname(),
        packages={"python": platform.python_version()} | installed_versions(),
        free_memory=free_memory(torch.device("cpu")),
        temporary=gettempdir(),
        free_disk=shutil.disk_usage(gettempdir()).free,
        gpu=_gpu() if uses_gpu else None,
    )


def inspect_nodes(nodes: Sequence[tuple[str, bool]], gpus: float, seconds: float) -> list[NodeState | str]:
    """Inspect all nodes at once; return the state of each, or the reason why there is none.

    Args:
        nodes: Ray's name of each (empty without Ray), and whether this process runs on it.
        gpus: The share of a GPU that the inspection of a node takes; with 0 it leaves GPUs alone.
        seconds: How long to wait for the other nodes.
    """
    # On Ray, only a task that holds a share of a GPU may use it.
    others = [node for node, here in nodes if node and (not here or gpus)]
    answers = _ask_nodes(others, gpus, seconds) if others else {}
    return [answers[node] if node in answers else inspect_node(bool(gpus)) for node, _ in nodes]


def _ask_nodes(nodes: Sequence[str], gpus: float, seconds: float) -> dict[str, NodeState | str]:
    # A local run does not import Ray.
    from actors.node_tasks import ask_nodes

    return ask_nodes(nodes, inspect_node, bool(gpus), gpus=gpus, seconds=seconds)


def _gpu() -> Gpu | None:
    if not torch.cuda.is_available():
        return None
    return Gpu(torch.cuda.get_device_name(), free_memory(torch.device("cuda")))


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
