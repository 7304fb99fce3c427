"""Writes small pruned models whose layers differ, and prunes an MLP of a stream, without a run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.paper import choose_channels_by_output, recover_output
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.decide.recovery import Line
from slimllm_ops.models.families import Family, LayerShape, layer_shape
from slimllm_ops.stream.outputs import LayerwiseStream
from tests.slimllm_ops.naive import random_decision
from tests.tiny import save_tiny


def write_uneven(family: Family, folder: Path, **settings: Any) -> Path:
    """Prune a random model of three layers: the first loses heads and channels, the second channels, the third nothing.

    The line that recovers an output is far from the identity, and adds a bias.

    Returns:
        The directory of the pruned model; the dense one is beside it, in `dense`.
    """
    source = Checkpoint.open(save_tiny(family, folder / "dense", **settings))
    shape, hidden = layer_shape(source.config, 0), source.config.hidden_size
    heads = random_decision(0, [shape.num_attention_units - 1], shape.num_attention_units, hidden)
    plans = [
        LayerPlan(heads, _channels(1, shape, 19, hidden)),
        LayerPlan(None, _channels(2, shape, 33, hidden)),
        LayerPlan(),
    ]
    return write_pruned(source, plans, folder / "pruned")


def write_even_heads(family: Family, folder: Path, channels: Sequence[int], **settings: Any) -> Path:
    """Prune a random model so that every layer keeps one KV group, and its own number of channels; without biases."""
    settings |= {family.intermediate_size: max(channels) + 256, "sliding_window": None}
    source = Checkpoint.open(save_tiny(family, folder / "dense", **settings))
    shape, hidden = layer_shape(source.config, 0), source.config.hidden_size
    plans = []
    for layer, number in enumerate(channels):
        attention = random_decision(layer, [1], shape.num_attention_units, hidden)
        mlp = random_decision(layer, range(number), shape.num_channels, hidden)
        plans.append(LayerPlan(*(one and replace(one, with_bias=False) for one in (attention, mlp))))
    return write_pruned(source, plans, folder / "pruned")


def write_pruned(source: Checkpoint, plans: Sequence[LayerPlan], directory: Path) -> Path:
    """Write the model that plans make of a source, and return its directory."""
    writer = CheckpointWriter(source, directory)
    for layer, plan in enumerate(plans):
        writer.write_layer(layer, plan)
    writer.finish(plans)
    return directory


def _channels(seed: int, shape: LayerShape, number: int, hidden: int) -> Decision | None:
    """Return a decision that keeps the first channels of an MLP, or of each of its experts, which have no biases."""
    kept = [
        expert * shape.intermediate_size + channel for expert in range(shape.num_experts) for channel in range(number)
    ]
    decision = random_decision(seed, kept, shape.num_channels, hidden)
    if decision is None or shape.num_experts == 1:
        return decision
    line: Any = decision.recovery
    scale_ED = line.scale_D.expand(shape.num_experts, hidden)
    lines = Line(scale_ED, 0 * line.bias_D, line.relative_error)
    return Decision(decision.kept, decision.scores, lines, decision.relative_error, with_bias=False)


def prune_mlp(stream: LayerwiseStream, layer: int) -> Decision:
    """Remove 17 channels from the MLP of a layer by its outputs, and keep 5 % of those with the lowest scores."""
    observed = stream.observe_output(layer)
    chosen = choose_channels_by_output(stream, observed, layer, num_removed=17, keep_lowest=0.05)
    decision = recover_output(stream.compare_outputs(layer, chosen.kept), chosen)
    stream.add_recovered(layer, decision)
    return decision
