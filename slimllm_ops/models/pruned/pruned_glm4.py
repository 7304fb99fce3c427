"""Pruned GLM-4 models (`pruned_layers.py`)."""

from typing import Any

from transformers import Glm4Config, Glm4ForCausalLM, Glm4Model

from .pruned_layers import LinearNames, PrunedConfigMixin, PrunedModelMixin


class PrunedGlm4Config(PrunedConfigMixin, Glm4Config):
    """Config of a pruned GLM-4."""

    model_type = "pruned_glm4"


class PrunedGlm4Mixin(PrunedModelMixin):
    """The parts of a pruned GLM-4 that differ from Llama's."""

    config_class: Any = PrunedGlm4Config
    mlp_names = LinearNames("mlp", ("gate_up_proj",), "down_proj")


class PrunedGlm4Model(PrunedGlm4Mixin, Glm4Model):
    """A pruned GLM-4, without the head."""


class PrunedGlm4ForCausalLM(PrunedGlm4Mixin, Glm4ForCausalLM):
    """A pruned GLM-4."""
