"""Times a sum by torch.distributed's gloo, in separate processes that import only torch."""

import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def reduction_seconds(workers: int, numbers: int, repeats: int) -> float:
    """Return the median seconds that it takes to sum this many float64 numbers per process on the first process."""
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_reduce, (workers, numbers, repeats, _free_port(), queue), nprocs=workers)
    return queue.get()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _reduce(rank: int, workers: int, numbers: int, repeats: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    times = []
    for _ in range(repeats + 1):
        held = torch.ones(numbers, dtype=torch.float64)
        dist.barrier()
        start = time.perf_counter()
        dist.reduce(held, 0)
        dist.barrier()
        times.append(time.perf_counter() - start)
    if rank == 0:
        queue.put(statistics.median(times[1:]))
    dist.destroy_process_group()
