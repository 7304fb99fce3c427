"""Builds a small random model of every family, with norms and biases that differ from a fresh model's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from slimllm_ops.models.config_checks import PER_LAYER_KINDS
from slimllm_ops.models.families import FAMILIES, Family

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGER = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# What differs by family: tied embeddings, sliding windows, kinds of layers, multipliers, scaled rotary tables.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LONGER, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "gemma": {"head_dim": 12},
    "gemma2": {
        "head_dim": 12,
        "sliding_window": 8,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": WINDOWS | {"head_dim": 12, "query_pre_attn_scalar": 12},
    "granite": {
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"use_bias": True, "sliding_window": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "gpt_neox": {"rotary_pct": 0.25},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "qwen3_moe": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 12, "norm_topk_prob": False},
    "olmo3": WINDOWS
    | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        }
    },
    "seed_oss": {"head_dim": 12, "attention_bias": True, "attention_out_bias": False},
    "exaone4": WINDOWS,
    "ernie4_5": {"head_dim": 12},
    "hunyuan_v1_dense": {
        "head_dim": 12,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0},
    },
    "apertus": {"rope_parameters": LONGER},
    "nemotron": {"head_dim": 12},
    "glm": {"head_dim": 12},
    "glm4": {"head_dim": 12},
    "cohere2": WINDOWS | {"logit_scale": 0.25},
    "ministral": WINDOWS | {"head_dim": 12},
    "ministral3": {
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "olmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.0},
}
# The families whose every head has its own keys and values.
MULTI_HEAD = ("opt", "gpt_neox")


def first_of_build(family: Family) -> bool:
    """Return whether no earlier row of the table describes layers that are built alike."""
    builds = [replace(one, name="", model_type="", file="") for one in FAMILIES]
    return builds.index(builds[FAMILIES.index(family)]) == FAMILIES.index(family)


def tiny_config(family: Family, **settings: Any) -> PretrainedConfig:
    """Return the config of a small model of a family."""
    sizes = SIZES | ({} if family.model_type in MULTI_HEAD else {"num_key_value_heads": 2})
    sizes |= {family.intermediate_size: 48}
    sizes |= SETTINGS.get(family.model_type, {}) | settings
    # One value for each layer.
    sizes |= {key: sizes[key][: sizes["num_hidden_layers"]] for key in PER_LAYER_KINDS if key in sizes}
    return AutoConfig.for_model(family.model_type, **sizes)


def save_tiny(family: Family, directory: Path, **settings: Any) -> Path:
    """Save a random model of a family, and return its directory."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
            else:
                # Enough that every branch matters to the stream; no row of zeros for padding.
                parameter.normal_(std=0.3 if "layers." in name else 0.5)
    model.save_pretrained(directory)
    return directory
