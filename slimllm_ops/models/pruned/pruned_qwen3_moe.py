"""Pruned Qwen3 mixtures of experts (`pruned_layers.py`)."""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel

from .pruned_layers import PrunedConfigMixin, PrunedExpertsMixin


class PrunedQwen3MoeConfig(PrunedConfigMixin, Qwen3MoeConfig):
    """Config of a pruned Qwen3 mixture of experts."""

    model_type = "pruned_qwen3_moe"
    intermediate_size_name = "moe_intermediate_size"


class PrunedQwen3MoeModel(PrunedExpertsMixin, Qwen3MoeModel):
    """A pruned Qwen3 mixture of experts, without the head."""

    config_class = PrunedQwen3MoeConfig


class PrunedQwen3MoeForCausalLM(PrunedExpertsMixin, Qwen3MoeForCausalLM):
    """A pruned Qwen3 mixture of experts."""

    config_class = PrunedQwen3MoeConfig
