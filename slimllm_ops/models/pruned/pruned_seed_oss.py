"""Pruned Seed-OSS models (`pruned_layers.py`)."""

from transformers import SeedOssConfig, SeedOssForCausalLM, SeedOssModel

from .pruned_layers import PrunedConfigMixin, PrunedModelMixin


class PrunedSeedOssConfig(PrunedConfigMixin, SeedOssConfig):
    """Config of a pruned Seed-OSS."""

    model_type = "pruned_seed_oss"


class PrunedSeedOssModel(PrunedModelMixin, SeedOssModel):
    """A pruned Seed-OSS, without the head."""

    config_class = PrunedSeedOssConfig


class PrunedSeedOssForCausalLM(PrunedModelMixin, SeedOssForCausalLM):
    """A pruned Seed-OSS."""

    config_class = PrunedSeedOssConfig
