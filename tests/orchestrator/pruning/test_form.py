"""Whole runs with a requested form: equal layers, channels in multiples, no new biases."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from orchestrator.config import ConfigError, PruneConfig
from orchestrator.inputs import load_inputs
from orchestrator.pipeline import PruneResult
from slimllm_ops.errors import InputError
from slimllm_ops.models.families import family_named
from tests.orchestrator.conftest import PruneModel
from tests.tiny import save_tiny

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


@pytest.fixture(scope="module")
def wide_model(make_llama: Callable[..., Path]) -> Path:
    """A model with four key/value heads, each shared by two heads."""
    return make_llama(num_attention_heads=8, num_key_value_heads=4)


@pytest.mark.parametrize("method", METHODS)
def test_heads_key_value_heads_and_channels_divide_for_tensor_parallelism(
    method: str, prune_model: PruneModel, wide_model: Path
) -> None:
    config = config_of(prune_model(wide_model, for_tp=2, multiple_of=3, sparsity=0.4, **METHODS[method]))
    kv_heads = config.num_key_value_heads_per_layer
    assert config.num_attention_heads_per_layer == [2 * number for number in kv_heads]
    assert set(kv_heads) == {2, 4}
    assert not any(channels % 6 for channels in config.intermediate_size_per_layer)


@pytest.mark.parametrize("method", METHODS)
def test_heads_are_alike_and_channels_are_free(method: str, prune_model: PruneModel, wide_model: Path) -> None:
    run = prune_model(wide_model, uniform_heads=True, sparsity=0.7, **METHODS[method])
    config = config_of(run)
    (kv_heads,) = set(config.num_key_value_heads_per_layer)
    assert kv_heads < 4
    assert len(set(config.intermediate_size_per_layer)) > 1
    assert 0.7 - 3 * 32 / run.totals.layer_parameters_before < run.totals.sparsity <= 0.7


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"heads_multiple_of": 8},
            r"layer 0 has 4 KV heads, which is not a multiple of 8: pass --heads-multiple-of or",
        ),
        ({"for_tp": 3}, r"layer 0 has 4 KV heads, which is not a multiple of 3: .* or --for-tp with a divisor"),
        (
            {"for_tp": 4, "multiple_of": 9},
            r"layer 0 has 48 channels, which is not a multiple of 36: .* --for-tp with a",
        ),
    ],
)
def test_heads_that_make_no_whole_steps_are_refused(
    settings: dict[str, Any], said: str, prune_model: PruneModel, wide_model: Path
) -> None:
    with pytest.raises(InputError, match=said):
        prune_model(wide_model, calibration="missing.txt", **settings)


def test_a_run_says_that_no_head_can_go(wide_model: Path, token_file: Path) -> None:
    said: list[str] = []
    config = PruneConfig(model=str(wide_model), calibration=str(token_file), for_tp=4, sparsity=0.2)
    load_inputs(config, said.append)
    assert said == ["no KV heads can go: a layer has 4, they go 4 at a time, and not all of them may go"]
    said.clear()
    load_inputs(replace(config, for_tp=2), said.append)
    assert not said
    load_inputs(replace(config, for_tp=1, max_layer_sparsity=0.24, sparsity=0.1), said.append)
    assert said == ["no KV heads can go: a layer has 4, they go 1 at a time, and at most 0.24 of them may go"]


def test_a_whole_attention_divides_by_its_heads(prune_model: PruneModel, tmp_path: Path) -> None:
    source = save_tiny(family_named("olmo2"), tmp_path / "source")
    config = config_of(prune_model(source, sparsity=0.2, for_tp=2))
    assert config.num_key_value_heads_per_layer == [2, 2, 2]
    assert not any(channels % 2 for channels in config.intermediate_size_per_layer)
    with pytest.raises(InputError, match="layer 0 has 2 KV heads, which is not a multiple of 4"):
        prune_model(source, for_tp=4)


def test_what_was_pruned_unevenly_cannot_have_as_many_heads_in_every_layer(
    prune_model: PruneModel, wide_model: Path
) -> None:
    uneven = prune_model(wide_model, sparsity=0.4, for_tp=2).output
    with pytest.raises(InputError, match=r"have different numbers of heads: --uniform-heads needs a model whose"):
        prune_model(uneven, uniform_heads=True)
    assert not any(number % 2 for number in config_of(prune_model(uneven, for_tp=2)).num_key_value_heads_per_layer)


@pytest.mark.parametrize("setting", [{"alpha": 3.0}, {"pruned_layers": 2}])
def test_what_makes_layers_differ_contradicts_uniform(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"makes layers differ, and uniform makes them equal: give one of them"):
        PruneConfig(uniform=True, **setting)
