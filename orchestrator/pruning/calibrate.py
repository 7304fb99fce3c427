"""Passes the calibration data through the dense model once; keeps what any one-pass method needs of it.

calibrate
measure_sensitivities    one pass of a few blocks, forward and backward
observe                  LayerStream.observe_dense on every shard, moments merged; for each layer and module
eliminate                eliminate_observed as a solve, while the shards observe the next layer
save                     moments and elimination paths, in the MomentStore
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.pool import in_flight
from actors.workers import Reference
from orchestrator.inputs import Inputs
from orchestrator.pruning.run_context import RunContext
from orchestrator.pruning.sensitivities import measure_sensitivities
from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.decide.paths import LayerPaths, ModulePath
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.models.families import layer_shape
from slimllm_ops.models.pair import Pair
from slimllm_ops.module_solves import eliminate_observed
from slimllm_ops.moments.observation import require_tokens
from slimllm_ops.moments.sums import DensePass
from slimllm_ops.stream.passes import LayerStream

DENSE = "dense"


@dataclass(frozen=True)
class _ObservedModule:
    """References to the pass of a module over all shards, and to its elimination."""

    seen: Reference[DensePass]
    path: Reference[ModulePath]


def calibrate(context: RunContext, store: MomentStore) -> None:
    """Pass the calibration data through the dense model once; save each layer's moments and elimination paths."""
    measure_sensitivities(context, store)
    shards, num_layers, tokens = context.shards, context.source.num_layers, context.inputs.calibration.num_tokens
    num_saved = partial(store.num_saved, num_layers)
    for attempt in context.attempts(num_saved):
        with attempt:
            if (first := num_saved()) == num_layers:
                continue
            measures_change = context.inputs.form.drop_layers
            blocks_BT = context.inputs.calibration_blocks()
            shards.open_stream(DENSE, context.source, blocks_BT, measures_change=measures_change)
            for layer in context.reporter.layers("replaying", first, tokens):
                shards.each(DENSE, LayerStream.forward_pruned, layer, LayerPlan())
            observed = in_flight(_observe_layers(context, store, range(first, num_layers)))
            for layer in context.reporter.layers("calibrating", num_layers, tokens, first):
                _save_layer(context, store, layer, next(observed))
            shards.close_stream(DENSE)
    store.seal(moments_of(context.inputs))


def _observe_layers(context: RunContext, store: MomentStore, layers: range) -> Iterator[Pair[_ObservedModule]]:
    """Submit the observations and eliminations of layers; yield references to their results."""
    source = context.source
    for layer in layers:
        shape = layer_shape(source.config, layer)
        modules, units = [], (shape.num_attention_units, shape.intermediate_size)
        fishers = store.load_sensitivity(layer).modules
        for branch, num_units, fisher_DD in zip(source.family.branches, units, fishers, strict=True):
            seen = context.shards.merge(DENSE, LayerStream.observe_dense, layer, branch)
            path = context.pool.submit(eliminate_observed, layer, branch, seen, num_units, fisher_DD)
            modules.append(_ObservedModule(seen, path))
        yield Pair(*modules)


def _save_layer(context: RunContext, store: MomentStore, layer: int, modules: Pair[_ObservedModule]) -> None:
    """Wait for a layer's observations and eliminations, and save them."""
    # Moments go through the driver to its disk, so that a killed run can resume from there.
    seen = modules.map(lambda module: context.pool.get(module.seen))
    paths = modules.map(lambda module: context.pool.get(module.path))
    for branch, one in zip(context.source.family.branches, seen, strict=True):
        require_tokens(one, context.inputs.calibration.num_tokens, f"layer {layer}, {branch.described}")
    change = None if seen.mlp.change is None else seen.mlp.change.value
    store.save(
        layer,
        LayerPaths(paths.attention, paths.mlp, seen.mlp.power.value, change),
        seen.attention.observed,
        seen.mlp.observed,
    )


def moments_of(inputs: Inputs) -> dict[str, Any]:
    """Return the values that identify moments: the digests of the weights and of the calibration tokens."""
    return {
        "model": inputs.name,
        "model_digest": inputs.source_digest,
        "calibration": inputs.calibration.describe(),
        "drop_layers": inputs.form.drop_layers,
    }
