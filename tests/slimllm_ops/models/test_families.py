"""The table of families matches transformers, and reports what it does not know."""

import pytest
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

from slimllm_ops.errors import CheckpointError
from slimllm_ops.models.families import FAMILIES, Family, LayerShape, family_of, layer_shape
from slimllm_ops.models.pruned.pruned_llama import PrunedLlamaConfig
from tests.tiny import tiny_config


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_name_of_a_row_is_one_of_the_familys_model(family: Family) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    tensors = dict(model.get_submodule(f"{family.layers}.0").named_parameters())
    branches = (family.attention, family.mlp)
    named = {name for branch in branches for name in (*branch.input_weights, branch.output_weight)}
    around = [(branch.reading.norm, branch.reading.output_norm) for branch in branches]
    norms = {f"{name}.weight" for names in around for name in names if name is not None}
    routers = {f"{branch.reading.experts.router}.weight" for branch in branches if branch.reading.experts}
    assert named | norms | routers <= set(tensors)
    # Whatever else a layer holds must not depend on how many units it has.
    assert not {name for name in set(tensors) - named - routers if len(tensors[name].shape) > 1}
    for branch in branches:
        assert branch.output_bias == branch.output_weight.removesuffix(".weight") + ".bias"


def test_dense_and_pruned_models_are_of_one_family() -> None:
    dense = LlamaConfig()
    assert family_of(dense) is family_of(PrunedLlamaConfig())
    assert family_of(dense).name == "Llama"


def test_an_unknown_family_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"'bloom' are not supported; supported: .*llama"):
        family_of(BloomConfig())


def test_a_layers_shape_is_the_models_or_its_own() -> None:
    numbers = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 100}
    assert layer_shape(LlamaConfig(**numbers), 1) == LayerShape(8, 4, 100, 4)
    pruned = PrunedLlamaConfig(
        **numbers,
        num_attention_heads_per_layer=[8, 4],
        num_key_value_heads_per_layer=[4, 2],
        intermediate_size_per_layer=[100, 70],
    )
    assert layer_shape(pruned, 0) == LayerShape(8, 4, 100, 4)
    assert layer_shape(pruned, 1) == LayerShape(4, 2, 70, 2)
