"""Pruned Phi-3 models (`pruned_layers.py`)."""

from typing import Any

from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model

from .pruned_layers import LinearNames, PrunedConfigMixin, PrunedModelMixin


class PrunedPhi3Config(PrunedConfigMixin, Phi3Config):
    """Config of a pruned Phi-3."""

    model_type = "pruned_phi3"


class PrunedPhi3Mixin(PrunedModelMixin):
    """The parts of a pruned Phi-3 that differ from Llama's."""

    config_class: Any = PrunedPhi3Config
    attention_names = LinearNames("self_attn", ("qkv_proj",), "o_proj")
    mlp_names = LinearNames("mlp", ("gate_up_proj",), "down_proj")

    def resize_attention(self, attention: Any, config: Any, index: int) -> None:
        """Set the number of heads of a layer's attention, which its forward reads from the config."""
        super().resize_attention(attention, config, index)
        attention.config = LayerConfig(config, config.num_attention_heads_per_layer[index])


class PrunedPhi3Model(PrunedPhi3Mixin, Phi3Model):
    """A pruned Phi-3, without the head."""


class PrunedPhi3ForCausalLM(PrunedPhi3Mixin, Phi3ForCausalLM):
    """A pruned Phi-3."""


class LayerConfig:
    """The model's config with one layer's number of heads."""

    def __init__(self, config: Any, num_attention_heads: int) -> None:
        self.config = config
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        # While copied, the object has no config yet, and is asked for special methods.
        if name == "config" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.config, name)
