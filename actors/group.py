"""Shards of the data that are driven together, on any kind of workers.

A driver opens a stream, `shards.open_layerwise("pruned", checkpoint, blocks)`, and runs its steps
(`actors.steps`). Nothing depends on which worker holds a shard: there are as many shards as workers were asked for, and
a worker holds several when the cluster has lost some.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from actors.batching import (
    LONGEST_REQUEST,
    into_batches,
    micro_batch_tokens,
    requests_at_once,
    scored_at_once,
    sequences_at_once,
    sequences_that_fit,
    split_evenly,
)
from actors.calls import Share, SharedStream
from actors.shard import Shard
from actors.steps import ShardSteps
from actors.workers import Workers
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.whole import WholeModel
from slimllm_ops.evaluation.opening import open_answering, open_scoring
from slimllm_ops.stream.footprint import Footprint
from slimllm_ops.stream.opening import open_generation, open_layerwise, open_pair, open_sensitivity, open_stream
from slimllm_ops.stream.padding import count_tokens
from slimllm_ops.stream.paired import PairedStream
from slimllm_ops.stream.refinement import RefinementStream
from slimllm_ops.stream.weights import compute_dtype
from slimllm_ops.training.branches import BranchTrainingStream

# Returns the number settled before under a name; else computes it and settles it.
Settle = Callable[[str, Callable[[], int]], int]
# Makes a checkpoint that every node can read from the driver's.
Delivery = Callable[[Checkpoint], Checkpoint]


class ShardGroup(ShardSteps):
    """Shards that are called together; a context manager that ends their workers.

    The workers start with the first stream, so a run that opens no stream starts none.

    Args:
        workers: Where the shards live.
        num_shards: Into how many shares the data are cut.
        deliver: Makes a checkpoint that every node can read.
        note: Receives a line when memory is short.
        offload: Whether the workers hold hidden states in files.
        settle: Keeps the sizes of micro-batches, on which sums depend, for a resumed run.
    """

    def __init__(
        self,
        workers: Workers,
        num_shards: int,
        *,
        deliver: Delivery = lambda checkpoint: checkpoint,
        note: Callable[[str], None] = lambda text: None,
        offload: bool = False,
        settle: Settle = lambda name, compute: compute(),
    ) -> None:
        super().__init__(workers)
        self._num_shards = num_shards
        self._note = note
        self._offload = offload
        self._settle = settle
        self.deliver = deliver

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the shards compute in."""
        return compute_dtype(self._workers.device)

    def __enter__(self) -> "ShardGroup":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and all streams with them."""
        self._workers.close()
        self._streams = {}

    def lose(self) -> None:
        """End all workers and streams after a worker was lost; fewer workers may start next.

        Raises:
            HeadLostError: Ray's head is lost too.
        """
        self._workers.lose()
        self._streams = {}

    def open_stream(
        self,
        name: str,
        checkpoint: Checkpoint,
        blocks_BT: np.ndarray,
        *,
        measures_change: bool = False,
    ) -> None:
        """Spread token blocks (B, T), int32, evenly over the shards, in order; padding is no token.

        Args:
            name: The stream's name in later calls.
            checkpoint: The model that the blocks pass through.
            blocks_BT: The blocks.
            measures_change: Whether to measure how much a layer changes its input, so that shards must hold the input.

        Raises:
            InputError: A worker lacks the memory for it.
        """
        footprint = Footprint.of(checkpoint, self._workers.device, measures_change=measures_change)
        self._open(name, blocks_BT, footprint, open_stream, self.deliver(checkpoint), measures_change)

    def open_layerwise(
        self, name: str, checkpoint: Checkpoint, blocks_BT: np.ndarray, *, intercept: bool = True
    ) -> None:
        """Spread blocks over the shards; their branches wait for decisions, so the shards hold activations.

        Args:
            name: The stream's name in later calls.
            checkpoint: The model.
            blocks_BT: The blocks, int32.
            intercept: Whether fits have an intercept.

        Raises:
            InputError: A worker lacks the memory for it.
        """
        footprint = Footprint.of_layerwise(checkpoint, self._workers.device)
        self._open(name, blocks_BT, footprint, open_layerwise, self.deliver(checkpoint), intercept)

    def open_refinement(
        self, name: str, dense: Checkpoint, pruned: Checkpoint, blocks_BT: np.ndarray, origins: tuple[int, ...]
    ) -> None:
        """Spread blocks over the shards; they pass through the dense and the pruned model side by side.

        Args:
            name: The stream's name in later calls.
            dense: The dense model.
            pruned: The pruned model, whose layers later calls number.
            blocks_BT: The blocks, int32.
            origins: The dense layer that each pruned layer comes from.

        Raises:
            InputError: A worker lacks the memory for it.
        """
        footprint = Footprint.of_refinement(dense, pruned, self._workers.device)
        self._open_pair(name, blocks_BT, footprint, dense, pruned, origins, RefinementStream)

    def open_branch_training(
        self, name: str, dense: Checkpoint, pruned: Checkpoint, blocks_BT: np.ndarray, origins: tuple[int, ...]
    ) -> None:
        """Spread blocks over the shards; the pruned model's branches are trained beside the dense model.

        Args:
            name: The stream's name in later calls.
            dense: The dense model.
            pruned: The pruned model, whose layers later calls number.
            blocks_BT: The blocks, int32.
            origins: The dense layer that each pruned layer comes from.

        Raises:
            InputError: A worker lacks the memory for it.
        """
        footprint = Footprint.of_branch_training(dense, pruned, self._workers.device)
        self._open_pair(name, blocks_BT, footprint, dense, pruned, origins, BranchTrainingStream)

    def open_sensitivity(self, name: str, checkpoint: Checkpoint, blocks_BT: np.ndarray) -> None:
        """Spread blocks over the shards; they pass through the dense model forward, then backward.

        Args:
            name: The stream's name in later calls.
            checkpoint: The model.
            blocks_BT: The blocks, int32.

        Raises:
            InputError: A worker lacks the memory for it.
        """
        footprint = Footprint.of_sensitivity(checkpoint, self._workers.device)
        self._open(name, blocks_BT, footprint, open_sensitivity, self.deliver(checkpoint))

    def open_generation(self, name: str, checkpoint: Checkpoint, prompts: np.ndarray, *, length: int, seed: int) -> int:
        """Spread prompts over the workers. Each worker holds the model, and continues its prompts.

        Args:
            name: The stream's name in later calls.
            checkpoint: The model.
            prompts: Rows (N, 1 + P), int32: the number of each sequence, then its prompt.
            length: The tokens of a sequence, prompt included.
            seed: The seed of the random numbers.

        Returns:
            The most batches that a worker has to sample.

        Raises:
            InputError: A worker lacks the memory for one sequence.
        """
        num_workers, device, free = self._workers.start(), self._workers.device, self._free_memory()
        whole, by_layer = (Footprint.of_generation(checkpoint, device, keep_layers=keep) for keep in (True, False))
        at_once = self._settle(name, lambda: sequences_at_once(whole, by_layer, length, free))
        if not (keeps_layers := sequences_that_fit(whole, length, free) >= at_once):
            self._note(f"the model does not fit the {free / 1e9:.1f} GB per worker: every token reads it from the disk")
        batches = [prompts[start : start + at_once] for start in range(0, len(prompts), at_once)]
        # Results do not depend on the shard, so a worker never holds the model twice.
        parts = split_evenly(batches, min(self._num_shards, num_workers))
        self._spread(name, parts, open_generation, self.deliver(checkpoint), length, seed, keeps_layers)
        return len(parts[0])

    def open_scoring(self, name: str, models: Sequence[WholeModel], windows_WT: np.ndarray) -> int:
        """Spread windows over the shards; whole models score them.

        Args:
            name: The stream's name in later calls.
            models: The models, which every worker reads at the same paths; the first is the reference.
            windows_WT: Token ids, int32; padding stands at the end of a window.

        Returns:
            The most batches that a shard has to score.

        Raises:
            InputError: A worker lacks the memory for it.
        """
        self._workers.start()
        footprint = Footprint.of_whole(models, self._workers.device)
        tokens = scored_at_once(footprint, windows_WT.shape[1], self._free_memory())
        parts = split_evenly(into_batches(windows_WT, tokens), self._num_shards)
        self._spread(name, parts, open_scoring, tuple(one.directory for one in models))
        return len(parts[0])

    def open_answering(self, name: str, model: WholeModel, batch_size: int | None) -> int:
        """Let every shard hold a whole model that answers requests; return how many shards there are.

        Args:
            name: The stream's name in later calls.
            model: The model, which every worker reads at the same path.
            batch_size: The requests that a shard answers at once; None for as many as its memory holds.
        """
        num_workers, footprint = self._workers.start(), Footprint.of_whole([model], self._workers.device)
        length = min(model.max_length or LONGEST_REQUEST, LONGEST_REQUEST)
        at_once = batch_size or requests_at_once(footprint, length, self._free_memory())
        # Answers do not depend on the shard, so a worker never holds the model twice.
        empty: list[np.ndarray] = [np.zeros((1, 1), dtype=np.int32)]
        self._spread(name, [empty] * num_workers, open_answering, model.directory, at_once)
        return num_workers

    def peak_memory(self) -> dict[str, int]:
        """Return the highest peak of any worker that is not lost, in bytes, for the host and for the GPU."""
        peaks = self._workers.call_living(Shard.peak_memory)
        return {kind: max(peak[kind] for peak in peaks) for kind in peaks[0]} if peaks else {}

    def _open_pair(
        self,
        name: str,
        blocks_BT: np.ndarray,
        footprint: Footprint,
        dense: Checkpoint,
        pruned: Checkpoint,
        origins: tuple[int, ...],
        kind: type[PairedStream],
    ) -> None:
        models = (self.deliver(dense), self.deliver(pruned))
        self._open(name, blocks_BT, footprint, open_pair, *models, origins, kind)

    def _open(
        self, name: str, blocks_BT: np.ndarray, footprint: Footprint, build: Callable[..., Any], *models: Any
    ) -> None:
        num_workers = self._workers.start()
        held_blocks = 0 if self._offload else -(-len(blocks_BT) // num_workers)
        tokens = self._settle(
            name, lambda: micro_batch_tokens(footprint, blocks_BT, held_blocks, self._free_memory(), self._note)
        )
        self._spread(name, split_evenly(into_batches(blocks_BT, tokens), self._num_shards), build, *models)

    def _spread(self, name: str, parts: list[list[np.ndarray]], build: Callable[..., Any], *models: Any) -> None:
        """Give each shard its batches, unless it has none, and let it open a stream of them."""
        num_workers, parts = self._workers.start(), [part for part in parts if part]
        sent = [self._workers.put(model) for model in models]
        shares = [Share(number % num_workers, f"{name}, shard {number}") for number in range(len(parts))]
        self._streams[name] = SharedStream(shares, sum(count_tokens(batch) for part in parts for batch in part))
        self._workers.get(
            [
                self._workers.call(share.worker, f"open {name}", Shard.open, share.stream, build, part, *sent)
                for share, part in zip(shares, parts, strict=True)
            ]
        )

    def _free_memory(self) -> int:
        """Return the fewest bytes that are free for one worker; workers of one machine or GPU share them."""
        answers = self._workers.call_all(Shard.free_memory)
        sharers = Counter(where for where, _ in answers)
        return min(free // sharers[where] for where, free in answers)
