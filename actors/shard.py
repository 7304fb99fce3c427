"""One shard of the calibration and evaluation data: a plain class, so that it runs in one process as well as on Ray.

What a method returns is a function of its arguments and of the decisions applied so far, never of timing.
"""

import resource
from pathlib import Path

import numpy as np
import torch

from slimllm_ops.checkpoint import Checkpoint
from slimllm_ops.families import Branch, layer_shape
from slimllm_ops.observation import PackedObservation
from slimllm_ops.paper import decide_channels, decide_heads
from slimllm_ops.plan import Decision
from slimllm_ops.stream import LayerStream, Mean

# The read-back of a checkpoint compares the states of so many first tokens: causal, so they need no others.
PROBED_TOKENS = 64


class Shard:
    """Holds the hidden states of its share of the data, one stream per name, and works on them layer by layer.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads to compute with.
    """

    def __init__(self, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device(device)
        self._streams: dict[str, LayerStream] = {}

    def open_stream(self, name: str, model_dir: str, batches: list[np.ndarray]) -> None:
        """Embed batches of token blocks, each (b, T) int32, as the input of a model's first layer."""
        checkpoint = Checkpoint.open(Path(model_dir))
        tensors = [torch.from_numpy(batch.astype(np.int64)) for batch in batches]
        self._streams[name] = LayerStream(checkpoint, tensors, self._device)

    def close_stream(self, name: str) -> None:
        """Give a stream's memory back."""
        del self._streams[name]

    def forward(self, name: str, layer: int) -> Mean:
        """Pass a whole layer; return the summed cosine of its input and output."""
        return self._streams[name].forward(layer)

    def observe(self, name: str, layer: int, branch: Branch) -> PackedObservation:
        """Run a branch up to its output projection; return the moments of what came out."""
        return PackedObservation.of(self._streams[name].observe(layer, branch))

    def merge(self, left: PackedObservation, right: PackedObservation) -> PackedObservation:
        """Return the observation of both sets of tokens."""
        return PackedObservation.of(left.unpack(self._device).merge(right.unpack(self._device)))

    def decide_heads(self, name: str, layer: int, observed: PackedObservation, *, num_removed: int) -> Decision:
        """Decide a layer's attention (`slimllm_ops.paper`)."""
        stream = self._streams[name]
        return decide_heads(
            stream.weights(layer),
            stream.checkpoint.family.attention,
            observed.unpack(self._device),
            num_units=layer_shape(stream.checkpoint.config, layer).num_key_value_heads,
            num_removed=num_removed,
        )

    def decide_channels(
        self, name: str, layer: int, observed: PackedObservation, *, num_removed: int, keep_lowest: float
    ) -> Decision:
        """Decide a layer's MLP (`slimllm_ops.paper`)."""
        stream = self._streams[name]
        return decide_channels(
            stream.weights(layer),
            stream.checkpoint.family.mlp,
            observed.unpack(self._device),
            num_removed=num_removed,
            keep_lowest=keep_lowest,
        )

    def apply(self, name: str, layer: int, branch: Branch, decision: Decision | None) -> Mean:
        """Add the observed branch's output, pruned or dense, to the hidden states; return their summed squares."""
        return self._streams[name].apply(layer, branch, decision)

    def probe(self, name: str) -> np.ndarray:
        """Return the hidden states (T', D) of the first tokens of the first block."""
        return self._streams[name].hidden[0][0, :PROBED_TOKENS].float().cpu().numpy()

    def probed_ids(self, name: str) -> np.ndarray:
        """Return the ids (T',) of the tokens that `probe` shows."""
        return self._streams[name].batches[0][0, :PROBED_TOKENS].numpy()

    def negative_log_likelihood(self, name: str) -> Mean:
        """Return the summed negative log-likelihood of a stream that has passed every layer."""
        return self._streams[name].negative_log_likelihood()

    def peak_memory(self) -> dict[str, int]:
        """Return this process's peak resident memory, and its GPU's, in bytes."""
        return peak_memory(self._device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak resident memory of this process, and of its share of the GPU, in bytes."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak
