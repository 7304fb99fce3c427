"""What we expect of what transformers does not document, with the transformers that is installed."""

import importlib

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from slimllm_ops.models.transformers_private import CONFIG_TABLE, llama_rotary, no_init_weights


def test_nothing_is_initialised_inside_and_everything_after() -> None:
    with no_init_weights():
        inside = torch.nn.init.normal_(torch.zeros(3))
    assert inside is None or not inside.any()
    assert torch.nn.init.normal_(torch.zeros(3)).any()


def test_the_table_of_configs_is_imported_with_the_auto_class() -> None:
    assert importlib.import_module(CONFIG_TABLE).AutoConfig is AutoConfig


@pytest.mark.parametrize(("base", "width"), [(10_000.0, 8), (500_000.0, 64)])
def test_rotary_frequencies_are_those_of_the_paper(base: float, width: int) -> None:
    config = LlamaConfig(
        hidden_size=4 * width, num_attention_heads=4, rope_parameters={"rope_theta": base, "rope_type": "default"}
    )
    rotary = llama_rotary(config)
    expected = [base ** (-2 * pair / width) for pair in range(width // 2)]
    torch.testing.assert_close(rotary.inv_freq, torch.tensor(expected))
    assert rotary.attention_scaling == 1.0
