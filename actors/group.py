"""A group of shards on Ray: the only place that knows of actors, placement and waiting.

Results come in the order of the shards, and sums are made in a tree of that order, so nothing depends on timing.
"""

from collections import Counter
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch

from actors.batching import BATCH_TOKENS, into_batches
from actors.placement import START_SECONDS, Placement
from actors.serving import Delivery
from actors.shard import Refitted, Shard
from actors.waiting import get_in_order, get_one
from slimllm_ops.checkpoint import Checkpoint
from slimllm_ops.errors import InputError
from slimllm_ops.families import Branch
from slimllm_ops.footprint import Footprint
from slimllm_ops.moments import merge_tree
from slimllm_ops.plan import Decision
from slimllm_ops.stream import Mean, compute_dtype


class ShardGroup:
    """Shards that are called together; close it, or use it as a context manager, and its actors end.

    The actors start when the first data are sent to them: a run that needs none starts none.

    Args:
        placement: where they run.
        deliver: makes a checkpoint one that every node can read.
        note: told where memory is short.
        offload: let them hold hidden states in files.
    """

    def __init__(
        self, placement: Placement, deliver: Delivery, note: Callable[[str], None], *, offload: bool = False
    ) -> None:
        self._placement = placement
        self._deliver = deliver
        self._note = note
        self._offload = offload
        self._actors: list[Any] = []
        # Of every stream, the shards that hold a share of it; a short text does not reach all of them.
        self._holders: dict[str, list[Any]] = {}

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the shards compute in."""
        return compute_dtype(torch.device(self._placement.device))

    def start(self) -> None:
        """Start the actors and wait until every one of them is placed; nothing where they run already.

        Raises:
            ShardError: they were not placed in time.
        """
        if self._actors:
            return
        remote = ray.remote(max_restarts=0, max_task_retries=0)(Shard)
        place = self._placement
        self._actors = [
            remote.options(**place.worker_options(number)).remote(place.device, place.cpus_per_worker, self._offload)
            for number in range(place.num_workers)
        ]
        get_in_order([actor.peak_memory.remote() for actor in self._actors], START_SECONDS)

    def __enter__(self) -> "ShardGroup":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def open_stream(self, name: str, checkpoint: Checkpoint, blocks_BT: np.ndarray, *, deciding: bool = False) -> None:
        """Spread token blocks (B, T), int32, over the shards, in order and evenly.

        Args:
            name: what the stream is called from here on.
            checkpoint: the model that they pass.
            blocks_BT: the blocks.
            deciding: whether branches will wait for decisions, so that their outputs are held.

        Raises:
            InputError: a worker has not the memory for it.
        """
        device = torch.device(self._placement.device)
        footprint = Footprint.of(checkpoint, device, deciding=deciding)
        self._open(name, blocks_BT, footprint, "open_stream", checkpoint)

    def _open(
        self, name: str, blocks_BT: np.ndarray, footprint: Footprint, method: str, *checkpoints: Checkpoint
    ) -> None:
        self.start()
        batches = into_batches(blocks_BT, self._tokens_at_once(footprint, blocks_BT))
        models = [ray.put(self._deliver(checkpoint)) for checkpoint in checkpoints]
        shares = [share for share in _split_evenly(batches, len(self._actors)) if share]
        self._holders[name] = self._actors[: len(shares)]
        get_in_order(
            [
                getattr(actor, method).remote(name, *models, share)
                for actor, share in zip(self._holders[name], shares, strict=True)
            ]
        )

    def close_stream(self, name: str) -> None:
        """Give a stream's memory back."""
        get_in_order([actor.close_stream.remote(name) for actor in self._holders.pop(name)])

    def forward(self, name: str, layer: int) -> float:
        """Pass a whole layer; return the mean cosine of its input and output."""
        return _mean(get_in_order([actor.forward.remote(name, layer) for actor in self._holders[name]]))

    def observe(self, name: str, layer: int, branch: Branch) -> ray.ObjectRef:
        """Run a branch up to its output projection; return a reference to the merged moments."""
        actors = self._holders[name]
        # Nobody waits here: moments stay on the cluster, and an error reaches whoever decides from them.
        return merge_on_actors(actors, [actor.observe.remote(name, layer, branch) for actor in actors])

    def observe_dense(self, name: str, layer: int, branch: Branch) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        """Pass a branch as it is; return references to the merged moments, and to E|h|^2 of what it leaves."""
        actors = self._holders[name]
        calls = [actor.observe_dense.options(num_returns=2).remote(name, layer, branch) for actor in actors]
        observed, powers = zip(*calls, strict=True)
        return merge_on_actors(actors, list(observed)), actors[0].mean.remote(*powers)

    def decide_heads(self, name: str, layer: int, observed: ray.ObjectRef, **counts: Any) -> Decision:
        """Decide a layer's attention, where its moments were merged."""
        return get_one(self._holders[name][0].decide_heads.remote(name, layer, observed, **counts))

    def decide_channels(self, name: str, layer: int, observed: ray.ObjectRef, **counts: Any) -> Decision:
        """Decide a layer's MLP, where its moments were merged."""
        return get_one(self._holders[name][0].decide_channels.remote(name, layer, observed, **counts))

    def apply(self, name: str, layer: int, branch: Branch, decision: Decision | None) -> float:
        """Add the observed branch's output, pruned or dense, to every shard's hidden states; return E|h|^2."""
        shared = ray.put(decision)
        return _mean(get_in_order([actor.apply.remote(name, layer, branch, shared) for actor in self._holders[name]]))

    def negative_log_likelihood(self, name: str) -> float:
        """Return the mean negative log-likelihood per token of a stream that has passed every layer."""
        return _mean(get_in_order([actor.negative_log_likelihood.remote(name) for actor in self._holders[name]]))

    def open_refinement(self, name: str, dense: Checkpoint, pruned: Checkpoint, blocks_BT: np.ndarray) -> None:
        """Spread blocks over the shards, each to pass the dense and the pruned model side by side."""
        footprint = Footprint.of_refinement(dense, pruned, torch.device(self._placement.device))
        self._open(name, blocks_BT, footprint, "open_refinement", dense, pruned)

    def alignment(self, name: str, layer: int, branch: Branch) -> np.ndarray:
        """Observe both streams' inputs of a branch, align every shard's pruned one, and return the map (D, D)."""
        actors = self._holders[name]
        observed = merge_on_actors(actors, [actor.observe_inputs.remote(name, layer, branch) for actor in actors])
        solved = actors[0].solve_alignment.remote(observed)
        get_in_order([actor.align.remote(name, layer, branch, solved) for actor in actors])
        return get_one(solved)

    def refit(self, name: str, layer: int, branch: Branch) -> Refitted:
        """Observe a branch's target, refit its output projection in every shard's pruned stream, and return it."""
        actors = self._holders[name]
        observed = merge_on_actors(actors, [actor.observe_targets.remote(name, layer, branch) for actor in actors])
        solved = actors[0].solve_refit.remote(name, layer, branch, observed)
        get_in_order([actor.apply_refit.remote(name, layer, branch, solved) for actor in actors])
        return get_one(solved)

    def probe(self, name: str) -> np.ndarray:
        """Return the hidden states (T', D) of a stream's first tokens."""
        return get_one(self._holders[name][0].probe.remote(name))

    def probed_ids(self, name: str) -> np.ndarray:
        """Return the ids (T',) of the tokens that `probe` shows."""
        return get_one(self._holders[name][0].probed_ids.remote(name))

    def peak_memory(self) -> dict[str, int]:
        """Return the highest peak of any shard, in bytes, for the host and for the GPU."""
        peaks = get_in_order([actor.peak_memory.remote() for actor in self._actors])
        return {kind: max(peak[kind] for peak in peaks) for kind in peaks[0]} if peaks else {}

    def _tokens_at_once(self, footprint: Footprint, blocks_BT: np.ndarray) -> int:
        """Return how many tokens a micro-batch has: as many as keep a processor busy, less where memory is short."""
        num_workers, length = len(self._actors), blocks_BT.shape[1]
        held_tokens = 0 if self._offload else -(-len(blocks_BT) // num_workers) * length
        free = self._free_memory()
        tokens = footprint.tokens_at_once(free, held_tokens)
        if tokens < length:
            held = footprint.states_per_token * held_tokens
            needed = footprint.fixed + held + footprint.activations_per_token * length
            raise InputError(
                f"each of {num_workers} worker(s) needs {needed / 1e9:.1f} GB, {held / 1e9:.1f} of them for the hidden "
                f"states of its tokens, and {free / 1e9:.1f} GB are free for it: add --offload, or workers on other "
                f"nodes, or calibrate on fewer or shorter blocks"
            )
        if tokens < min(BATCH_TOKENS, blocks_BT.size):
            self._note(f"micro-batches of {tokens // length * length} tokens: {free / 1e9:.1f} GB are free per worker")
        return min(tokens, BATCH_TOKENS)

    def _free_memory(self) -> int:
        """Return the bytes that are free for one worker, where there are fewest; workers of a machine or GPU share."""
        answers = get_in_order([actor.free_memory.remote() for actor in self._actors])
        sharers = Counter(where for where, _ in answers)
        return min(free // sharers[where] for where, free in answers)


def _split_evenly(batches: list[np.ndarray], num_shares: int) -> list[list[np.ndarray]]:
    """Cut a list into contiguous shares whose lengths differ by one at most, the longer ones first."""
    size, longer = divmod(len(batches), num_shares)
    starts = [share * size + min(share, longer) for share in range(num_shares + 1)]
    return [batches[start:stop] for start, stop in pairwise(starts)]


def _mean(parts: list[Mean]) -> float:
    return reduce(Mean.merge, parts).value


def merge_on_actors(actors: list[Any], refs: list[ray.ObjectRef]) -> ray.ObjectRef:
    """Merge observations on the actors that hold them; only neighbours in the shards' order are ever added."""

    def merge(left: tuple[Any, ray.ObjectRef], right: tuple[Any, ray.ObjectRef]) -> tuple[Any, ray.ObjectRef]:
        actor, ref = left
        return actor, actor.merge.remote(ref, right[1])

    return merge_tree(list(zip(actors, refs, strict=True)), merge)[1]
