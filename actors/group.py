"""Shards of the data that are driven together, on any kind of workers.

Results come in the order of the shards, and sums follow a tree in that order, so nothing depends on timing. Nor does
anything depend on which worker holds a shard: there are as many shards as workers were asked for, and a worker holds
several when the cluster has lost some.

A driver names the step that it wants and writes it as it would call it:

    shards.open_stream("pruned", checkpoint, blocks, deciding=True)
    observed = shards.merge("pruned", LayerStream.observe, layer, branch)
    decision = shards.decide("pruned", decide_heads, observed, layer, num_removed=2)
    shards.mean("pruned", LayerStream.apply, layer, branch, decision)
"""

from collections import Counter
from collections.abc import Callable
from functools import reduce
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

from actors.batching import into_batches, micro_batch_tokens, sequences_at_once, sequences_that_fit, split_evenly
from actors.calls import Share, SharedStream, label_of
from actors.shard import Arguments, Shard
from actors.workers import Reference, Workers, merge_on
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.moments.sums import Mean
from slimllm_ops.stream.footprint import Footprint
from slimllm_ops.stream.opening import open_generation, open_refinement, open_sensitivity, open_stream
from slimllm_ops.stream.padding import count_tokens
from slimllm_ops.stream.weights import compute_dtype

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

# Returns the number settled before under a name; else computes it and settles it.
Settle = Callable[[str, Callable[[], int]], int]
# Makes a checkpoint that every node can read from the driver's.
Delivery = Callable[[Checkpoint], Checkpoint]


class ShardGroup:
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
        self._workers = workers
        self._num_shards = num_shards
        self._note = note
        self._offload = offload
        self._settle = settle
        self._streams: dict[str, SharedStream] = {}
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
        deciding: bool = False,
        measures_change: bool = False,
        intercept: bool = True,
    ) -> None:
        """Spread token blocks (B, T), int32, evenly over the shards, in order; padding is no token.

        Args:
            name: The stream's name in later calls.
            checkpoint: The model that the blocks pass through.
            blocks_BT: The blocks.
            deciding: Whether branches wait for decisions, so that shards must hold their outputs.
            measures_change: Whether to measure how much a layer changes its input, so that shards must hold the input.
            intercept: Whether fits to the moments have an intercept.

        Raises:
            InputError: A worker lacks the memory for it.
        """
        device = self._workers.device
        footprint = Footprint.of(checkpoint, device, deciding=deciding, measures_change=measures_change)
        self._open(name, blocks_BT, footprint, open_stream, self.deliver(checkpoint), measures_change, intercept)

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
        models = (self.deliver(dense), self.deliver(pruned))
        self._open(name, blocks_BT, footprint, open_refinement, *models, origins)

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

    def close_stream(self, name: str) -> None:
        """Close a stream and free its memory."""
        shares = self._streams.pop(name).shares
        self._workers.get([self._workers.call(one.worker, "close", Shard.close, one.stream) for one in shares])

    def each(self, name: str, step: Callable[Concatenate[S, P], R], *arguments: P.args, **named: P.kwargs) -> list[R]:
        """Run a step on every shard; return the results in the order of the shards."""
        return self._workers.get(self._submit(name, step, (arguments, named)))

    def mean(self, name: str, step: Callable[Concatenate[S, P], Mean], *arguments: P.args, **named: P.kwargs) -> float:
        """Run a step on every shard; return the mean over all tokens."""
        return reduce(Mean.merge, self.each(name, step, *arguments, **named)).value

    def first(self, name: str, step: Callable[Concatenate[S, P], R], *arguments: P.args, **named: P.kwargs) -> R:
        """Run a step on the first shard alone."""
        share, packed = self._streams[name].shares[0], self._workers.put((arguments, named))
        call = self._workers.call(share.worker, label_of(step, arguments), Shard.run, share.stream, step, packed)
        return self._workers.get([call])[0]

    def merge(
        self, name: str, step: Callable[Concatenate[S, P], R], *arguments: P.args, **named: P.kwargs
    ) -> Reference[R]:
        """Run a step on every shard and merge the results where they are; do not wait.

        Only neighbours in the order of the shards are ever added.
        """
        workers = [share.worker for share in self._streams[name].shares]
        references = self._submit(name, step, (arguments, named))
        return merge_on(self._workers, workers, references)

    def decide(
        self,
        name: str,
        step: Callable[Concatenate[S, T, P], R],
        merged: Reference[T],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> Reference[R]:
        """Run a step on the first shard, where `merge` left its result; the step takes that result first.

        Raises:
            MiscountError: The merged moments are not of all tokens.
        """
        stream, label = self._streams[name], label_of(step, arguments)
        share, packed = stream.shares[0], self._workers.put((arguments, named))
        checked = self._workers.call(share.worker, label, Shard.require_tokens, merged, stream.num_tokens, label)
        self._workers.get([checked])
        return self._workers.call(share.worker, label, Shard.run_with, share.stream, step, merged, packed)

    def give(
        self,
        name: str,
        step: Callable[Concatenate[S, T, P], R],
        value: Reference[T],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> list[R]:
        """Run a step on every shard; its first argument is a value that is on the cluster."""
        packed, label = self._workers.put((arguments, named)), label_of(step, arguments)
        return self._workers.get(
            [
                self._workers.call(share.worker, label, Shard.run_with, share.stream, step, value, packed)
                for share in self._streams[name].shares
            ]
        )

    def get(self, reference: Reference[T]) -> T:
        """Return the value of a reference."""
        return self._workers.get([reference])[0]

    def peak_memory(self) -> dict[str, int]:
        """Return the highest peak of any worker that is not lost, in bytes, for the host and for the GPU."""
        peaks = self._workers.call_living(Shard.peak_memory)
        return {kind: max(peak[kind] for peak in peaks) for kind in peaks[0]} if peaks else {}

    def _submit(self, name: str, step: Callable[..., R], arguments: Arguments) -> list[Reference[R]]:
        packed, label = self._workers.put(arguments), label_of(step, arguments[0])
        return [
            self._workers.call(share.worker, label, Shard.run, share.stream, step, packed)
            for share in self._streams[name].shares
        ]

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
