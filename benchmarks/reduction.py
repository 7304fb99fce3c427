"""Times the merges of one MLP's sums from 1, 2, 4 and 8 workers: `python -m benchmarks.reduction`.

Each worker holds what a method observes of one MLP, made before the clock starts: the moments of X (`gram`), or those
of the output with the squares of X (`slimllm`). The benchmark compares a run's tree of merges
over Ray's object store with a sum of the same bytes by torch.distributed's gloo. All workers are on this machine, with
one thread each: if there are more workers than cores, merges of one level share the cores.
"""

import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import click
import ray
import torch

from benchmarks.gloo import reduction_seconds
from benchmarks.local_ray import local_ray
from benchmarks.machine import describe_machine, figure, write_table
from slimllm_ops.moments.moments import merge_tree
from slimllm_ops.moments.observation import ObservationSum, PackedObservation
from slimllm_ops.moments.outputs import OutputObservation, OutputSum

WORKERS = (1, 2, 4, 8)
SHAPES = ((1024, 2816), (2048, 5632))
REPEATS = 3

Sums = PackedObservation | OutputObservation


def observe_moments(x_NP: torch.Tensor, states_ND: torch.Tensor) -> PackedObservation:
    """Return what `gram` observes of an MLP."""
    seen = ObservationSum()
    seen.add(x_NP, states_ND)
    return seen.packed()


def observe_outputs(x_NP: torch.Tensor, states_ND: torch.Tensor) -> OutputObservation:
    """Return what `slimllm` observes of an MLP."""
    seen = OutputSum(intercept=True)
    seen.add(x_NP, states_ND, states_ND)
    return seen.packed()


METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor], Sums]] = {"gram": observe_moments, "slimllm": observe_outputs}


class Holder:
    """A worker that has observed an MLP of random activations, as a method does."""

    def __init__(self, method: str, hidden: int, width: int, seed: int) -> None:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(seed)
        activations = (torch.randn(64, size, generator=generator) for size in (width, hidden))
        self._observed = METHODS[method](*activations)

    def observe(self) -> Sums:
        """Return the observation."""
        return self._observed

    def merge(self, left: Any, right: Any) -> Sums:
        """Return the two observations merged, as a shard does."""
        return left.merge(right)


@click.command()
@click.option(
    "--shape", "shapes", nargs=2, type=int, multiple=True, default=SHAPES, help="Hidden size and channels; repeatable."
)
@click.option("--workers", "counts", type=int, multiple=True, default=WORKERS, help="Number of workers; repeatable.")
@click.option("--output", type=Path, default=Path("benchmarks/results/reduction.md"))
def main(shapes: tuple[tuple[int, int], ...], counts: tuple[int, ...], output: Path) -> None:
    """Measure every number of workers and write the table."""
    rows = [["sums of", "each sends, MB", "all send, MB", "merges in a row", "tree, s", "gloo, s", "tree, of gloo"]]
    with local_ray(num_cpus=max(counts)):
        for (hidden, width), method, workers in product(shapes, METHODS, counts):
            rows.append(_row(method, hidden, width, workers))
            print(rows[-1], flush=True)
    write_table(output, "Reduction of one MLP's sums by workers", describe_machine(), rows)


def _row(method: str, hidden: int, width: int, workers: int) -> list[str]:
    holder = ray.remote(Holder).options(num_cpus=1)
    actors: list[Any] = [holder.remote(method, hidden, width, seed) for seed in range(workers)]
    # The first merge also pays for starting up, which is no part of a run's layers.
    times = [_tree_seconds(actors) for _ in range(REPEATS + 1)][1:]
    size = _bytes(actors[0])
    for actor in actors:
        ray.kill(actor)
    tree = statistics.median(times)
    name = f"`{method}`, {width} channels, {workers} worker(s)"
    steps = (workers - 1).bit_length()
    cells = [f"{size / 1e6:.3g}" if workers > 1 else "0", f"{(workers - 1) * size / 1e6:.3g}", str(steps)]
    if workers == 1:
        return [name, *cells, "", "", ""]
    gloo = reduction_seconds(workers, size // 8, REPEATS)
    return [name, *cells, figure(tree), figure(gloo), figure(tree / gloo)]


def _bytes(actor: Any) -> int:
    """Return the bytes that Ray holds for one worker's moments."""
    reference = actor.observe.remote()
    ray.wait([reference])
    counted = ray.get(reference).num_bytes
    stored = ray.experimental.get_object_locations([reference])[reference]["object_size"]
    if not counted <= stored < 1.01 * counted + 4096:
        raise SystemExit(f"Ray holds {stored} bytes, but counts {counted}")
    return stored


def _tree_seconds(actors: list[Any]) -> float:
    """Return the seconds that the merge takes, from all moments ready to their sum on the first worker."""
    references = [actor.observe.remote() for actor in actors]
    ray.wait(references, num_returns=len(references), fetch_local=False)
    start = time.perf_counter()
    ray.wait([_merge(actors, references)], fetch_local=False)
    return time.perf_counter() - start


def _merge(actors: list[Any], references: list[Any]) -> Any:
    """Merge as a group of shards does: in a tree, each pair on the worker that holds its left part."""

    def merge(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
        return left[0], left[0].merge.remote(left[1], right[1])

    return merge_tree(list(zip(actors, references, strict=True)), merge)[1]


if __name__ == "__main__":
    main()
