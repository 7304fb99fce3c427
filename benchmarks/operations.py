"""Counts a run's operations and measures a processor's rate, for the tables that compare both with seconds.

For each token and layer:

    forward      2 (weights that the token uses) + 2 T D          attention over half a block of T tokens
    moments      P^2 of every module                              only a triangle of X^T X is computed

For each module:

    elimination  2 P^3 (3 + D / P)                                gram: inverse, W W^T, and their updates
    refit        P^3 / 3 + 6 P^2 D                                gram: a Cholesky factor, products C W
    decision     10 D^3 + 2 P^2 D                                 slimllm: an eigen-decomposition, C W

Shapes: T tokens of a block, D hidden size, P inputs of an output projection.
"""

import time
from dataclasses import dataclass

import torch

from slimllm_ops.checkpoint.reading import Checkpoint

# Measured rates as fractions of a plain product's rate (benchmarks/results/one_process.md): of observing, and of
# solves in the dtype of sums.
OBSERVING_SHARE, SOLVING_SHARE = 0.60, 0.35


@dataclass(frozen=True)
class LayerOperations:
    """The operations of one decoder layer per token: a pass, and the sums of `gram` and of `slimllm` beside it."""

    forward: float
    moments: float
    outputs: float

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer: int, block_length: int) -> "LayerOperations":
        """Count a layer's operations from the shapes of its tensors."""
        family, config = checkpoint.family, checkpoint.config
        shapes, hidden = checkpoint.layer_shapes(layer), config.hidden_size
        experts, chosen = family.num_experts(config), family.experts_per_token(config)
        attention, mlp = (shapes[branch.output_weight][-1] for branch in (family.attention, family.mlp))
        by_expert = family.mlp.has_experts
        expert_names = {stored.name for stored in family.stored if stored.by_expert}
        parameters = sum(
            torch.Size(shape).numel() * (chosen / experts if name in expert_names else 1)
            for name, shape in shapes.items()
        )
        return cls(
            forward=forward_operations(parameters, block_length, hidden),
            moments=moment_operations(attention) + chosen * moment_operations(mlp),
            outputs=moment_operations(attention) + (chosen * moment_operations(mlp if by_expert else hidden)),
        )


def forward_operations(parameters: float, block_length: int, hidden: int) -> float:
    """Return the operations per token of a layer: its matrices, and attention over half a block."""
    return 2 * parameters + 2 * block_length * hidden


def moment_operations(width: int) -> float:
    """Return the operations per token of a module's moments; only a triangle is computed."""
    return width**2


def elimination_operations(width: int, hidden: int) -> float:
    """Return the operations of eliminating all of a module's units."""
    return 2 * width**3 * (3 + hidden / width)


def decision_operations(width: int, hidden: int) -> float:
    """Return the operations of the paper's decision on an MLP: an eigen-decomposition, and a product with W."""
    return 10 * hidden**3 + 2 * width * hidden**2


def rate_of_products(device: torch.device, dtype: torch.dtype, size: int, times: int) -> float:
    """Return the operations per second of a plain product of square matrices."""
    left = torch.randn(size, size, device=device).to(dtype)
    left @ left
    start = _now(device)
    for _ in range(times):
        left @ left
    return times * 2 * size**3 / (_now(device) - start)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
