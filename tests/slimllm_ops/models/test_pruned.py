"""Pruned models behave like any transformers model: shapes per layer, smaller caches, saving and loading."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from slimllm_ops.models.pruned.pruned_llama import PrunedLlamaConfig, PrunedLlamaForCausalLM
from slimllm_ops.models.pruned.pruned_mixtral import PrunedMixtralConfig, PrunedMixtralForCausalLM

DENSE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.15,
}
PER_LAYER = {
    "num_attention_heads_per_layer": [4, 6],
    "num_key_value_heads_per_layer": [2, 3],
    "intermediate_size_per_layer": [7, 48],
    "attention_output_bias_per_layer": [True, False],
    "mlp_output_bias_per_layer": [False, True],
}


@pytest.fixture
def model() -> PrunedLlamaForCausalLM:
    torch.manual_seed(0)
    return PrunedLlamaForCausalLM(PrunedLlamaConfig(**DENSE, **PER_LAYER)).eval()


def test_every_layer_has_its_own_shape(model: PrunedLlamaForCausalLM) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.model.layers[0].named_parameters()}
    assert shapes == {
        "self_attn.q_proj.weight": (16, 32),
        "self_attn.k_proj.weight": (8, 32),
        "self_attn.v_proj.weight": (8, 32),
        "self_attn.o_proj.weight": (32, 16),
        "self_attn.o_proj.bias": (32,),
        "mlp.gate_proj.weight": (7, 32),
        "mlp.up_proj.weight": (7, 32),
        "mlp.down_proj.weight": (32, 7),
        "input_layernorm.weight": (32,),
        "post_attention_layernorm.weight": (32,),
    }
    assert model.model.layers[1].self_attn.q_proj.weight.shape == (24, 32)
    assert model.model.layers[1].self_attn.o_proj.bias is None
    assert model.model.layers[1].mlp.down_proj.bias is not None


def test_without_numbers_of_its_own_it_is_the_dense_model() -> None:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**DENSE))
    torch.manual_seed(0)
    same = PrunedLlamaForCausalLM(PrunedLlamaConfig(**DENSE))
    assert {name: tuple(tensor.shape) for name, tensor in dense.named_parameters()} == {
        name: tuple(tensor.shape) for name, tensor in same.named_parameters()
    }


def test_the_auto_classes_know_it(model: PrunedLlamaForCausalLM, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is PrunedLlamaConfig
    assert type(AutoModelForCausalLM.from_config(model.config)) is PrunedLlamaForCausalLM


@torch.inference_mode()
def test_saving_and_loading_gives_the_same_model(
    model: PrunedLlamaForCausalLM, tmp_path: Path, ids: torch.Tensor
) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {path.name for path in tmp_path.glob("*.py")} == {"pruned_layers.py", "pruned_llama.py"}
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.inference_mode()
def test_the_cache_holds_what_is_left_and_generates_the_same(model: PrunedLlamaForCausalLM, ids: torch.Tensor) -> None:
    cached = model(ids, use_cache=True)
    kept = [cached.past_key_values.layers[layer].keys.shape[1] for layer in range(2)]
    assert kept == [2, 3]
    step = model(ids[:, :1], past_key_values=cached.past_key_values).logits
    whole = model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.inference_mode()
def test_it_runs_with_every_attention(model: PrunedLlamaForCausalLM, ids: torch.Tensor, implementation: str) -> None:
    expected = model(ids).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


MIXTURE = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "attention_output_bias_per_layer": [True, False],
    "mlp_output_bias_per_layer": [False, False],
    "num_attention_heads_per_layer": [4, 6],
    "num_key_value_heads_per_layer": [2, 3],
}


@pytest.mark.parametrize(("channels", "implementation"), [([7, 48], "eager"), ([8, 48], "grouped_mm")])
@torch.inference_mode()
def test_experts_of_any_number_of_channels_compute(
    channels: list[int], implementation: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    """What transformers computes experts by, unless it is told otherwise, takes multiples of 8 alone."""
    torch.manual_seed(0)
    config = PrunedMixtralConfig(**DENSE, **MIXTURE, intermediate_size_per_layer=channels)
    made = PrunedMixtralForCausalLM(config).eval()
    assert tuple(made.model.layers[0].mlp.experts.gate_up_proj.shape) == (4, 2 * channels[0], 32)
    assert tuple(made.model.layers[0].mlp.experts.down_proj.shape) == (4, 32, channels[0])
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._experts_implementation == implementation
    expected = loaded(ids).logits
    assert torch.equal(made(ids).logits, expected)
    for other in ("eager", "batched_mm"):
        loaded.set_experts_implementation(other)
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_it_can_be_trained(model: PrunedLlamaForCausalLM, ids: torch.Tensor) -> None:
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
