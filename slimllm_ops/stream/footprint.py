"""Computes how many bytes a worker needs, from what it holds.

Only the states grow with the number of tokens, and nothing grows with the model's depth. A worker holds:

    two layers: the current one, and the next one, which is read ahead
    the moments of one module: their running sum, and the copy that is sent
    a decision, if the worker makes it: the covariance, and its products with weights
    states: the residual stream of every token, and X, a branch's activations, if they wait for a decision
    the activations of one micro-batch

In a mixture of experts, moments cover every expert, decisions are made for one expert at a time, and X holds the
activations of each token's k experts.

The sum of these is an upper bound, since not all of them are alive at once; micro-batches are sized by it. The likely
peak is lower: a decision is made after a micro-batch's activations are freed, and fewer of those are alive at once.

Shapes: D hidden size, P the larger input of an output projection.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.whole import WholeModel
from slimllm_ops.models.families import head_dim, layer_shape
from slimllm_ops.moments.moments import TRIANGLE_BLOCKS, accumulation_dtype
from slimllm_ops.stream.weights import compute_dtype

# Tensors of a micro-batch that may be alive at once in a branch: (tokens, P) in the MLP, (tokens, D) in attention.
WIDE_ACTIVATIONS, NARROW_ACTIVATIONS = 5, 8
# How many of each were measured alive at once (benchmarks/results/memory.md), in the MLP and in attention.
LIKELY_MLP, LIKELY_ATTENTION = (3, 3), (0, 8)
# How many times the activations of a pass a backward pass holds: those of a layer are saved, and have gradients.
SAVED_ACTIVATIONS = 3
# Copies of a branch's weights while it is trained, in float32: the weights, their gradients, and Adam's two moments;
# three of them as they are received and as they are returned; and the weights in the dtype of the layers.
TRAINED_COPIES = 11
# When whole models score tokens: float32 tensors of the vocabulary's size; activations of the hidden size, with those
# of an MLP four times as wide.
LOG_PROBABILITIES, WHOLE_ACTIVATIONS = 4, 32
# P x P matrices at the measured peak of a solve, which also holds the weight in float32 and in the dtype of sums.
SOLVE_SQUARES = 6


@dataclass(frozen=True)
class Footprint:
    """The bytes that one stream through a model needs."""

    layers: int
    moments: int
    decision: int
    states_per_token: int
    activations_per_token: int
    # One layer in its stored dtype, while it is read.
    stored_layer: int
    likely_activations_per_token: int

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, device: torch.device, *, deciding: bool = False, measures_change: bool = False
    ) -> "Footprint":
        """Return what a stream needs on a device.

        Args:
            checkpoint: The model.
            device: Where the layers run.
            deciding: Whether the worker makes decisions, so that a branch's activations wait for one.
            measures_change: Whether to keep the states that enter a layer, to measure what the layer changes.
        """
        values, sums = compute_dtype(device).itemsize, accumulation_dtype(device).itemsize
        hidden, widths = checkpoint.config.hidden_size, _widths(checkpoint)
        attention, mlp = widths
        family, config = checkpoint.family, checkpoint.config
        experts, chosen = family.num_experts(config), family.experts_per_token(config)
        widest, entering = max(widths), max(attention, chosen * mlp)
        # With experts, the numbers of each token's experts are held too.
        routes = torch.int64.itemsize * chosen if family.mlp.has_experts else 0
        # The MLP of a parallel layer reads the layer's input, which is held in addition to the residual stream.
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
    def of_layerwise(cls, checkpoint: Checkpoint, device: torch.device) -> "Footprint":
        """Return what a stream needs whose layers are pruned one after the other, as the published method does.

        The output of an MLP waits beside X. Instead of the moments of X, the worker sums those of the output.
        """
        stream, hidden = cls.of(checkpoint, device, deciding=True), checkpoint.config.hidden_size
        if checkpoint.family.mlp.has_experts:
            return stream
        values, sums = compute_dtype(device).itemsize, accumulation_dtype(device).itemsize
        attention, mlp = _widths(checkpoint)
        held = stream.states_per_token - values * max(attention, mlp)
        return replace(
            stream,
            moments=2 * max(_triangle(attention, sums), _triangle(hidden, sums)),
            decision=sums * max(attention**2 + 5 * attention * hidden, 3 * hidden**2 + 3 * mlp * hidden),
            states_per_token=held + values * max(attention, mlp + hidden),
        )

    @classmethod
    def of_refinement(cls, dense: Checkpoint, pruned: Checkpoint, device: torch.device) -> "Footprint":
        """Return what the dense and the pruned stream need side by side, with the joint moments of their states."""
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

    @classmethod
    def of_branch_training(cls, dense: Checkpoint, pruned: Checkpoint, device: torch.device) -> "Footprint":
        """Return what the dense and the pruned stream need side by side, while a pruned branch is trained."""
        one, other = (cls.of(model, device).passing() for model in (dense, pruned))
        return cls(
            layers=one.layers + other.layers,
            moments=0,
            decision=TRAINED_COPIES * torch.float32.itemsize * _largest_branch(pruned),
            states_per_token=one.states_per_token + other.states_per_token,
            # The two streams run one after the other, and one block at a time is passed backward.
            activations_per_token=SAVED_ACTIVATIONS * max(one.activations_per_token, other.activations_per_token),
            stored_layer=one.stored_layer,
            likely_activations_per_token=(
                SAVED_ACTIVATIONS * max(one.likely_activations_per_token, other.likely_activations_per_token)
            ),
        )

    @classmethod
    def of_sensitivity(cls, checkpoint: Checkpoint, device: torch.device) -> "Footprint":
        """Return what a pass forward and backward needs; its states are in files."""
        passing = cls.of(checkpoint, device).passing()
        return replace(
            passing,
            # Of both modules: the sum, and the copy that is sent.
            moments=4 * accumulation_dtype(device).itemsize * checkpoint.config.hidden_size**2,
            states_per_token=0,
            activations_per_token=SAVED_ACTIVATIONS * passing.activations_per_token,
            likely_activations_per_token=SAVED_ACTIVATIONS * passing.likely_activations_per_token,
        )

    @classmethod
    def of_generation(cls, checkpoint: Checkpoint, device: torch.device, *, keep_layers: bool) -> "Footprint":
        """Return what sampling sequences needs: keys and values of every layer for each token, embeddings and head.

        Args:
            checkpoint: The model.
            device: Where the layers run.
            keep_layers: Whether all layers stay in memory.
        """
        values, config = compute_dtype(device).itemsize, checkpoint.config
        passing = cls.of(checkpoint, device).passing()
        names = [name for layer in range(checkpoint.num_layers) for name in checkpoint.layer_names(layer)]
        layers = values * checkpoint.num_parameters(names) if keep_layers else passing.layers
        shapes = [layer_shape(config, layer) for layer in range(checkpoint.num_layers)]
        # A layer's keys and values are copied when a token is added.
        kept = sum(one.num_key_value_heads for one in shapes) + max(one.num_key_value_heads for one in shapes)
        per_token = 2 * values * kept * head_dim(config)
        return replace(
            passing,
            layers=layers + 2 * values * config.vocab_size * config.hidden_size,
            activations_per_token=per_token,
            likely_activations_per_token=per_token,
        )

    @classmethod
    def of_whole(cls, models: Sequence[WholeModel], device: torch.device) -> "Footprint":
        """Return what passing tokens through whole models needs, one model after the other."""
        values = compute_dtype(device).itemsize
        vocabulary, hidden = (max(getattr(one, name) for one in models) for name in ("vocab_size", "hidden_size"))
        logits = (len(models) * values + LOG_PROBABILITIES * torch.float32.itemsize) * vocabulary
        per_token = logits + values * WHOLE_ACTIVATIONS * hidden
        return cls(
            layers=values * sum(one.num_parameters for one in models),
            moments=0,
            decision=0,
            states_per_token=0,
            activations_per_token=per_token,
            stored_layer=0,
            likely_activations_per_token=per_token,
        )

    @property
    def fixed(self) -> int:
        """The bytes that do not depend on the number of tokens."""
        return self.layers + self.moments + self.decision

    def passing(self) -> "Footprint":
        """Return the footprint of a stream that runs layers without observing them."""
        return replace(self, moments=0, decision=0)

    def likely_peak(self, held_tokens: int, tokens_at_once: int) -> int:
        """Return the bytes that a worker will likely need on top of its libraries.

        Args:
            held_tokens: The number of tokens whose states are in memory.
            tokens_at_once: The number of tokens in a micro-batch.
        """
        working = max(self.decision, self.likely_activations_per_token * tokens_at_once)
        held = self.layers + self.stored_layer + self.moments + self.states_per_token * held_tokens
        return held + working

    def tokens_at_once(self, free: int, held_tokens: int) -> int:
        """Return how many tokens a micro-batch may have, given the free bytes and the number of tokens in memory."""
        return (free - self.fixed - self.states_per_token * held_tokens) // self.activations_per_token


def solve_bytes(checkpoint: Checkpoint, device: torch.device) -> int:
    """Return the bytes that a solve of the widest module, or expert, needs on top of its libraries."""
    sums, width = accumulation_dtype(device).itemsize, max(_widths(checkpoint))
    return sums * SOLVE_SQUARES * width**2 + (sums + torch.float32.itemsize) * width * checkpoint.config.hidden_size


def moment_bytes(checkpoint: Checkpoint, device: torch.device) -> int:
    """Return the bytes of the moments of one layer's modules, as they are sent and stored."""
    sums, (attention, mlp) = accumulation_dtype(device).itemsize, _widths(checkpoint)
    return _triangle(attention, sums) + checkpoint.family.num_experts(checkpoint.config) * _triangle(mlp, sums)


