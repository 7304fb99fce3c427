"""Starts the Ray that a benchmark runs on."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster.local_ray import local_ray as start


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """Start a local Ray with this many CPUs; if the process is connected to one, use that and leave it open."""
    if ray.is_initialized():
        yield
        return
    with start(num_cpus=num_cpus, log_to_driver=False, logging_level="ERROR"):
        yield
