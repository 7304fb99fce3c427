"""Runs the dense and a pruned model's hidden states side by side, over the same blocks.

What corrects a pruned model towards the dense one, branch by branch, is a class of such streams.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.stream.passes import LayerStream

# A branch's new tensors by their names in the layer: float32 arrays, rounded to the checkpoint's dtype.
BranchTensors = dict[str, np.ndarray]


class PairedStream:
    """The dense and the pruned model's hidden states over the same blocks.

    Args:
        dense: The dense model's stream.
        pruned: The pruned model's stream; layer numbers are the pruned model's.
        origins: The dense layer that each pruned layer comes from; `forward_dropped` runs those in between.
    """

    def __init__(self, dense: LayerStream, pruned: LayerStream, origins: Sequence[int]) -> None:
        self._dense = dense
        self.pruned = pruned
        self._origins = origins

    def forward_written(self, layer: int, written: Checkpoint) -> None:
        """Run a layer in both streams, in the pruned one with the weights of another checkpoint."""
        self._replace(layer, written.read_layer(layer))
        self.forward_whole(layer)

    def forward_whole(self, layer: int) -> None:
        """Run a layer in both streams with the weights that it has."""
        self.forward_dropped(self._origins[layer])
        self.pruned.forward_pruned(layer, LayerPlan())

    def forward_dropped(self, layer: int) -> None:
        """Run a dense layer in the dense stream only."""
        self._dense.forward_pruned(layer, LayerPlan())

    def probe(self) -> np.ndarray:
        """Return the pruned stream's states (T', D) of the first tokens."""
        return self.pruned.probe()

    def probed_ids(self) -> np.ndarray:
        """Return the ids (T',) of the tokens whose states `probe` returns."""
        return self.pruned.probed_ids()

    def close(self) -> None:
        """Free both streams' memory."""
        self._dense.close()
        self.pruned.close()

    def _replace(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Overwrite tensors of a pruned layer, by name."""
        weights = self.pruned.weights(layer)
        with torch.inference_mode():
            for name, tensor in tensors.items():
                weights[name].copy_(tensor)

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        # Received arrays are read-only views of shared memory, so copy them.
        return {name: torch.from_numpy(array.copy()).to(self.pruned.device) for name, array in arrays.items()}


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array in float32, in this machine's memory."""
    return tensor.detach().float().cpu().contiguous().numpy()
