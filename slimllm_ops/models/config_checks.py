"""Reads a model's config.json, which is untrusted, and checks its numbers before transformers uses them.

Transformers allocates memory by some of these numbers when it parses them, and by the others when it builds the model.
The file is read once, so what is checked is what is parsed. Transformers gets the keys that it knows for the model, and
no other. No other file that the config names is read, and no code is run.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slimllm_ops.errors import CheckpointError, shown
from slimllm_ops.files import read_json_object
from slimllm_ops.models.families import Family, family_named, is_supported
from slimllm_ops.models.quantisation import QUANTISED, Blocks, blocks_of
from slimllm_ops.models.refusals import reason_against, wrapped_text

# Processes that read weights but no config need not import transformers, which takes seconds.
if TYPE_CHECKING:
    from transformers import PretrainedConfig

LARGEST_CONFIG = 1 << 24

# The bounds of every integer that determines a size, far beyond any existing model.
SIZES = {
    "num_hidden_layers": (1, 1 << 12),
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (1, 1 << 24),
    "vocab_size": (1, 1 << 24),
    "num_attention_heads": (1, 1 << 16),
    "max_position_embeddings": (1, 1 << 32),
    # OPT only.
    "ffn_dim": (1, 1 << 24),
    "word_embed_proj_dim": (1, 1 << 20),
    # Mixtures of experts only; a config has one of the first two.
    "num_local_experts": (1, 1 << 14),
    "num_experts": (1, 1 << 14),
    "num_experts_per_tok": (1, 1 << 14),
    "moe_intermediate_size": (1, 1 << 24),
}
# The bounds of integers that may be missing or null.
OPTIONAL_SIZES = {
    "num_key_value_heads": (1, 1 << 16),
    "head_dim": (1, 1 << 16),
    # Transformers builds a table with this many names.
    "num_labels": (0, 1 << 16),
}
# Lists with a number for each layer, in pruned models only.
PER_LAYER_SIZES = ("num_attention_heads_per_layer", "num_key_value_heads_per_layer", "intermediate_size_per_layer")
# Lists with a value for each layer, in families that have several kinds of layers.
PER_LAYER_KINDS = ("layer_types", "no_rope_layers")
PER_LAYER_FLAGS = ("attention_output_bias_per_layer", "mlp_output_bias_per_layer")
# What transformers reads of a config besides the fields of its class: older names of fields, what it asks every config
# for, and the class of the tokenizer. None of it names code, a file or a repository.
ALSO_READ = (
    *("model_type", "torch_dtype", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor"),
    *("rotary_emb_base", "rotary_pct", "sliding_window_pattern", "num_labels", "tokenizer_class"),
    *("head_dim", "is_causal", "sliding_window", "attention_chunk_size", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
)
# Settings that change how a model is built or stored, in ways that no family here supports.
UNSUPPORTED = {
    "transformers_weights": (
        "its weights have a name of their own: rename them to model.safetensors and remove the setting"
    ),
    "per_layer_config": "its layers differ in ways that are not supported",
}


def read_config(directory: Path) -> "tuple[PretrainedConfig, Blocks | None]":
    """Return the config of a model directory, after checking that its family is known and its sizes are plausible.

    If its weights are quantised in a way that can be restored, return their blocks too, and the config of the restored
    model.

    Raises:
        CheckpointError: The directory or its config.json is missing or wrong, or the architecture is unknown.
    """
    from transformers import CONFIG_MAPPING

    described = read_description(directory)
    try:
        _require_text_model(described)
        family = family_named(described.get("model_type"))
        blocks = blocks_of(described)
        restored = {key: value for key, value in described.items() if key not in QUANTISED}
        _check(restored, family)
        config = CONFIG_MAPPING[restored["model_type"]]
        return config.from_dict(_settings_of(restored, config, family)), blocks
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    # Any exception: transformers and its validators raise a dozen types, and the config is always the cause.
    except Exception as error:
        raise wrong_config(directory, error) from error


def without_lists(config: "PretrainedConfig") -> dict[str, Any]:
    """Return a pruned model's settings without its lists with a number or flag for each layer."""
    lists = (*PER_LAYER_SIZES, *PER_LAYER_FLAGS)
    return {name: value for name, value in config.to_dict().items() if name not in lists}


