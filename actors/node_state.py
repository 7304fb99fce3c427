"""What a node has free, what is installed there and how fast it computes: asked before work is sent there.

This program's own node is looked at here; every other by a task of its own, which is waited for no longer than told.
"""

import os
import platform
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from tempfile import gettempdir

import torch

from slimllm_ops.stream.memory import free_memory
from slimllm_ops.stream.operations import Rates

# What workers compute with; Ray itself refuses a cluster of another Ray or Python.
PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "numpy")


@dataclass(frozen=True)
class Gpu:
    """A node's GPU: what it is called, and the bytes that are free on it."""

    name: str
    free: int


@dataclass(frozen=True)
class NodeState:
    """What was found on a node.

    Attributes:
        host: its name.
        packages: versions of the packages that workers compute with; "" where one is missing.
        free_memory: bytes.
        temporary: the folder for temporary files.
        free_disk: bytes, there.
        rates: of what workers will compute on; None where that is a GPU that was not to be touched.
        gpu: a GPU as torch sees it; None where it sees none, or none was asked for.
    """

    host: str
    packages: dict[str, str]
    free_memory: int
    temporary: str
    free_disk: int
    rates: Rates | None
    gpu: Gpu | None


def inspect_node(device: str, threads: int) -> NodeState:
    """Look at the node that this process runs on.

    Args:
        device: what to measure rates of: "cpu", "cuda" if torch sees one, or "" for none.
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
    """Look at nodes, all at once; return what was found on each, or why nothing was.

    Args:
        nodes: Ray's name of each (empty without Ray), and whether this process runs on it.
        device: As in `inspect_node`.
        threads: As in `inspect_node`.
        gpus: The share of a GPU that a worker will have, which a look at a GPU takes.
        seconds: How long to wait for the other nodes.
    """
    # On Ray, a GPU is looked at by a task that holds its share of it.
    others = [node for node, here in nodes if node and (not here or device == "cuda")]
    answers = _ask_nodes(others, device, threads, gpus if device == "cuda" else 0, seconds) if others else {}
    return [answers[node] if node in answers else inspect_node(device, threads) for node, _ in nodes]


def _ask_nodes(
    nodes: Sequence[str], device: str, threads: int, gpus: float, seconds: float
) -> dict[str, NodeState | str]:
    # A run in this process does without Ray.
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
    """Return the versions of the packages that workers compute with; "" where one is missing."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
