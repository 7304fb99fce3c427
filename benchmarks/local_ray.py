"""The Ray that a benchmark runs on."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """Start a local Ray with this many CPUs; a Ray that the process is connected to is used and left open."""
    if ray.is_initialized():
        yield
        return
    ray.init("local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
