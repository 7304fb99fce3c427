"""Exports a pruned Llama as a DeciLM (Nemotron-NAS), a class that vLLM, SGLang and TensorRT-LLM have."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.exports import Export
from orchestrator.exports.places import default_directory, narrow_window, open_pruned
from orchestrator.output.staging import open_staging
from slimllm_ops.checkpoint.companions import plan_record
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.errors import InputError
from slimllm_ops.files import copy_file
from slimllm_ops.models.config_checks import without_lists
from slimllm_ops.models.families import LayerShape, head_dim, layer_shape
from slimllm_ops.models.pruned import decilm, pruned_layers, pruned_llama

# Model types of the families whose layers are a Llama's.
FAMILIES = ("llama", "mistral")
HOW = "prune with --uniform-heads --multiple-of 256 --no-bias"


def export_deci(output: Path, path: Path | None, overwrite: bool) -> Export:
    """Write a pruned Llama or Mistral whose layers have the same heads as a DeciLM; its tensors stay as they are.

    Args:
        output: The directory of a pruned checkpoint.
        path: The directory to write; None for `OUTPUT-deci` beside the checkpoint.
        overwrite: Whether to replace an existing directory.

    Raises:
        CheckpointError: The checkpoint is missing, broken or not pruned, or a link leads out of it.
        InputError: A DeciLM cannot have its heads, channels, biases or window.
        ConfigError: The path is taken, or cannot be written to.
    """
    source, record = open_pruned(output), plan_record(output)
    config = _describe(source)
    path = path or default_directory(output, "deci")
    with open_staging(path, overwrite) as staging:
        writer = CheckpointWriter(source, staging.directory)
        for layer in range(source.num_layers):
            writer.write_tensors(layer, source.read_layer(layer))
        writer.finish_as(config)
        for module in (decilm, pruned_llama, pruned_layers):
            file = Path(inspect.getfile(module))
            copy_file(file, staging.directory / file.name)
        record.copy(staging.directory)
    return Export(path, "DeciLMForCausalLM", "a DeciLMForCausalLM with the same tensors")


def _describe(source: Checkpoint) -> dict[str, Any]:
    """Return the config of the DeciLM that a pruned model is.

    Raises:
        InputError: It is none.
    """
    shapes = [layer_shape(source.config, layer) for layer in range(source.num_layers)]
    _require_fitting(source, shapes)
    # A Mistral's config lacks the settings for biases. Its window covers the whole context, so it has no effect.
    config = {"attention_bias": False, "mlp_bias": False} | without_lists(source.config)
    config.pop("sliding_window", None)
    heads, kv_heads = shapes[0].num_attention_heads, shapes[0].num_key_value_heads
    hidden = source.config.hidden_size
    return config | {
        "model_type": decilm.DeciLMConfig.model_type,
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "decilm.DeciLMConfig",
            "AutoModel": "decilm.DeciLMModel",
            "AutoModelForCausalLM": "decilm.DeciLMForCausalLM",
        },
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim(source.config),
        "intermediate_size": max(shape.intermediate_size for shape in shapes),
        "block_configs": [decilm.block_config(heads, kv_heads, shape.intermediate_size, hidden) for shape in shapes],
    }


def _require_fitting(source: Checkpoint, shapes: list[LayerShape]) -> None:
    name = source.family.name
    if source.family.model_type not in FAMILIES:
        raise _refusal(source, f"{name} is not a Llama in its layers; supported: {', '.join(FAMILIES)}")
    if (window := narrow_window(source.config)) is not None:
        raise _refusal(source, f"its sliding window of {window} is narrower than its context")
    for layer, shape in enumerate(shapes):
        channels = shape.intermediate_size
        if replace(shape, intermediate_size=0) != replace(shapes[0], intermediate_size=0):
            raise _refusal(source, f"layers 0 and {layer} differ in heads: {HOW}")
        if channels % decilm.WHOLE_CHANNELS:
            whole = decilm.WHOLE_CHANNELS
            raise _refusal(source, f"layer {layer} has {channels} channels, not a multiple of {whole}: {HOW}")
        if biases := [one for one in source.layer_shapes(layer) if one.endswith(".bias")]:
            raise _refusal(source, f"layer {layer} has {biases[0]}: {HOW}")


def _refusal(source: Checkpoint, why: str) -> InputError:
    return InputError(f"{source.directory} is no DeciLM: {why}")
