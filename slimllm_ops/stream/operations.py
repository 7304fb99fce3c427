"""How many operations a run is, and how many a processor makes in a second: what seconds can be told from beforehand.

For each token and layer:

    forward      2 (weights that the token passes) + 2 T D        attention over half a block of T tokens
    moments      P^2 of every module                              of a product X^T X, a triangle is made

For each module:

    elimination  2 P^3 (3 + D / P)                                gram: inverse, gram, and their updates
    refit        P^3 / 3 + 6 P^2 D                                gram: a factor, images of the covariance
    decision     10 D^3 + 2 P^2 D                                 slimllm: an eigen-decomposition, C W

Shapes: T tokens of a block, D hidden size, P inputs of an output projection.
"""

import time
from dataclasses import dataclass

import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.moments.moments import accumulation_dtype
from slimllm_ops.stream.weights import compute_dtype

# What observing reaches of the rate of a plain product, and what solves reach of it in the dtype of sums: measured
# (benchmarks/results/one_process.md).
OBSERVING_SHARE, SOLVING_SHARE = 0.60, 0.35
# The products by which a rate is measured: tens of milliseconds.
RATE_SIZE, RATE_TIMES = {"cpu": 512, "cuda": 4096}, 4


@dataclass(frozen=True)
class Rates:
    """Operations per second of plain products: in the dtype that layers compute in, and in that of sums and solves."""

    products: float
    solves: float

    @classmethod
    def measure(cls, device: torch.device) -> "Rates":
        """Measure the rates here, in this process's threads."""
        size = RATE_SIZE[device.type]
        dtypes = compute_dtype(device), accumulation_dtype(device)
        return cls(*(rate_of_products(device, dtype, size, RATE_TIMES) for dtype in dtypes))


@dataclass(frozen=True)
class LayerOperations:
    """Operations of one decoder layer: of a token, but for `elimination`, `refit` and `decision`, of both modules."""

    forward: float
    moments: float
    elimination: float
    refit: float
    decision: float

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer: int, block_length: int) -> "LayerOperations":
        """Count a layer's operations from the shapes of its tensors."""
        family, config = checkpoint.family, checkpoint.config
        shapes, hidden = checkpoint.layer_shapes(layer), config.hidden_size
        experts, chosen = family.num_experts(config), family.experts_per_token(config)
        attention, mlp = (shapes[branch.output_weight][-1] for branch in (family.attention, family.mlp))
        expert_names = {stored.name for stored in family.stored if stored.by_expert}
        parameters = sum(
            torch.Size(shape).numel() * (chosen / experts if name in expert_names else 1)
            for name, shape in shapes.items()
        )
        return cls(
            forward=forward_operations(parameters, block_length, hidden),
            moments=moment_operations(attention) + chosen * moment_operations(mlp),
            elimination=elimination_operations(attention, hidden) + experts * elimination_operations(mlp, hidden),
            refit=refit_operations(attention, hidden) + experts * refit_operations(mlp, hidden),
            decision=decision_operations(mlp, hidden) * experts,
        )


def forward_operations(parameters: float, block_length: int, hidden: int) -> float:
    """Return the operations per token of a layer: its matrices, and attention over half a block."""
    return 2 * parameters + 2 * block_length * hidden


def moment_operations(width: int) -> float:
    """Return the operations per token of a module's moments, of which a triangle is made."""
    return width**2


def elimination_operations(width: int, hidden: int) -> float:
    """Return the operations of an elimination of all of a module's units."""
    return 2 * width**3 * (3 + hidden / width)


def refit_operations(width: int, hidden: int) -> float:
    """Return the operations of a refit of a module's kept units."""
    return width**3 / 3 + 6 * width**2 * hidden


def decision_operations(width: int, hidden: int) -> float:
    """Return the operations of the paper's decisions on a layer."""
    return 10 * hidden**3 + 2 * width**2 * hidden


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
