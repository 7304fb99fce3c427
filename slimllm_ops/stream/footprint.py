"""What a worker needs, in bytes, by what it holds: why memory grows with neither the depth of a model nor its tokens.

    two layers (one in use, the next read ahead)
    moments of one module: their running sum, and the copy that travels
    a decision, where the worker makes it: the covariance, and products of it with weights
    states: the residual stream of every token, and X, a branch's activations, where they wait for a decision
    activations of one micro-batch

Of a mixture of experts, the moments are of every expert, a decision is about one after the other, and X is what the
experts of a token, k of them, make of it.

Micro-batches are sized by these sums, which bound what is taken: not all of it is alive at once. What a worker will
likely take is less: a decision is made when a micro-batch's activations are gone, of which fewer are alive at once.

Shapes: D hidden size, P the larger input of an output projection.
"""

from dataclasses import dataclass, replace

import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.moments.moments import TRIANGLE_BLOCKS, accumulation_dtype
from slimllm_ops.stream.weights import compute_dtype

# Tensors of a micro-batch that are alive at once in a branch: (tokens, P) in the MLP, (tokens, D) in the attention.
WIDE_ACTIVATIONS, NARROW_ACTIVATIONS = 5, 8
# Those of them that were seen alive at once (benchmarks/results/memory.md): in the MLP, and in the attention.
LIKELY_MLP, LIKELY_ATTENTION = (3, 3), (0, 8)
# A solve was seen to hold so many matrices P x P at its peak, beside the weight in float32 and in the dtype of sums.
SOLVE_SQUARES = 6


@dataclass(frozen=True)
class Footprint:
    """Bytes that one stream through a model takes."""

    layers: int
    moments: int
    decision: int
    states_per_token: int
    activations_per_token: int
    # A layer as stored, while it is read.
    stored_layer: int
    likely_activations_per_token: int

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, device: torch.device, *, deciding: bool, measures_change: bool = False
    ) -> "Footprint":
        """Return what a stream takes on a device.

        Args:
            checkpoint: the model that it passes.
            device: where it computes.
            deciding: whether its worker decides, so that a branch's activations wait for the decision.
            measures_change: whether what enters a layer is held, to see what the layer changes.
        """
        values, sums = compute_dtype(device).itemsize, accumulation_dtype(device).itemsize
        hidden, widths = checkpoint.config.hidden_size, _widths(checkpoint)
        attention, mlp = widths
        family, config = checkpoint.family, checkpoint.config
        experts, chosen = family.num_experts(config), family.experts_per_token(config)
        widest, entering = max(widths), max(attention, chosen * mlp)
        # Where there are experts, it is held which of them a token was sent to.
        routes = torch.int64.itemsize * chosen if family.mlp.has_experts else 0
        # The MLP of a parallel layer reads what entered the layer, which is held beside the residual stream.
        held = 2 if measures_change or family.is_parallel(config) else 1
        names = [checkpoint.layer_names(layer) for layer in range(checkpoint.num_layers)]
        largest = max(map(checkpoint.num_parameters, names))
        return cls(
            layers=2 * values * largest,
            moments=2 * max(_triangle(attention, sums), experts * _triangle(mlp, sums)),
            decision=sums * (widest**2 + 5 * widest * hidden) if deciding else 0,
            states_per_token=values * held * hidden + (values * entering + routes if deciding else 0),
            activations_per_token=values * (WIDE_ACTIVATIONS * entering + NARROW_ACTIVATIONS * hidden),
            stored_layer=checkpoint.num_bytes() * largest // checkpoint.num_parameters(list(checkpoint.files)),
            likely_activations_per_token=values
            * max(wide * entering + narrow * hidden for wide, narrow in (LIKELY_MLP, LIKELY_ATTENTION)),
        )

    @classmethod
    def of_refinement(cls, dense: Checkpoint, pruned: Checkpoint, device: torch.device) -> "Footprint":
        """Return what the dense and the pruned stream take side by side, with the joint moments of their states."""
        one, other = (cls.of(model, device, deciding=model is pruned) for model in (dense, pruned))
        hidden, sums = dense.config.hidden_size, accumulation_dtype(device).itemsize
        joint = max(max(_widths(pruned)) + hidden, 2 * hidden)
        return cls(
            layers=one.layers + other.layers,
            moments=2 * _triangle(joint, sums),
            decision=3 * sums * joint**2,
            states_per_token=one.states_per_token + other.states_per_token,
            activations_per_token=one.activations_per_token + other.activations_per_token,
            stored_layer=one.stored_layer,
            likely_activations_per_token=one.likely_activations_per_token + other.likely_activations_per_token,
        )

    @property
    def fixed(self) -> int:
        """What does not depend on tokens."""
        return self.layers + self.moments + self.decision

    def passing(self) -> "Footprint":
        """Return what a stream takes that passes layers and observes nothing."""
        return replace(self, moments=0, decision=0)

    def likely_peak(self, held_tokens: int, tokens_at_once: int) -> int:
        """Return the bytes that a worker will likely take above its libraries.

        Args:
            held_tokens: tokens whose states are held in memory.
            tokens_at_once: tokens of a micro-batch.
        """
        working = max(self.decision, self.likely_activations_per_token * tokens_at_once)
        held = self.layers + self.stored_layer + self.moments + self.states_per_token * held_tokens
        return held + working

    def tokens_at_once(self, free: int, held_tokens: int) -> int:
        """Return how many tokens a micro-batch may have, where `free` bytes are there and so many tokens are held."""
        return (free - self.fixed - self.states_per_token * held_tokens) // self.activations_per_token


def solve_bytes(checkpoint: Checkpoint, device: torch.device) -> int:
    """Return what a solve of the widest module takes above its libraries: of experts, one after the other."""
    sums, width = accumulation_dtype(device).itemsize, max(_widths(checkpoint))
    return sums * SOLVE_SQUARES * width**2 + (sums + torch.float32.itemsize) * width * checkpoint.config.hidden_size


def moment_bytes(checkpoint: Checkpoint, device: torch.device) -> int:
    """Return what the moments of one layer's modules are, as they travel and are kept."""
    sums, (attention, mlp) = accumulation_dtype(device).itemsize, _widths(checkpoint)
    return _triangle(attention, sums) + checkpoint.family.num_experts(checkpoint.config) * _triangle(mlp, sums)


def _triangle(width: int, itemsize: int) -> int:
    """Return the bytes of a square's upper triangle in block rows."""
    return itemsize * width**2 * (TRIANGLE_BLOCKS + 1) // (2 * TRIANGLE_BLOCKS)


def _widths(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the largest numbers of inputs of an attention's output projection, and of an MLP's, or of an expert's."""
    shapes = [checkpoint.layer_shapes(layer) for layer in range(checkpoint.num_layers)]
    attention, mlp = checkpoint.family.attention.output_weight, checkpoint.family.mlp.output_weight
    return max(one[attention][-1] for one in shapes), max(one[mlp][-1] for one in shapes)
