"""How much the loss depends on a layer, as decisions use it (measured by `slimllm_ops/stream/sensitivity.py`)."""

from dataclasses import dataclass

import numpy as np

from slimllm_ops.models.pair import Pair


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The Fisher information of a layer's outputs.

    Attributes:
        modules: E[g g^T] (D, D) at the output of the attention's output projection, and of the MLP's or its experts'.
        output: E|g|^2 at the states after the layer.
    """

    modules: Pair[np.ndarray]
    output: float

    def loss_of_change(self, change: float) -> float:
        """Return the loss that a squared error of the states after the layer adds, in nats: 1/2 E|g|^2 E|e|^2 / D."""
        return 0.5 * self.output * change / len(self.modules.mlp)
