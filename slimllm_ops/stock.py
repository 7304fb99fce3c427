"""Exports a uniform pruned model as a stock class, which loads without our code and which servers support.

The family's own class is used if it accepts the shapes. Otherwise, a Llama is tried as a Mistral, whose number of heads
need not divide the hidden size, and a model with Llama's structure as a Granite, which has a bias in every projection.
If a class expects a bias that the model does not have, it gets zeros. Nothing is converted: the tensors are those of
the pruned model, except that each expert's tensors are written separately, as in checkpoints of stock classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.errors import InputError, ReadBackError
from slimllm_ops.models.config_checks import without_lists
from slimllm_ops.models.families import LayerShape, head_dim, layer_shape
from slimllm_ops.models.pruned.pruned_layers import WHOLE_CHANNELS
from slimllm_ops.models.skeleton import build_on_meta
from slimllm_ops.stream.passes import LayerStream

# The number of tokens on which both models are compared bit by bit.
COMPARED_TOKENS = 64
# The settings that the configs of Llama-like families share.
SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)
LLAMA_LIKE = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class StockForm:
    """A stock class that fits a pruned model: its config, and the biases it expects that the model does not have."""

    config: PretrainedConfig
    zeros: dict[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """The name of the class."""
        return str((self.config.architectures or ["?"])[0])


def stock_form(source: Checkpoint) -> StockForm:
    """Return the first stock class that fits a pruned model.

    Raises:
        InputError: Its layers differ in shape, or no class fits it; the message says why.
    """
    shape = _one_shape(source)
    if source.family.mlp.has_experts and shape.intermediate_size % WHOLE_CHANNELS:
        raise InputError(
            f"the experts of {source.directory} have {shape.intermediate_size} channels each, and the grouped products "
            f"of stock classes take multiples of {WHOLE_CHANNELS}: prune with --uniform --multiple-of {WHOLE_CHANNELS}"
        )
    refused = []
    for describe in (_own, _as_mistral, _as_granite):
        described = describe(source, shape)
        if described is None:
            continue
        try:
            return _fitted(source, CONFIG_MAPPING[described["model_type"]].from_dict(described))
        # Any exception: configs are checked by many validators, and models by their constructors.
        except Exception as error:
            refused.append(f"{described['model_type']}: {' '.join(str(error).split())[:160]}")
    raise InputError(
        f"no stock class takes {source.directory} ({'; '.join(refused)}): prune with --uniform --no-bias, or serve it "
        f"with the model code in the checkpoint"
    )


def write_stock(source: Checkpoint, form: StockForm, directory: Path) -> Checkpoint:
    """Write a pruned model as a stock class, layer by layer, and check that it computes the same, bit for bit.

    Raises:
        ReadBackError: It does not compute the same.
    """
    writer, prefix = CheckpointWriter(source, directory), source.layer_prefix
    for layer in range(source.num_layers):
        tensors = source.read_layer(layer)
        for name, size in form.zeros.items():
            if name.startswith(prefix(layer)):
                tensors[name.removeprefix(prefix(layer))] = torch.zeros(size, dtype=source.dtype)
        writer.write_tensors(layer, _split(source, tensors))
    writer.finish_as(form.config.to_dict() | {"architectures": [form.architecture]})
    written = Checkpoint.open(directory)
    require_same_states(source, written)
    return written


def require_same_states(source: Checkpoint, other: Checkpoint) -> None:
    """Check that two models have the same hidden states and likelihoods, bit for bit, in float32 on the CPU.

    Raises:
        ReadBackError: A layer's states differ; the message says by how much.
    """
    ids = _some_tokens(source.config)
    streams = [LayerStream(model, [ids], torch.device("cpu")) for model in (source, other)]
    for layer in range(source.num_layers):
        for stream in streams:
            stream.forward(layer)
        _require_equal([stream.hidden[0] for stream in streams], f"after layer {layer}")
    likelihoods = [torch.tensor(stream.negative_log_likelihood().value) for stream in streams]
    _require_equal(likelihoods, "in its likelihood")
    for stream in streams:
        stream.close()


def _require_equal(pair: list[Tensor], where: str) -> None:
    one, other = pair
    if not torch.equal(one, other):
        difference = float((one - other).abs().max())
        raise ReadBackError(
            f"the exported model differs from the pruned one by {difference:.2g} {where}: this is a bug worth reporting"
        )


def _some_tokens(config: PretrainedConfig) -> Tensor:
    length = min(COMPARED_TOKENS, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _one_shape(source: Checkpoint) -> LayerShape:
    """Return the shape that all layers share.

    Raises:
        InputError: The layers' shapes differ.
    """
    shapes = [layer_shape(source.config, layer) for layer in range(source.num_layers)]
    for layer, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise InputError(
                f"layers 0 and {layer} of {source.directory} differ in shape, and a stock class has one shape for all: "
                f"prune with --uniform"
            )
    return shapes[0]


def _own(source: Checkpoint, shape: LayerShape) -> dict[str, Any]:
    """Describe the model as its family's own class."""
    described = without_lists(source.config)
    described.pop("auto_map", None)
    described |= _sizes(source, shape) | {source.family.intermediate_size: shape.intermediate_size}
    attention, mlp = source.family.branches
    # What a setting gives biases to is zero where the model has none.
    settings = (("attention_bias", attention), ("attention_out_bias", attention), ("mlp_bias", mlp))
    for setting, branch in (*settings, ("use_bias", attention), ("use_bias", mlp)):
        if setting in described and any(source.has(layer, branch.output_bias) for layer in range(source.num_layers)):
            described[setting] = True
    return _named(described, source.family.model_type, source.family.name)


