"""The config of a pruned model tells transformers and vLLM the sizes of each layer, and stays what it was on disk."""

import copy
import json
import logging
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slimllm_ops.models.families import FAMILIES, Family, family_named, layer_shape
from tests.slimllm_ops.pruned import write_uneven

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def config(tmp_path: Path) -> PretrainedConfig:
    return AutoConfig.from_pretrained(write_uneven(family_named("llama"), tmp_path))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_layer_has_its_sizes_and_the_models_head_width(family: Family, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_uneven(family, tmp_path))
    dense = AutoConfig.from_pretrained(tmp_path / "dense")
    head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    assert config.is_heterogeneous
    assert len(config.per_layer_config) == 3
    for layer, sizes in enumerate(config.per_layer_config):
        shape = layer_shape(config, layer)
        assert sizes.num_attention_heads == shape.num_attention_heads
        assert sizes.num_key_value_heads == shape.num_key_value_heads
        assert getattr(sizes, family.intermediate_size) == shape.intermediate_size
        assert sizes.head_dim == head_dim
    # The whole model's numbers stay the dense model's.
    assert config.num_attention_heads == dense.num_attention_heads
    assert getattr(config, family.intermediate_size) == getattr(dense, family.intermediate_size)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_saving_it_changes_no_byte(family: Family, tmp_path: Path) -> None:
    directory = write_uneven(family, tmp_path)
    first = AutoModelForCausalLM.from_pretrained(directory)
    first.save_pretrained(tmp_path / "once")
    AutoModelForCausalLM.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    once, twice = ((tmp_path / name / "config.json").read_bytes() for name in ("once", "twice"))
    assert once == twice
    assert "per_layer_config" not in json.loads(once)
    assert "per_layer_config" not in first.config.to_dict()


def test_loading_and_using_it_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write_uneven(family_named("llama"), tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for auto in (AutoModel, AutoModelForCausalLM):
            model = auto.from_pretrained(directory)
        model.generate(max_new_tokens=2, bos_token_id=1, eos_token_id=None)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_copies_have_it_too(config: PretrainedConfig) -> None:
    for one in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert [layer.num_attention_heads for layer in one.per_layer_config] == [2, 4, 4]
        assert one.num_attention_heads == 4


def test_transformers_keeps_what_differs_in_a_set_that_can_be_cleared() -> None:
    """What the pruned config relies on: without this, reading a number of the whole model would fail."""
    stock = LlamaConfig(**SIZES, num_hidden_layers=2)
    stock.per_layer_config = {0: {"num_attention_heads": 2, "head_dim": 8}}
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
        _ = stock.num_attention_heads
    stock.per_layer_attributes.clear()
    assert stock.num_attention_heads == 4
    assert stock.per_layer_config[0].num_attention_heads == 2


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type:
    """A stand-in for the class by which a vLLM says what it can do; the real one is in tests/serving."""
    sizes = type("ModelArchitectureConfig", (), {})
    module = ModuleType("vllm.config.model_arch")
    module.ModelArchitectureConfig = sizes  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.config"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.config.model_arch", module)
    # As vLLM's backend for transformers does.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", lambda *args, **kwargs: None)
    return sizes


def test_a_vllm_that_sizes_all_layers_alike_is_refused(vllm: type, config: PretrainedConfig) -> None:
    config._attn_implementation = "vllm"
    with pytest.raises(RuntimeError, match=r"needs vllm>=0\.28 and transformers>=5\.14"):
        AutoModel.from_config(config)
    vllm.from_layers = classmethod(lambda cls, layers: None)  # type: ignore[attr-defined]
    AutoModel.from_config(config)
    config.per_layer_config = None
    with pytest.raises(RuntimeError, match="prune with --uniform"):
        AutoModel.from_config(config)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_vllm_reads_the_channels_of_each_layers_experts(model_type: str, vllm: type, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_uneven(family_named(model_type), tmp_path))
    vllm.from_layers = classmethod(lambda cls, layers: None)  # type: ignore[attr-defined]
    config._attn_implementation = "vllm"
    # A server may build a model from the same config twice.
    for _ in range(2):
        base = AutoModel.from_config(config)
        assert config.moe_intermediate_size == config.intermediate_size_per_layer == [19, 33, 48]
    assert [layer.mlp.experts.down_proj.shape[-1] for layer in base.layers] == [19, 33, 48]
