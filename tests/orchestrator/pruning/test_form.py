"""Whole runs with a requested form: equal layers, channels in multiples, no new biases."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from orchestrator.config import ConfigError, PruneConfig
from orchestrator.pipeline import PruneResult
from slimllm_ops.errors import InputError
from tests.orchestrator.conftest import PruneModel

METHODS: dict[str, dict[str, Any]] = {
    "slimllm": {"method": "slimllm"},
    "gram": {"method": "gram"},
    "refined": {"method": "gram", "refine": True},
}


def config_of(run: PruneResult) -> Any:
    return AutoModelForCausalLM.from_pretrained(run.output).config


@pytest.mark.parametrize("method", METHODS)
def test_a_form_is_met_by_every_method(method: str, prune_model: PruneModel, mha_model: Path) -> None:
    run = prune_model(mha_model, uniform=True, multiple_of=8, no_bias=True, **METHODS[method])
    config = config_of(run)
    assert len(set(config.num_attention_heads_per_layer)) == 1
    (channels,) = set(config.intermediate_size_per_layer)
    assert channels < 48
    assert not channels % 8
    assert not any(config.attention_output_bias_per_layer + config.mlp_output_bias_per_layer)
    # A step is 8 channels in each of three layers.
    step = 3 * 8 * 3 * 32 / run.totals.layer_parameters_before
    assert 0.33 - step < run.totals.sparsity <= 0.33


@pytest.mark.parametrize("method", ["slimllm", "gram"])
def test_channels_go_by_multiples_where_layers_differ(method: str, prune_model: PruneModel, mha_model: Path) -> None:
    config = config_of(prune_model(mha_model, multiple_of=16, method=method, sparsity=0.4))
    assert not any(channels % 16 for channels in config.intermediate_size_per_layer)
    assert min(config.intermediate_size_per_layer) < 48


def test_channels_that_make_no_whole_steps_are_refused(prune_model: PruneModel, mha_model: Path) -> None:
    with pytest.raises(InputError, match=r"layer 0 has 48 channels, which is not a multiple of 64: pass --multiple-of"):
        prune_model(mha_model, multiple_of=64)


@pytest.mark.parametrize("setting", [{"alpha": 3.0}, {"pruned_layers": 2}])
def test_what_makes_layers_differ_contradicts_uniform(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"makes layers differ, and uniform makes them equal: give one of them"):
        PruneConfig(uniform=True, **setting)