def kept_layers(described: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return a JSON config reduced to some of the model's layers."""
    lists = (*PER_LAYER_SIZES, *PER_LAYER_FLAGS, *PER_LAYER_KINDS)
    of_kept = {key: [described[key][layer] for layer in kept] for key in lists if described.get(key) is not None}
    return described | of_kept | {"num_hidden_layers": len(kept)}


def wrong_config(directory: Path, error: Exception) -> CheckpointError:
    """Return the error for a config that transformers cannot parse or build a model from."""
    reason = shown(" ".join(str(error).split()), 300) or type(error).__name__
    return CheckpointError(f"{directory}: its config.json is wrong: {reason}")


def read_description(directory: Path) -> dict[str, Any]:
    """Return what a model directory's config.json says.

    Raises:
        CheckpointError: The directory or the file is missing or broken.
    """
    try:
        is_directory, has_config = directory.is_dir(), (directory / "config.json").is_file()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"model directory {directory!s:.300} cannot be read ({reason}): check the path"
        ) from error
    if not is_directory:
        raise CheckpointError(f"model directory {directory} does not exist: pass a directory or a hub id")
    if not has_config:
        raise CheckpointError(f"{directory} has no config.json: it is not a Hugging Face model directory")
    return read_json_object(directory / "config.json", LARGEST_CONFIG)


def _require_text_model(described: dict[str, Any]) -> None:
    """Refuse a model for pictures or sound, whose text model has a config within the model's.

    Raises:
        CheckpointError: It is one; the message says what its text model is, and whether that is supported.
    """
    wraps, text_type = wrapped_text(described)
    if not wraps or is_supported(described.get("model_type")):
        return
    found = f"models of type {shown(repr(described.get('model_type')))} are for more than text"
    if is_supported(text_type):
        todo = f"save its text model, of type {text_type!r}, alone, as docs/families.md says, and prune that"
    elif text_type is None:
        todo = "pass a text model"
    else:
        reason = reason_against(text_type)
        known = f": {reason}" if reason else ""
        todo = f"its text model, of type {shown(repr(text_type))}, is not supported either{known}"
    raise CheckpointError(f"{found}, and slimllm prunes text models alone: {todo}")


def _check(described: dict[str, Any], family: Family) -> None:
    for key, reason in UNSUPPORTED.items():
        if described.get(key) is not None:
            raise CheckpointError(f"config.json has a {key}, so {reason}")
    for key, value, reason in family.requires:
        if described.get(key, value) != value:
            raise CheckpointError(
                f"config.json has {key} {shown(repr(described[key]))}: {family.name} models are supported where it "
                f"is {value}{f': {reason}' if reason else ''}"
            )
    _check_sizes(described)
    _check_positions(described)
    for key, value in described.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise _wrong(key, value, "a finite number")
    _check_layers(described, family)


def _settings_of(described: dict[str, Any], config: type["PretrainedConfig"], family: Family) -> dict[str, Any]:
    """Return what is known of a description; transformers sets every other key as an attribute, whatever it does.

    Some of them run code: an attention implementation is fetched from the hub if it has the name of a repository.
    """
    fields = {field.name for field in dataclasses.fields(cast(Any, config))}
    renamed = {*config.attribute_map, *config.attribute_map.values()}
    required = {key for key, _, _ in family.requires}
    known = {*fields, *renamed, *required, *ALSO_READ, *PER_LAYER_SIZES, *PER_LAYER_FLAGS, *PER_LAYER_KINDS}
    return {key: value for key, value in described.items() if key in known}


