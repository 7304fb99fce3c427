"""Times the merges of one module's moments from 1, 2, 4 and 8 workers: `python -m benchmarks.reduction`.

Each worker holds the moments of one MLP, made before the clock starts. The benchmark compares a run's tree of merges
over Ray's object store with a sum of the same bytes by torch.distributed's gloo. All workers are on this machine, with
one thread each: if there are more workers than cores, merges of one level share the cores.
"""

import statistics
import time
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

WORKERS = (1, 2, 4, 8)
SHAPES = ((1024, 2816), (2048, 5632))
REPEATS = 3


class Holder:
    """A worker that has observed a module of random activations."""

    def __init__(self, hidden: int, width: int, seed: int) -> None:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(seed)
        seen = ObservationSum()
        seen.add(torch.randn(64, width, generator=generator), torch.randn(64, hidden, generator=generator))
        self._observed = seen.packed()

    def observe(self) -> PackedObservation:
        """Return the observation."""
        return self._observed

    def merge(self, left: PackedObservation, right: PackedObservation) -> PackedObservation:
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
    rows = [["moments of", "each sends, MB", "all send, MB", "merges in a row", "tree, s", "gloo, s", "tree, of gloo"]]
    with local_ray(num_cpus=max(counts)):
        for hidden, width in shapes:
            for workers in counts:
                rows.append(_row(hidden, width, workers))
                print(rows[-1], flush=True)
    write_table(output, "Reduction of one MLP's moments by workers", describe_machine(), rows)


def _row(hidden: int, width: int, workers: int) -> list[str]:
    actors: list[Any] = [ray.remote(Holder).options(num_cpus=1).remote(hidden, width, seed) for seed in range(workers)]
    # The first merge also pays for starting up, which is no part of a run's layers.
    times = [_tree_seconds(actors) for _ in range(REPEATS + 1)][1:]
    size = _bytes(actors[0])
    for actor in actors:
        ray.kill(actor)
    tree = statistics.median(times)
    name = f"{width} channels, {workers} worker(s)"
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
