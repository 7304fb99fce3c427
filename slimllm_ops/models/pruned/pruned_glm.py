"""Pruned GLM models (`pruned_layers.py`)."""

from typing import Any

from transformers import GlmConfig, GlmForCausalLM, GlmModel

from .pruned_layers import LinearNames, PrunedConfigMixin, PrunedModelMixin


class PrunedGlmConfig(PrunedConfigMixin, GlmConfig):
    """Config of a pruned GLM."""

    model_type = "pruned_glm"


class PrunedGlmMixin(PrunedModelMixin):
    """The parts of a pruned GLM that differ from Llama's."""

    config_class: Any = PrunedGlmConfig
    mlp_names = LinearNames("mlp", ("gate_up_proj",), "down_proj")


class PrunedGlmModel(PrunedGlmMixin, GlmModel):
    """A pruned GLM, without the head."""


class PrunedGlmForCausalLM(PrunedGlmMixin, GlmForCausalLM):
    """A pruned GLM."""
