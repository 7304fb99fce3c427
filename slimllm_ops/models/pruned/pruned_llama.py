"""Pruned Llama models (`pruned_layers.py`)."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedLlamaConfig(PrunedConfigMixin, LlamaConfig):
    """Config of a pruned Llama."""

    model_type = "pruned_llama"


class PrunedLlamaModel(PrunedModelMixin, LlamaModel):
    """A pruned Llama, without the head."""

    config_class = PrunedLlamaConfig


class PrunedLlamaForCausalLM(PrunedModelMixin, LlamaForCausalLM):
    """A pruned Llama."""

    config_class = PrunedLlamaConfig
