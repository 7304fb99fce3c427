"""Pruned Hunyuan models (`pruned_layers.py`)."""

from transformers import HunYuanDenseV1Config, HunYuanDenseV1ForCausalLM, HunYuanDenseV1Model

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedHunYuanDenseV1Config(PrunedConfigMixin, HunYuanDenseV1Config):
    """Config of a pruned Hunyuan."""

    model_type = "pruned_hunyuan_v1_dense"


class PrunedHunYuanDenseV1Model(PrunedModelMixin, HunYuanDenseV1Model):
    """A pruned Hunyuan, without the head."""

    config_class = PrunedHunYuanDenseV1Config


class PrunedHunYuanDenseV1ForCausalLM(PrunedModelMixin, HunYuanDenseV1ForCausalLM):
    """A pruned Hunyuan."""

    config_class = PrunedHunYuanDenseV1Config
