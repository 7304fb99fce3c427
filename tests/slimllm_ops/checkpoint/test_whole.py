"""Whole models: their sizes, and one clear line for what transformers cannot read as a causal language model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slimllm_ops.checkpoint.whole import inspect_whole, read_whole, read_whole_config
from slimllm_ops.errors import CheckpointError


def test_sizes_are_those_of_the_model(gqa_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gqa_model)
    whole = inspect_whole(gqa_model)
    assert whole.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (whole.vocab_size, whole.hidden_size) == (model.config.vocab_size, model.config.hidden_size)
    assert whole.max_length == model.config.max_position_embeddings


def test_weights_are_read_in_the_dtype_asked_for(gqa_model: Path) -> None:
    model = read_whole(gqa_model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, r"has no config\.json: it is not a Hugging Face model directory"),
        (
            '{"model_type": "t5"}',
            r"of type 't5', which transformers does not know as a causal language model: pass one",
        ),
        ('{"model_type": "nonesuch"}', r"its config\.json is wrong: .*nonesuch"),
        ('{"model_type": "llama", "hidden_size": -1}', r"its config\.json is wrong: hidden_size is -1"),
    ],
)
def test_what_is_no_causal_model_is_refused(config: str | None, said: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=said):
        read_whole_config(tmp_path)