def _as_mistral(source: Checkpoint, shape: LayerShape) -> dict[str, Any] | None:
    """Describe a Llama as a Mistral without a sliding window."""
    if source.family.model_type != "llama":
        return None
    described = _shared(source, shape) | {"sliding_window": None}
    return _named(described, "mistral", "Mistral")


def _as_granite(source: Checkpoint, shape: LayerShape) -> dict[str, Any] | None:
    """Describe a model with Llama's structure as a Granite with neutral multipliers."""
    config = source.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if source.family.model_type not in LLAMA_LIKE or window is not None:
        return None
    multipliers = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
    described = _shared(source, shape) | multipliers | {"attention_bias": True, "mlp_bias": True}
    described["attention_multiplier"] = head_dim(source.config) ** -0.5
    return _named(described, "granite", "Granite")


def _shared(source: Checkpoint, shape: LayerShape) -> dict[str, Any]:
    dense = source.config.to_dict()
    described = {name: dense[name] for name in SHARED_SETTINGS if name in dense}
    return described | _sizes(source, shape) | {"intermediate_size": shape.intermediate_size}


def _split(source: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's tensors as checkpoints of its family's stock class store them."""
    for stored in source.family.stored:
        tensors |= stored.split(tensors.pop(stored.name))
    return tensors


def _sizes(source: Checkpoint, shape: LayerShape) -> dict[str, Any]:
    sizes = {"num_attention_heads": shape.num_attention_heads}
    if hasattr(source.config, "num_key_value_heads"):
        sizes["num_key_value_heads"] = shape.num_key_value_heads
    # Without `head_dim`, transformers derives it from the number of heads.
    return sizes | {"head_dim": head_dim(source.config)}


def _named(described: dict[str, Any], model_type: str, name: str) -> dict[str, Any]:
    return described | {"model_type": model_type, "architectures": [f"{name}ForCausalLM"]}


def _fitted(source: Checkpoint, config: PretrainedConfig) -> StockForm:
    """Return the stock form for a config, after checking that its model has the checkpoint's shapes, except for biases.

    Raises:
        InputError: The shapes or tensors do not match.
    """
    model = build_on_meta(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    held = source.shapes([name for name in source.files if not name.startswith(f"{source.family.layers}.")])
    for layer in range(source.num_layers):
        held |= {source.layer_prefix(layer) + name: size for name, size in source.layer_shapes(layer).items()}
    for name, size in held.items():
        if name in wanted and wanted[name] != size:
            raise InputError(f"{name} would be {wanted[name]}, but is {size}")
        if name not in wanted and name not in model.state_dict():
            raise InputError(f"it has no {name}")
    zeros = {name: size for name, size in wanted.items() if name not in held}
    if missing := [name for name in zeros if not name.endswith(".bias")]:
        raise InputError(f"it expects {missing[0]}")
    return StockForm(config, zeros)