def _check_sizes(described: dict[str, Any]) -> None:
    for key, (least, most) in (SIZES | OPTIONAL_SIZES).items():
        optional = key in OPTIONAL_SIZES and described.get(key) is None
        if key in described and not optional and not _whole(described[key], least, most):
            raise _wrong(key, described[key], f"a whole number from {least} to {most:,}")
    heads, kv_heads = described.get("num_attention_heads"), described.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise _wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    chosen = described.get("num_experts_per_tok", 1)
    for key in ("num_local_experts", "num_experts"):
        if chosen > described.get(key, chosen):
            raise _wrong("num_experts_per_tok", chosen, f"at most {key} ({described[key]})")


def _check_positions(described: dict[str, Any]) -> None:
    """Check the numbers used by the rotary tables and the norms."""
    for key in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps"):
        epsilon = described.get(key, 0)
        if not _number(epsilon) or not 0 <= epsilon <= 1:
            raise _wrong(key, epsilon, "a number from 0 to 1")
    settings: list[tuple[str, Any]] = [("rope_theta", described.get("rope_theta"))]
    for key in ("rope_scaling", "rope_parameters"):
        rope = described.get(key) or {}
        if not isinstance(rope, dict):
            raise _wrong(key, rope, "an object")
        # Gemma 3 nests its settings by kind of layer.
        settings += [item for one in (rope, *rope.values()) if isinstance(one, dict) for item in one.items()]
    for key, value in settings:
        least = "above" if key in ("rope_theta", "factor") else "from"
        for number in value if isinstance(value, list) else [value]:
            holds = _number(number) and 0 <= number <= 1e18 and (number > 0 or least == "from")
            if type(number) in (int, float) and not holds:
                raise _wrong(key, number, f"a number {least} 0, up to 1e18")


def _check_layers(described: dict[str, Any], family: Family) -> None:
    """Check the per-layer lists of a pruned model: one value for each layer, no larger than in the dense model."""
    given = [key for key in (*PER_LAYER_SIZES, *PER_LAYER_FLAGS) if described.get(key) is not None]
    if not given:
        return
    if described["model_type"] == family.model_type:
        raise _wrong("model_type", described["model_type"], f"a pruned model, since the config has {given[0]}")
    layers, whole_heads = described.get("num_hidden_layers"), described.get("num_attention_heads")
    whole_kv_heads = described.get("num_key_value_heads") or whole_heads
    bounds = {
        "num_attention_heads": whole_heads,
        "num_key_value_heads": whole_kv_heads,
        family.intermediate_size: described.get(family.intermediate_size),
    }
    for key, (whole, most) in zip(PER_LAYER_SIZES, bounds.items(), strict=True):
        expected = f"whole numbers from 1 to {whole} ({most})"
        _check_list(key, described.get(key), layers, expected, partial(_whole, least=1, most=most))
    for key in PER_LAYER_FLAGS:
        _check_list(key, described.get(key), layers, "true or false", lambda value: isinstance(value, bool))
    heads, kv_heads = (described[f"{kind}_per_layer"] for kind in ("num_attention_heads", "num_key_value_heads"))
    for layer, (queries, keys) in enumerate(zip(heads, kv_heads, strict=True)):
        if queries * whole_kv_heads != keys * whole_heads:
            raise CheckpointError(
                f"its config.json is wrong: layer {layer} has {queries} heads and {keys} key/value heads, "
                f"expected the ratio of the model, {whole_heads}/{whole_kv_heads}"
            )


def _check_list(key: str, values: Any, length: Any, expected: str, holds: Callable[[Any], bool]) -> None:
    """Check a list that must have one valid value for each layer."""
    if not isinstance(values, list) or len(values) != length:
        found = f"{len(values)} values" if isinstance(values, list) else values
        raise _wrong(key, found, f"{expected}, one for each of {length} layers")
    for layer, value in enumerate(values):
        if not holds(value):
            raise _wrong(f"{key}[{layer}]", value, expected)


def _whole(value: Any, least: int, most: Any) -> bool:
    return type(value) is int and type(most) is int and least <= value <= most


def _number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _wrong(key: str, found: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"its config.json is wrong: {shown(key)} is {shown(repr(found))}, expected {expected}")
