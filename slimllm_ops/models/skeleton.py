"""Builds a config's model without weights: they take no memory, and no time to fill with random values."""

from contextlib import AbstractContextManager

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from slimllm_ops.models.transformers_private import no_init_weights


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model that has shapes and no values, neither of weights nor of buffers."""
    return _build(config, torch.device("meta"))


def build_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model without weights, but with real buffers, such as rotary tables."""
    return _build(config, init_empty_weights(include_buffers=False)).eval()


def _build(config: PretrainedConfig, without_weights: AbstractContextManager[object]) -> PreTrainedModel:
    with without_weights, no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    return model