def layerwise_bytes(checkpoint: Checkpoint, device: torch.device) -> int:
    """Return the bytes of the sums of one layer's modules, as the published method sends them."""
    if checkpoint.family.mlp.has_experts:
        return moment_bytes(checkpoint, device)
    sums, (attention, mlp) = accumulation_dtype(device).itemsize, _widths(checkpoint)
    hidden, squares = checkpoint.config.hidden_size, torch.float64.itemsize
    # After its outputs' moments and the norms of X, an MLP sends five sums for each output dim.
    return _triangle(attention, sums) + _triangle(hidden, sums) + squares * (mlp + 6 * hidden)


def _largest_branch(checkpoint: Checkpoint) -> int:
    """Return the number of parameters in the linear maps of the largest branch."""
    maps = [{*branch.inputs, branch.output} for branch in checkpoint.family.branches]
    shapes = [checkpoint.layer_shapes(layer) for layer in range(checkpoint.num_layers)]
    return max(
        sum(math.prod(shape) for name, shape in one.items() if name.rpartition(".")[0] in names)
        for one in shapes
        for names in maps
    )


def _triangle(width: int, itemsize: int) -> int:
    """Return the bytes of a square matrix's upper triangle, stored in block rows."""
    return itemsize * width**2 * (TRIANGLE_BLOCKS + 1) // (2 * TRIANGLE_BLOCKS)


def _widths(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the width of the widest output projection in attention, and in MLPs or their experts."""
    shapes = [checkpoint.layer_shapes(layer) for layer in range(checkpoint.num_layers)]
    attention, mlp = checkpoint.family.attention.output_weight, checkpoint.family.mlp.output_weight
    return max(one[attention][-1] for one in shapes), max(one[mlp][-1] for one in shapes)
