"""A solve runs in the process of the solve before it."""

import os
import time

import pytest
import ray

from actors.placement import Placement


@ray.remote
def process() -> int:
    return os.getpid()


@pytest.mark.usefixtures("local_ray")
def test_a_solve_runs_in_the_process_of_the_one_before() -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    with Placement(1, cpus, 0.0) as placement:
        solve = process.options(**placement.solve_options())
        first = ray.get(solve.remote())
        # Ray's own patience, where all CPUs are spoken for, is a second.
        time.sleep(2)
        assert ray.get(solve.remote()) == first
