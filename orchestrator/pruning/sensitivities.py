"""Measures how much the loss depends on each module's output, before the calibration pass."""

from orchestrator.pruning.run_context import RunContext
from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.stream.sensitivity import SensitivityStream, sensitivity_blocks

SENSITIVITY = "sensitivity"


def measure_sensitivities(context: RunContext, store: MomentStore) -> None:
    """Pass the first blocks through the dense model and back; save the sensitivity of every layer."""
    shards, num_layers = context.shards, context.source.num_layers
    blocks_BT = context.inputs.calibration_blocks()
    blocks_BT = blocks_BT[: sensitivity_blocks(blocks_BT.shape[1])]
    # The pass ends with the first layer.
    for attempt in context.attempts(lambda: store.has_sensitivity(0)):
        with attempt:
            if store.has_sensitivity(0):
                continue
            shards.open_sensitivity(SENSITIVITY, context.source, blocks_BT)
            for layer in range(num_layers):
                shards.each(SENSITIVITY, SensitivityStream.forward_kept, layer)
            shards.each(SENSITIVITY, SensitivityStream.begin_backward)
            for done in context.reporter.layers("sensitivities", num_layers, blocks_BT.size):
                layer = num_layers - 1 - done
                seen = shards.get(shards.merge(SENSITIVITY, SensitivityStream.backward, layer))
                store.save_sensitivity(layer, seen.value)
            shards.close_stream(SENSITIVITY)
