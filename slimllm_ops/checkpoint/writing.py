"""Writes a pruned checkpoint as it is solved: one shard per layer, then the embeddings, the final norm and the head.

A shard gets its final name only once it is complete. The writer keeps no state about shards, so those written by a
process that died are as good as its own.
"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from slimllm_ops.checkpoint import generation, tokenizer
from slimllm_ops.checkpoint.companions import plan_companions
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.surgery import prune_layer
from slimllm_ops.checkpoint.tensor_index import INDEX
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.files import copy_file, write_json, written_whole
from slimllm_ops.models.config_checks import kept_layers
from slimllm_ops.models.families import layer_shape
from slimllm_ops.models.pruned import pruned_layers


def rehearse(source: Checkpoint) -> list[str]:
    """Try what a run does after its last layer with the files beside the weights; return lines to tell the user.

    Raises:
        CheckpointError: A file cannot be copied, or the tokenizer cannot be written.
    """
    companions = plan_companions(source.directory)
    everything = _pruned_config(source, [LayerPlan()] * source.num_layers)
    lines = (companions.told(), tokenizer.rehearse(companions, everything))
    return [line for line in lines if line is not None]


class CheckpointWriter:
    """A writer of the pruned model of a source checkpoint into a directory.

    Raises:
        CheckpointError: A file beside the weights cannot be copied; this is known before hours of work, not after.
    """

    def __init__(self, source: Checkpoint, directory: Path) -> None:
        self._source = source
        self.directory = directory
        tokenizer.read_settings(source.directory)
        self._companions = plan_companions(source.directory)
        directory.mkdir(parents=True, exist_ok=True)

    def write_layer(self, layer: int, plan: LayerPlan, number: int | None = None) -> None:
        """Prune a layer by its plan and write it, in the source's dtype.

        Args:
            layer: The layer's number in the source.
            plan: The layer's decisions.
            number: Its number in the pruned model; defaults to `layer`, which is right if no layer is dropped.

        Raises:
            NonFiniteError: A weight is infinite in that dtype; the message names the layer.
        """
        try:
            tensors = prune_layer(self._source.read_layer(layer), self._source.family, plan)
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {layer}: {error}") from None
        self.write_tensors(layer if number is None else number, tensors)

    def write_tensors(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write a layer's tensors unchanged, given by their names relative to the layer."""
        self._save({self._source.layer_prefix(number) + name: tensor for name, tensor in tensors.items()}, number)

    def finish(self, plans: Sequence[LayerPlan]) -> None:
        """Write everything except the layers: embeddings, index, config, model code, tokenizer.

        Args:
            plans: The plans of all layers of the source.
        """
        self.finish_as(_pruned_config(self._source, plans))
        for file in (_code_of(self._source), Path(pruned_layers.__file__)):
            copy_file(file, self.directory / file.name)

    def finish_as(self, config: dict[str, Any]) -> None:
        """Write everything except the layers and the model code: embeddings, index, this config, tokenizer."""
        outside, num_layers = self._source.outside(), config["num_hidden_layers"]
        for number, module in enumerate(outside, start=num_layers):
            tensors = self._source.read_module(module)
            self._save({f"{module}.{name}": tensor for name, tensor in tensors.items()}, number)
        shards = [self._shard(number) for number in range(num_layers + len(outside))]
        sizes = {shard.name: _tensor_sizes(shard) for shard in shards}
        index = {
            "metadata": {"total_size": sum(sum(tensors.values()) for tensors in sizes.values())},
            "weight_map": {tensor: shard for shard, tensors in sizes.items() for tensor in tensors},
        }
        self._write_json(INDEX, index)
        self._write_json("config.json", config)
        self._companions.copy(self.directory)
        tokenizer.settle(self._source.directory, self.directory)
        generation.settle(self._source.directory, self.directory)

    def _shard(self, number: int) -> Path:
        # No "-of-N": while the first shards are written, the number of layers that stay is unknown.
        return self.directory / f"model-{number + 1:05d}.safetensors"

    def _save(self, tensors: dict[str, Tensor], number: int) -> None:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        with written_whole(self._shard(number)) as partial:
            save_file(contiguous, partial, metadata={"format": "pt"})

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        write_json(self.directory / name, content, indent=2)


def _pruned_config(source: Checkpoint, plans: Sequence[LayerPlan]) -> dict[str, Any]:
    """Return the config of a source's pruned model."""
    kept = [layer for layer, plan in enumerate(plans) if not plan.dropped]
    config, family = kept_layers(source.config.to_dict(), kept), source.family
    config |= _per_layer(source, {layer: plans[layer] for layer in kept})
    config["model_type"] = f"pruned_{family.model_type}"
    config["architectures"] = [family.pruned.__name__]
    config["dtype"] = str(source.dtype).removeprefix("torch.")
    code = _code_of(source).stem
    config["auto_map"] = {
        "AutoConfig": f"{code}.{family.pruned.config_class.__name__}",
        "AutoModel": f"{code}.{family.pruned_base.__name__}",
        "AutoModelForCausalLM": f"{code}.{family.pruned.__name__}",
    }
    return config


def _code_of(source: Checkpoint) -> Path:
    """Return the file that defines the class of a source's pruned models."""
    return Path(inspect.getfile(source.family.pruned))


def _tensor_sizes(shard: Path) -> dict[str, int]:
    """Return the size in bytes of each tensor in a shard, from the header: its length in 8 bytes, then JSON."""
    with shard.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    begins_ends = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: end - begin for name, (begin, end) in begins_ends.items()}


def _per_layer(source: Checkpoint, plans: dict[int, LayerPlan]) -> dict[str, list[int] | list[bool]]:
    """Return the per-layer settings that the pruned model's config adds to the dense one's."""
    shapes = [layer_shape(source.config, layer) for layer in plans]
    shaped = list(zip(plans.values(), shapes, strict=True))
    kv_heads = [_kept(plan.attention, shape.num_key_value_heads) for plan, shape in shaped]
    return {
        "num_attention_heads_per_layer": [
            kept * (shape.num_attention_heads // shape.num_key_value_heads)
            for kept, shape in zip(kv_heads, shapes, strict=True)
        ],
        "num_key_value_heads_per_layer": kv_heads,
        "intermediate_size_per_layer": [
            _kept(plan.mlp, shape.num_channels) // shape.num_experts for plan, shape in shaped
        ],
        "attention_output_bias_per_layer": [
            _adds_bias(plan.attention) or source.has(layer, source.family.attention.output_bias)
            for layer, plan in plans.items()
        ],
        "mlp_output_bias_per_layer": [
            _adds_bias(plan.mlp) or source.has(layer, source.family.mlp.output_bias) for layer, plan in plans.items()
        ],
    }


def _adds_bias(decision: Decision | None) -> bool:
    return decision is not None and decision.with_bias


def _kept(decision: Decision | None, whole: int) -> int:
    return whole if decision is None else len(decision.kept)
