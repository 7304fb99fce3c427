"""Pruned Nemotron models (`pruned_layers.py`)."""

from typing import Any

from transformers import NemotronConfig, NemotronForCausalLM, NemotronModel

from .pruned_layers import LinearNames, PrunedConfigMixin, PrunedModelMixin


class PrunedNemotronConfig(PrunedConfigMixin, NemotronConfig):
    """Config of a pruned Nemotron."""

    model_type = "pruned_nemotron"


class PrunedNemotronMixin(PrunedModelMixin):
    """The parts of a pruned Nemotron that differ from Llama's."""

    config_class: Any = PrunedNemotronConfig
    mlp_names = LinearNames("mlp", ("up_proj",), "down_proj")


class PrunedNemotronModel(PrunedNemotronMixin, NemotronModel):
    """A pruned Nemotron, without the head."""


class PrunedNemotronForCausalLM(PrunedNemotronMixin, NemotronForCausalLM):
    """A pruned Nemotron."""
