"""Pruned Gemma 3 (text) models (`pruned_layers.py`)."""

from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedGemma3TextConfig(PrunedConfigMixin, Gemma3TextConfig):
    """Config of a pruned Gemma 3 (text)."""

    model_type = "pruned_gemma3_text"


class PrunedGemma3Model(PrunedModelMixin, Gemma3TextModel):
    """A pruned Gemma 3 (text), without the head."""

    config_class = PrunedGemma3TextConfig


class PrunedGemma3ForCausalLM(PrunedModelMixin, Gemma3ForCausalLM):
    """A pruned Gemma 3 (text)."""

    config_class = PrunedGemma3TextConfig
