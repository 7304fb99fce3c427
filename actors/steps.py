"""Runs steps on the shards of open streams: on every shard, on the first, or on one after the other.

Results come in the order of the shards, and sums follow a tree in that order, so nothing depends on timing.

A driver names the step that it wants and writes it as it would call it:

    observed = shards.merge("pruned", LayerStream.observe, layer, branch)
    decision = shards.decide("pruned", decide_heads, observed, layer, num_removed=2)
    shards.mean("pruned", LayerStream.apply, layer, branch, decision)
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Concatenate, ParamSpec, TypeVar

from actors.calls import Share, SharedStream, label_of
from actors.shard import Arguments, Shard
from actors.workers import Reference, Workers, merge_on
from slimllm_ops.moments.sums import Mean

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


class ShardSteps:
    """The shards of open streams, by the streams' names.

    Args:
        workers: Where the shards live.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._streams: dict[str, SharedStream] = {}

    def close_stream(self, name: str) -> None:
        """Close a stream and free its memory."""
        shares = self._streams.pop(name).shares
        self._workers.get([self._workers.call(one.worker, "close", Shard.close, one.stream) for one in shares])

    def each(self, name: str, step: Callable[Concatenate[S, P], R], *arguments: P.args, **named: P.kwargs) -> list[R]:
        """Run a step on every shard; return the results in the order of the shards."""
        return self._workers.get(self._submit(name, step, (arguments, named)))

    def each_its_own(self, name: str, step: Callable[[S, T], R], values: Sequence[T]) -> list[R]:
        """Run a step on every shard, with one value for each shard; return the results in the order of the shards."""
        shares, workers = self._streams[name].shares, self._workers
        calls = [
            workers.call(share.worker, label_of(step, ()), Shard.run, share.stream, step, workers.put(((value,), {})))
            for share, value in zip(shares, values, strict=True)
        ]
        return workers.get(calls)

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
        worker = stream.shares[0].worker
        checked = self._workers.call(worker, label, Shard.require_tokens, merged, stream.num_tokens, label)
        self._workers.get([checked])
        return self.first_with(name, step, merged, *arguments, **named)

    def first_with(
        self,
        name: str,
        step: Callable[Concatenate[S, T, P], R],
        value: Reference[T],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> Reference[R]:
        """Run a step on the first shard alone; its first argument is a value that is on the cluster. Do not wait."""
        return self._submit_with(step, value, (arguments, named), self._streams[name].shares[:1])[0]

    def give(
        self,
        name: str,
        step: Callable[Concatenate[S, T, P], R],
        value: Reference[T],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> list[R]:
        """Run a step on every shard; its first argument is a value that is on the cluster."""
        return self._workers.get(self._submit_with(step, value, (arguments, named), self._streams[name].shares))

    def hand_on(
        self,
        name: str,
        step: Callable[Concatenate[S, T | None, P], T],
        value: Reference[T] | None,
        *arguments: P.args,
        **named: P.kwargs,
    ) -> Reference[T]:
        """Run a step on one shard after the other, in their order; wait for each.

        The step takes first what the shard before returned; the first shard takes `value`, None at the beginning. What
        is handed on stays on the cluster.
        """
        for share in self._streams[name].shares:
            (value,) = self._submit_with(step, value, (arguments, named), [share])
            self._workers.get([self._workers.call(share.worker, label_of(step, arguments), Shard.receive, value)])
        assert value is not None, "every stream has a shard"
        return value

    def get(self, reference: Reference[T]) -> T:
        """Return the value of a reference."""
        return self._workers.get([reference])[0]

    def _submit(self, name: str, step: Callable[..., R], arguments: Arguments) -> list[Reference[R]]:
        packed, label = self._workers.put(arguments), label_of(step, arguments[0])
        return [
            self._workers.call(share.worker, label, Shard.run, share.stream, step, packed)
            for share in self._streams[name].shares
        ]

    def _submit_with(
        self, step: Callable[..., R], value: object, arguments: Arguments, shares: list[Share]
    ) -> list[Reference[R]]:
        packed, label = self._workers.put(arguments), label_of(step, arguments[0])
        return [
            self._workers.call(share.worker, label, Shard.run_with, share.stream, step, value, packed)
            for share in shares
        ]
