"""The table of families names what transformers has, and tells what it does not know."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from slimllm_ops.errors import CheckpointError
from slimllm_ops.families import FAMILIES, Family, LayerShape, family_of, layer_shape
from slimllm_ops.pruned_model import PRUNED_MODELS


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_name_of_a_row_is_one_of_the_familys_model(family: Family) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 11}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **sizes, **heads))
    model.get_submodule(family.final_norm)
    tensors = dict(model.get_submodule(f"{family.layers}.0").named_parameters())
    branches = (family.attention, family.mlp)
    named = {name for branch in branches for name in (*branch.input_weights, branch.output_weight)}
    norms = {f"{branch.norm}.weight" for branch in branches}
    assert named | norms <= set(tensors)
    # Whatever else a layer holds must not depend on how many units it has.
    assert not {name for name in set(tensors) - named if len(tensors[name].shape) > 1}
    for branch in branches:
        assert branch.output_bias == branch.output_weight.replace(".weight", ".bias")


def test_every_family_has_its_pruned_model() -> None:
    assert [model.__name__ for _, model in PRUNED_MODELS] == [f"Pruned{family.name}ForCausalLM" for family in FAMILIES]
    assert [config.model_type for config, _ in PRUNED_MODELS] == [f"pruned_{family.model_type}" for family in FAMILIES]


def test_dense_and_pruned_models_are_of_one_family() -> None:
    dense = LlamaConfig()
    pruned = next(config for config, _ in PRUNED_MODELS if config.model_type == "pruned_llama")()
    assert family_of(dense) is family_of(pruned)
    assert family_of(dense).name == "Llama"


def test_an_unknown_family_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"'gpt2' are not supported; supported: .*llama"):
        family_of(GPT2Config())


def test_a_layers_shape_is_the_models_or_its_own() -> None:
    numbers = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 100}
    assert layer_shape(LlamaConfig(**numbers), 1) == LayerShape(8, 4, 100)
    config_class = next(config for config, _ in PRUNED_MODELS if config.model_type == "pruned_llama")
    pruned = config_class(
        **numbers,
        num_attention_heads_per_layer=[8, 4],
        num_key_value_heads_per_layer=[4, 2],
        intermediate_size_per_layer=[100, 70],
    )
    assert layer_shape(pruned, 0) == LayerShape(8, 4, 100)
    assert layer_shape(pruned, 1) == LayerShape(4, 2, 70)
