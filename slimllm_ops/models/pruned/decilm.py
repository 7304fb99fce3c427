"""DeciLM models (also called Nemotron-NAS) whose layers are a Llama's, as `slimllm export --to deci` writes them.

vLLM, SGLang and TensorRT-LLM have classes of their own for them, and need the config only. Transformers has none, and
uses these. All layers have the same heads; the MLP of each has its own width, given by `block_configs`.
"""

from typing import Any

from transformers import LlamaForCausalLM, LlamaModel

from .pruned_layers import PrunedModelMixin
from .pruned_llama import PrunedLlamaConfig

# Servers round a width up to a whole number of these.
WHOLE_CHANNELS = 256


class Block(dict[str, Any]):
    """The settings of a part of a layer, read as attributes, and written as JSON."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def block_config(num_attention_heads: int, num_key_value_heads: int, channels: int, hidden_size: int) -> dict[str, Any]:
    """Describe a layer; the width of its MLP is `2 / 3 * ffn_mult * hidden_size`, rounded up (`WHOLE_CHANNELS`)."""
    attention = {"no_op": False, "n_heads_in_group": num_attention_heads // num_key_value_heads}
    return {"attention": attention, "ffn": {"no_op": False, "ffn_mult": 3 * channels / (2 * hidden_size)}}


def channels_of(block: dict[str, Any], hidden_size: int) -> int:
    """Return the width of a layer's MLP, as servers compute it."""
    channels = int(2 * block["ffn"]["ffn_mult"] * hidden_size / 3)
    return -(-channels // WHOLE_CHANNELS) * WHOLE_CHANNELS


class DeciLMConfig(PrunedLlamaConfig):
    """Config of a DeciLM."""

    model_type = "nemotron-nas"

    def __post_init__(self: Any, **settings: Any) -> None:
        described = settings.pop("block_configs", None) or []
        blocks = [Block({name: Block(part) for name, part in block.items()}) for block in described]
        self.block_configs = blocks
        if blocks:
            heads = self.num_attention_heads
            settings |= {
                "num_attention_heads_per_layer": [heads] * len(blocks),
                "num_key_value_heads_per_layer": [heads // one.attention.n_heads_in_group for one in blocks],
                "intermediate_size_per_layer": [channels_of(one, self.hidden_size) for one in blocks],
                "attention_output_bias_per_layer": [False] * len(blocks),
                "mlp_output_bias_per_layer": [False] * len(blocks),
            }
        super().__post_init__(**settings)

    def validate_architecture(self) -> None:
        """Accept any number of heads: their width is `head_dim`, so they need not divide the hidden size."""


class DeciLMModel(PrunedModelMixin, LlamaModel):
    """A DeciLM, without the head."""

    config_class = DeciLMConfig


class DeciLMForCausalLM(PrunedModelMixin, LlamaForCausalLM):
    """A DeciLM."""

    config_class = DeciLMConfig
