"""One shard of the calibration and evaluation data: a plain class, so that it runs in one process as well as on Ray.

What a method returns is a function of its arguments and of the decisions applied so far, never of timing.
"""

import os
import resource
import socket
from collections.abc import Sequence
from functools import partial, reduce
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.paper import decide_channels, decide_heads
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.errors import MiscountError
from slimllm_ops.models.families import Branch
from slimllm_ops.moments.observation import Observed, PackedObservation
from slimllm_ops.moments.states import SpilledStates, StateStore
from slimllm_ops.stream.memory import free_memory, return_large_blocks
from slimllm_ops.stream.passes import LayerStream, Mean
from slimllm_ops.stream.refinement import RefinementStream, solve_alignment, solve_refit

# A branch's refined tensors by their names in the layer: float32, but rounded as the checkpoint stores them.
Refined = dict[str, np.ndarray]


class Shard:
    """Holds the hidden states of its share of the data, one stream per name, and works on them layer by layer.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads to compute with.
        offload: hold hidden states in files of this node's temporary folder, not in memory.
    """

    def __init__(self, device: str, threads: int, offload: bool = False) -> None:
        return_large_blocks()
        # Ray may be told of more CPUs than there are.
        torch.set_num_threads(min(threads, os.cpu_count() or 1))
        self._device = torch.device(device)
        self._store: StateStore = partial(SpilledStates, Path(gettempdir()), self._device) if offload else list
        self._streams: dict[str, LayerStream] = {}
        self._refinements: dict[str, RefinementStream] = {}

    def open_stream(
        self,
        name: str,
        checkpoint: Checkpoint,
        batches: list[np.ndarray],
        measures_change: bool = False,
        intercept: bool = True,
    ) -> None:
        """Embed batches of token blocks, each (b, T) int32, as the input of a model's first layer."""
        self._streams[name] = self._stream(checkpoint, batches, measures_change, intercept)

    def close_stream(self, name: str) -> None:
        """Give a stream's memory back."""
        self._streams.pop(name).close()
        refinement = self._refinements.pop(name, None)
        if refinement is not None:
            refinement.close()

    def forward(self, name: str, layer: int) -> Mean:
        """Pass a whole layer; return the summed cosine of its input and output."""
        return self._streams[name].forward(layer)

    def forward_pruned(self, name: str, layer: int, plan: LayerPlan) -> None:
        """Pass a layer as a plan leaves it, with nothing observed."""
        self._streams[name].forward_pruned(layer, plan)

    def observe(self, name: str, layer: int, branch: Branch) -> Observed:
        """Run a branch up to its output projection; return the moments of what came out, and hold it until `apply`."""
        return self._streams[name].observe(layer, branch)

    def observe_dense(self, name: str, layer: int, branch: Branch) -> tuple[Observed, tuple[Mean, Mean | None]]:
        """Pass a branch as it is; return its moments, and the summed squares of what it leaves."""
        found = self._streams[name].observe_dense(layer, branch)
        return found.observed, (found.power, found.change)

    def mean_powers(self, *parts: tuple[Mean, Mean | None]) -> tuple[float, float | None]:
        """Return the means over all shards' tokens of what a branch left: the states' power, the layer's change."""
        powers, changes = zip(*parts, strict=True)
        change = None if None in changes else reduce(Mean.merge, changes).value
        return reduce(Mean.merge, powers).value, change

    def merge(self, left: Observed, right: Observed) -> Observed:
        """Return the observation of both sets of tokens; both are of one branch, and so of one kind."""
        one: Any = left
        return one.merge(right)

    def require_tokens(self, observed: Observed, num_tokens: int, described: str) -> None:
        """Refuse merged moments that are not of all tokens."""
        try:
            observed.require_tokens(num_tokens)
        except MiscountError as error:
            raise MiscountError(f"{described}: {error}") from None

    def decide_heads(self, name: str, layer: int, observed: Observed, *, num_removed: int) -> Decision:
        """Decide a layer's attention (`slimllm_ops.decide.paper`)."""
        return decide_heads(self._streams[name], observed, layer, num_removed=num_removed)

    def decide_channels(
        self, name: str, layer: int, observed: Observed, *, num_removed: int, keep_lowest: float
    ) -> Decision:
        """Decide a layer's MLP (`slimllm_ops.decide.paper`)."""
        stream = self._streams[name]
        return decide_channels(stream, observed, layer, num_removed=num_removed, keep_lowest=keep_lowest)

    def apply(self, name: str, layer: int, branch: Branch, decision: Decision | None) -> Mean:
        """Add the observed branch's output, pruned or dense, to the hidden states; return their summed squares."""
        return self._streams[name].apply(layer, branch, decision)

    def open_refinement(
        self, name: str, dense: Checkpoint, pruned: Checkpoint, batches: list[np.ndarray], origins: Sequence[int]
    ) -> None:
        """Embed batches of token blocks in the dense and in the pruned model, side by side."""
        self.open_stream(name, pruned, batches)
        self._refinements[name] = RefinementStream(self._stream(dense, batches), self._streams[name], origins)

    def forward_dropped(self, name: str, layer: int) -> None:
        """Pass a dense layer that the pruned model has not."""
        self._refinements[name].forward_dropped(layer)

    def observe_inputs(self, name: str, layer: int, branch: Branch) -> PackedObservation:
        """Return the joint moments of a branch's input in the pruned stream, and of what the dense one adds."""
        return self._refinements[name].observe_inputs(layer, branch)

    def solve_alignment(self, name: str, layer: int, branch: Branch, observed: PackedObservation) -> Refined:
        """Return a branch's input projections, with what brings its input nearest to the dense one's folded in."""
        alignment_DD = solve_alignment(observed.unpack(self._device).moments).float()
        aligned = self._refinements[name].aligned(layer, branch, alignment_DD)
        return {name: _numpy(tensor) for name, tensor in aligned.items()}

    def align(self, name: str, layer: int, aligned: Refined) -> None:
        """Let a branch of the pruned stream have the input projections that were aligned."""
        self._refinements[name].replace(layer, self._tensors(aligned))

    def observe_targets(self, name: str, layer: int, branch: Branch) -> PackedObservation:
        """Run a branch in both streams; return the joint moments of its kept inputs and its target."""
        return self._refinements[name].observe_targets(layer, branch)

    def solve_refit(self, name: str, layer: int, branch: Branch, observed: PackedObservation) -> Refined:
        """Return a branch's new output projection: weight (D, S), and bias (D,) where it has one."""
        stream = self._streams[name]
        weights, stored = stream.weights(layer), stream.checkpoint.dtype
        moments = observed.unpack(self._device).moments
        weight_SD, bias_D = solve_refit(moments, weights[branch.output_weight].T, branch.output_bias in weights)
        refitted = {branch.output_weight: _numpy(weight_SD.T.to(stored))}
        return refitted if bias_D is None else refitted | {branch.output_bias: _numpy(bias_D.to(stored))}

    def apply_refit(self, name: str, layer: int, branch: Branch, refitted: Refined) -> None:
        """Add a branch's refitted output to the pruned stream; the dense one goes on."""
        tensors = self._tensors(refitted)
        self._refinements[name].apply(layer, branch, tensors[branch.output_weight], tensors.get(branch.output_bias))

    def forward_refined(self, name: str, layer: int, refined: Checkpoint) -> None:
        """Pass a layer that is refined already in both streams, with nothing observed."""
        self._refinements[name].forward_refined(layer, refined.read_layer(layer))

    def probe(self, name: str) -> np.ndarray:
        """Return the hidden states (T', D) of the first tokens of the first block."""
        return self._streams[name].probe()

    def probed_ids(self, name: str) -> np.ndarray:
        """Return the ids (T',) of the tokens that `probe` shows."""
        return self._streams[name].probed_ids()

    def negative_log_likelihood(self, name: str) -> Mean:
        """Return the summed negative log-likelihood of a stream that has passed every layer."""
        return self._streams[name].negative_log_likelihood()

    def free_memory(self) -> tuple[str, int]:
        """Return what memory states are held in (the machine's name, or the GPU's), and the bytes that are free."""
        if self._device.type == "cuda":
            return str(torch.cuda.get_device_properties(self._device).uuid), free_memory(self._device)
        return socket.gethostname(), free_memory(self._device)

    def peak_memory(self) -> dict[str, int]:
        """Return this process's peak resident memory, and its GPU's, in bytes."""
        return peak_memory(self._device)

    def _tensors(self, refined: Refined) -> dict[str, torch.Tensor]:
        # Received arrays are read-only views of shared memory.
        return {name: torch.from_numpy(array.copy()).to(self._device) for name, array in refined.items()}

    def _stream(
        self,
        checkpoint: Checkpoint,
        batches: list[np.ndarray],
        measures_change: bool = False,
        intercept: bool = True,
    ) -> LayerStream:
        tensors = [torch.from_numpy(batch.astype(np.int64)) for batch in batches]
        choices = {"measures_change": measures_change, "intercept": intercept}
        return LayerStream(checkpoint, tensors, self._device, self._store, **choices)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().contiguous().numpy()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak resident memory of this process, and of its share of the GPU, in bytes."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak
