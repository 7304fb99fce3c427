"""Writing a pruned checkpoint as it comes: a layer a shard, then the embeddings, the final norm and the head."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from slimllm_ops import pruned_model
from slimllm_ops.checkpoint import INDEX, Checkpoint
from slimllm_ops.families import layer_shape
from slimllm_ops.plan import Decision, LayerPlan
from slimllm_ops.surgery import prune_layer

# What describes the text side of a model; weights, config and model code are written anew.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
COPIED_FILES = (*TOKENIZER_FILES, "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*")


class CheckpointWriter:
    """Writes the pruned model of a source checkpoint into a directory."""

    def __init__(self, source: Checkpoint, directory: Path) -> None:
        self._source = source
        self._directory = directory
        directory.mkdir(exist_ok=True)
        self._weight_map: dict[str, str] = {}
        self._num_bytes = 0
        self.layers: list[LayerPlan] = []

    def commit(self, plan: LayerPlan) -> None:
        """Write the next layer, pruned by its plan, in the source's dtype."""
        layer = len(self.layers)
        tensors = prune_layer(self._source.read_layer(layer), self._source.family, plan)
        prefix = self._source.layer_prefix(layer)
        self._save({prefix + name: tensor for name, tensor in tensors.items()}, layer)
        # What is written need not be held: the weights of a refit are as large as the layer.
        self.layers.append(plan.recorded())

    def finish(self) -> None:
        """Write everything but the layers: embeddings, index, config, model code, tokenizer."""
        for number, module in enumerate(self._source.outside(), start=self._source.num_layers):
            tensors = self._source.read_module(module)
            self._save({f"{module}.{name}": tensor for name, tensor in tensors.items()}, number)
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._weight_map}
        self._write_json(INDEX, index)
        self._write_config()
        self._copy_files()

    def _save(self, tensors: dict[str, Tensor], number: int) -> None:
        num_shards = self._source.num_layers + len(self._source.outside())
        name = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, self._directory / name, metadata={"format": "pt"})
        # safetensors gives its files to their owner alone; a model is read by whoever may read its directory.
        (self._directory / name).chmod(0o644)
        self._weight_map |= dict.fromkeys(contiguous, name)
        self._num_bytes += sum(tensor.nbytes for tensor in contiguous.values())

    def _write_config(self) -> None:
        config = self._source.config.to_dict()
        family = self._source.family
        config |= _per_layer(self._source, self.layers)
        config["model_type"] = f"pruned_{family.model_type}"
        config["architectures"] = [f"Pruned{family.name}ForCausalLM"]
        config["dtype"] = str(self._source.dtype).removeprefix("torch.")
        file = Path(pruned_model.__file__)
        config["auto_map"] = {
            "AutoConfig": f"{file.stem}.Pruned{family.name}Config",
            "AutoModelForCausalLM": f"{file.stem}.Pruned{family.name}ForCausalLM",
        }
        self._write_json("config.json", config)
        shutil.copyfile(file, self._directory / file.name)

    def _copy_files(self) -> None:
        for pattern in COPIED_FILES:
            for path in sorted(self._source.directory.glob(pattern)):
                shutil.copyfile(path, self._directory / path.name)
        # `auto_map` makes AutoTokenizer look for a class of its own unless its config names one.
        described = self._directory / "tokenizer_config.json"
        if (self._directory / "tokenizer.json").exists():
            settings = json.loads(described.read_text()) if described.exists() else {}
            self._write_json(described.name, {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        (self._directory / name).write_text(json.dumps(content, indent=2) + "\n")


def replace_layer(checkpoint: Checkpoint, layer: int, tensors: dict[str, Tensor]) -> None:
    """Write a layer of a pruned checkpoint anew, in its shard's place; shapes and dtypes stay as they were."""
    named = {checkpoint.layer_prefix(layer) + name: tensor.contiguous() for name, tensor in tensors.items()}
    shard = checkpoint.directory / checkpoint.files[next(iter(named))]
    # Beside it first: a worker may still read the old one.
    partial = shard.with_suffix(".partial")
    save_file(named, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(shard)


def _per_layer(source: Checkpoint, plans: list[LayerPlan]) -> dict[str, list[int] | list[bool]]:
    """Return the numbers of each layer that the pruned model's config adds to the dense one's."""
    shapes = [layer_shape(source.config, layer) for layer in range(len(plans))]
    kv_heads = [_kept(plan.attention, shape.num_key_value_heads) for plan, shape in zip(plans, shapes, strict=True)]
    return {
        "num_attention_heads_per_layer": [
            kept * (shape.num_attention_heads // shape.num_key_value_heads)
            for kept, shape in zip(kv_heads, shapes, strict=True)
        ],
        "num_key_value_heads_per_layer": kv_heads,
        "intermediate_size_per_layer": [
            _kept(plan.mlp, shape.intermediate_size) for plan, shape in zip(plans, shapes, strict=True)
        ],
        "attention_output_bias_per_layer": [
            plan.attention is not None or source.has(layer, source.family.attention.output_bias)
            for layer, plan in enumerate(plans)
        ],
        "mlp_output_bias_per_layer": [
            plan.mlp is not None or source.has(layer, source.family.mlp.output_bias) for layer, plan in enumerate(plans)
        ],
    }


def _kept(decision: Decision | None, whole: int) -> int:
    return whole if decision is None else len(decision.kept)
