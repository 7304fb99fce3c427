"""A group of shards on Ray: the only place that knows of actors, placement and waiting.

Results come in the order of the shards, and sums are made in a tree of that order, so nothing depends on timing. Nor
does anything depend on which worker holds a shard: there are as many shards as workers were asked for, and where the
cluster has lost some of those, a worker holds several.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch

from actors.batching import BATCH_TOKENS, into_batches
from actors.errors import ShardError
from actors.placement import START_SECONDS, Placement
from actors.serving import Delivery
from actors.shard import Refined, Shard
from actors.waiting import get_in_order, get_one, require_head, which_answer
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.errors import InputError
from slimllm_ops.models.families import Branch
from slimllm_ops.moments.moments import merge_tree
from slimllm_ops.stream.footprint import Footprint
from slimllm_ops.stream.passes import Mean
from slimllm_ops.stream.weights import compute_dtype

# How long lost workers are waited for when others live, which can take over what they held.
REPLACE_SECONDS = 30.0

# Returns the number of that name that was settled before; without one, what is computed, which is then settled.
Settle = Callable[[str, Callable[[], int]], int]


@dataclass(frozen=True)
class Share:
    """A stream's share of the data: the worker that holds it, and what it is called there."""

    actor: Any
    stream: str


@dataclass(frozen=True)
class SharedStream:
    """A stream through a model, spread over workers; a short text does not give every shard a share."""

    shares: list[Share]
    num_tokens: int

    def call(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        """Call a method of every share's shard."""
        return [getattr(share.actor, method).remote(share.stream, *arguments) for share in self.shares]

    @property
    def first(self) -> Share:
        """The share where sums end, and so where decisions are made."""
        return self.shares[0]


class ShardGroup:
    """Shards that are called together; close it, or use it as a context manager, and its actors end.

    The actors start when the first data are sent to them: a run that needs none starts none.

    Args:
        placement: where they run.
        deliver: makes a checkpoint one that every node can read.
        note: told where memory is short, and where workers are missing.
        num_shards: in how many shares the data are cut; by default one for each worker.
        offload: let them hold hidden states in files.
        settle: keeps the sizes of micro-batches, on which sums depend, for whoever does the same work again.
    """

    def __init__(
        self,
        placement: Placement,
        deliver: Delivery,
        note: Callable[[str], None],
        *,
        num_shards: int | None = None,
        offload: bool = False,
        settle: Settle = lambda name, compute: compute(),
    ) -> None:
        self._placement = placement
        self._deliver = deliver
        self._note = note
        self._num_shards = num_shards or placement.num_workers
        self._offload = offload
        self._settle = settle
        self._actors: list[Any] = []
        self._lost = False
        self._streams: dict[str, SharedStream] = {}

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the shards compute in."""
        return compute_dtype(torch.device(self._placement.device))

    def start(self) -> None:
        """Start the actors and wait until they are placed; nothing where they run already.

        Raises:
            ShardError: they were not placed in time; after a loss, none of them was.
        """
        if self._actors:
            return
        if self._lost:
            self._start_who_can()
            return
        self._actors = self._submit_actors()
        get_in_order([actor.peak_memory.remote() for actor in self._actors], START_SECONDS)

    def lose(self) -> None:
        """End all actors, and with them all streams, after one was lost: those that start next may be fewer.

        Raises:
            HeadLostError: it is Ray's head that was lost.
        """
        require_head()
        self.close()
        self._lost = True

    def _start_who_can(self) -> None:
        """Start as many actors as are placed within half a minute; where none is, wait for longer."""
        require_head()
        deadline = time.monotonic() + START_SECONDS
        placed = self._placed(self._submit_actors(), deadline)
        while not placed and time.monotonic() < deadline:
            # All died as they came, of what killed the others perhaps, which may be over by now.
            placed = self._placed(self._submit_actors(), deadline)
        if not placed:
            raise ShardError(
                f"no worker was placed within {START_SECONDS:.0f} s of the loss: "
                f"is there a node left with {self._placement.cpus_per_worker} CPUs?"
            )
        if len(placed) < self._placement.num_workers:
            self._note(
                f"{len(placed)} of {self._placement.num_workers} workers have a place; "
                f"they take over the data of the others"
            )
        self._actors = placed

    def _placed(self, actors: list[Any], deadline: float) -> list[Any]:
        """Return the actors that answer, half a minute after the first or once none can any more; end the others."""
        pings = [actor.peak_memory.remote() for actor in actors]
        answers = which_answer(pings, REPLACE_SECONDS)
        while None in answers and not any(answers) and time.monotonic() < deadline:
            answers = which_answer(pings, REPLACE_SECONDS)
        for actor, answered in zip(actors, answers, strict=True):
            if not answered:
                ray.kill(actor)
        return [actor for actor, answered in zip(actors, answers, strict=True) if answered]

    def _submit_actors(self) -> list[Any]:
        # Never restarted by Ray, which would give back a worker without its states, and call that the same one.
        remote = ray.remote(max_restarts=0, max_task_retries=0)(Shard)
        place = self._placement
        return [
            remote.options(**place.worker_options(number)).remote(place.device, place.cpus_per_worker, self._offload)
            for number in range(place.num_workers)
        ]

    def __enter__(self) -> "ShardGroup":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._streams = [], {}

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
        """Spread token blocks (B, T), int32, over the shards, in order and evenly.

        Args:
            name: what the stream is called from here on.
            checkpoint: the model that they pass.
            blocks_BT: the blocks.
            deciding: whether branches will wait for decisions, so that their outputs are held.
            measures_change: whether it is seen what layers change, so that what enters them is held.
            intercept: whether recoveries from what is observed may fit an intercept.

        Raises:
            InputError: a worker has not the memory for it.
        """
        device = torch.device(self._placement.device)
        footprint = Footprint.of(checkpoint, device, deciding=deciding, measures_change=measures_change)
        self._open(name, blocks_BT, footprint, "open_stream", (checkpoint,), measures_change, intercept)

    def _open(
        self,
        name: str,
        blocks_BT: np.ndarray,
        footprint: Footprint,
        method: str,
        checkpoints: tuple[Checkpoint, ...],
        *settings: Any,
    ) -> None:
        self.start()
        at_once = self._settle(name, lambda: self._tokens_at_once(footprint, blocks_BT))
        batches = into_batches(blocks_BT, at_once)
        models = [ray.put(self._deliver(checkpoint)) for checkpoint in checkpoints]
        parts = [part for part in _split_evenly(batches, self._num_shards) if part]
        shares = [
            Share(self._actors[number % len(self._actors)], f"{name}, shard {number}") for number in range(len(parts))
        ]
        self._streams[name] = SharedStream(shares, blocks_BT.size)
        get_in_order(
            [
                getattr(share.actor, method).remote(share.stream, *models, part, *settings)
                for share, part in zip(shares, parts, strict=True)
            ]
        )

    def close_stream(self, name: str) -> None:
        """Give a stream's memory back."""
        get_in_order(self._streams.pop(name).call("close_stream"))

    def forward(self, name: str, layer: int) -> float:
        """Pass a whole layer; return the mean cosine of its input and output."""
        return _mean(get_in_order(self._streams[name].call("forward", layer)))

    def forward_pruned(self, name: str, layer: int, plan: LayerPlan) -> None:
        """Pass a layer as a plan leaves it, with nothing observed."""
        get_in_order(self._streams[name].call("forward_pruned", layer, ray.put(plan)))

    def observe(self, name: str, layer: int, branch: Branch) -> ray.ObjectRef:
        """Run a branch up to its output projection; return a reference to the merged moments."""
        # Nobody waits here: moments stay on the cluster, and an error reaches whoever decides from them.
        return self._merged(name, "observe", layer, branch)

    def observe_dense(self, name: str, layer: int, branch: Branch) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        """Pass a branch as it is; return references to the merged moments, and to two powers.

        Those are E|h|^2 of the states that it leaves, and of what the layer has added to them so far, where that is
        measured, else None.
        """
        stream = self._streams[name]
        calls = [
            share.actor.observe_dense.options(num_returns=2).remote(share.stream, layer, branch)
            for share in stream.shares
        ]
        observed, passages = zip(*calls, strict=True)
        merged = merge_on_actors([share.actor for share in stream.shares], list(observed))
        return merged, stream.first.actor.mean_powers.remote(*passages)

    def decide_heads(self, name: str, layer: int, observed: ray.ObjectRef, **counts: Any) -> Decision:
        """Decide a layer's attention, where its moments were merged."""
        return self._decide(name, "decide_heads", layer, observed, counts)

    def decide_channels(self, name: str, layer: int, observed: ray.ObjectRef, **counts: Any) -> Decision:
        """Decide a layer's MLP, where its moments were merged."""
        return self._decide(name, "decide_channels", layer, observed, counts)

    def apply(self, name: str, layer: int, branch: Branch, decision: Decision | None) -> float:
        """Add the observed branch's output, pruned or dense, to every shard's hidden states; return E|h|^2."""
        return _mean(get_in_order(self._streams[name].call("apply", layer, branch, ray.put(decision))))

    def negative_log_likelihood(self, name: str) -> float:
        """Return the mean negative log-likelihood per token of a stream that has passed every layer."""
        return _mean(get_in_order(self._streams[name].call("negative_log_likelihood")))

    def open_refinement(
        self, name: str, dense: Checkpoint, pruned: Checkpoint, blocks_BT: np.ndarray, origins: Sequence[int]
    ) -> None:
        """Spread blocks over the shards, each to pass the dense and the pruned model side by side.

        Args:
            name: what the stream is called from here on.
            dense: the model as it was.
            pruned: the model as it is pruned; layers are numbered as here.
            blocks_BT: the blocks, int32.
            origins: which dense layer each of the pruned ones is.
        """
        footprint = Footprint.of_refinement(dense, pruned, torch.device(self._placement.device))
        self._open(name, blocks_BT, footprint, "open_refinement", (dense, pruned), tuple(origins))

    def forward_dropped(self, name: str, layer: int) -> None:
        """Pass a dense layer that the pruned model has not."""
        get_in_order(self._streams[name].call("forward_dropped", layer))

    def align(self, name: str, layer: int, branch: Branch) -> Refined:
        """Observe both streams' inputs of a branch, align every shard's pruned one; return its input projections."""
        observed = self._merged(name, "observe_inputs", layer, branch)
        aligned = self._solve(name, "solve_alignment", layer, branch, observed)
        get_in_order(self._streams[name].call("align", layer, aligned))
        return get_one(aligned)

    def refit(self, name: str, layer: int, branch: Branch) -> Refined:
        """Observe a branch's target, refit its output projection in every shard's pruned stream, and return it."""
        observed = self._merged(name, "observe_targets", layer, branch)
        refitted = self._solve(name, "solve_refit", layer, branch, observed)
        get_in_order(self._streams[name].call("apply_refit", layer, branch, refitted))
        return get_one(refitted)

    def forward_refined(self, name: str, layer: int, refined: Checkpoint) -> None:
        """Pass a layer that is refined already in both streams, with nothing observed."""
        get_in_order(self._streams[name].call("forward_refined", layer, ray.put(self._deliver(refined))))

    def probe(self, name: str) -> np.ndarray:
        """Return the hidden states (T', D) of a stream's first tokens."""
        first = self._streams[name].first
        return get_one(first.actor.probe.remote(first.stream))

    def probed_ids(self, name: str) -> np.ndarray:
        """Return the ids (T',) of the tokens that `probe` shows."""
        first = self._streams[name].first
        return get_one(first.actor.probed_ids.remote(first.stream))

    def peak_memory(self) -> dict[str, int]:
        """Return the highest peak of any shard, in bytes, for the host and for the GPU."""
        peaks = get_in_order([actor.peak_memory.remote() for actor in self._actors])
        return {kind: max(peak[kind] for peak in peaks) for kind in peaks[0]} if peaks else {}

    def _merged(self, name: str, method: str, layer: int, branch: Branch) -> ray.ObjectRef:
        """Let every shard observe; return a reference to the merged moments."""
        stream = self._streams[name]
        return merge_on_actors([share.actor for share in stream.shares], stream.call(method, layer, branch))

    def _decide(
        self, name: str, method: str, layer: int, observed: ray.ObjectRef, counts: dict[str, int | float]
    ) -> Decision:
        first = self._streams[name].first
        self._require_tokens(name, observed, f"layer {layer}")
        return get_one(getattr(first.actor, method).remote(first.stream, layer, observed, **counts))

    def _solve(self, name: str, method: str, layer: int, branch: Branch, observed: ray.ObjectRef) -> ray.ObjectRef:
        """Solve for a branch's tensors where the moments were merged; return a reference to them."""
        first = self._streams[name].first
        self._require_tokens(name, observed, f"layer {layer}, {branch.described}")
        return getattr(first.actor, method).remote(first.stream, layer, branch, observed)

    def _require_tokens(self, name: str, observed: ray.ObjectRef, described: str) -> None:
        stream = self._streams[name]
        get_one(stream.first.actor.require_tokens.remote(observed, stream.num_tokens, described))

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
