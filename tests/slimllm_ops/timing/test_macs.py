"""Multiply-accumulates of empty models equal sums over their layers, and what torch counts with the weights."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from slimllm_ops.checkpoint.whole import read_whole_config
from slimllm_ops.models.families import family_named, head_dim
from slimllm_ops.timing.macs import Macs, count_macs, count_parameters, empty_model
from tests.slimllm_ops.pruned import write_uneven
from tests.tiny import save_tiny

HIDDEN, VOCABULARY, HEAD_WIDTH, LENGTH = 32, 97, 8, 16


def macs_of(directory: Path) -> Macs:
    return count_macs(empty_model(read_whole_config(directory)))


def by_hand(heads: list[int], kv_heads: list[int], channels: list[int]) -> Macs:
    """Sum q, k, v, o and gate, up, down over the layers, and a score and a value for each pair and head."""
    per_token = sum(
        HIDDEN * HEAD_WIDTH * (2 * query + 2 * kv) + 3 * HIDDEN * inner
        for query, kv, inner in zip(heads, kv_heads, channels, strict=True)
    )
    return Macs(per_token, 2 * HEAD_WIDTH * sum(heads), HIDDEN * VOCABULARY)


def test_a_dense_model_counts_as_by_hand(gqa_model: Path) -> None:
    assert macs_of(gqa_model) == by_hand([4] * 3, [2] * 3, [48] * 3)


def test_a_pruned_model_counts_each_layer_s_heads_and_channels(tmp_path: Path) -> None:
    pruned = write_uneven(family_named("llama"), tmp_path)
    config = read_whole_config(pruned)
    sizes = ("num_attention_heads_per_layer", "num_key_value_heads_per_layer", "intermediate_size_per_layer")
    heads, kv_heads, channels = (list(getattr(config, name)) for name in sizes)
    assert len(set(channels)) > 1
    assert macs_of(pruned) == by_hand(heads, kv_heads, channels)


def test_a_tied_head_counts_as_work_and_not_as_parameters(make_llama: Callable[..., Path], mha_model: Path) -> None:
    tied = make_llama(tie_word_embeddings=True)
    assert macs_of(tied) == macs_of(mha_model)
    both = [count_parameters(empty_model(read_whole_config(one))) for one in (mha_model, tied)]
    assert both[0] - both[1] == HIDDEN * VOCABULARY


def test_a_prompt_counts_what_torch_counts_but_for_pairs_with_later_tokens(gqa_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gqa_model, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, LENGTH, dtype=torch.long), logits_to_keep=1)
    macs = macs_of(gqa_model)
    later = LENGTH * (LENGTH - 1) // 2 * macs.per_pair
    assert macs.of_prompt(LENGTH) + later == counter.get_total_flops() // 2


def test_a_mixture_counts_the_experts_that_a_token_goes_to(tmp_path: Path) -> None:
    save_tiny(family_named("mixtral"), tmp_path)
    config = read_whole_config(tmp_path)
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = 2 * hidden * head_dim(config) * (config.num_attention_heads + config.num_key_value_heads)
    experts = 3 * hidden * inner * config.num_experts_per_tok + hidden * config.num_local_experts
    assert macs_of(tmp_path).per_token == config.num_hidden_layers * (attention + experts)
