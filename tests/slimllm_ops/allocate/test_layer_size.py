"""A layer is measured from the shapes of its tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest

from slimllm_ops.allocate.layer_size import measure_layer
from slimllm_ops.checkpoint.reading import Checkpoint


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "head_dim": 6},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=["mha", "gqa", "mqa", "biased"],
)
def test_a_layer_is_measured_from_the_shapes_of_its_tensors(
    make_llama: Callable[..., Path], settings: dict[str, object]
) -> None:
    heads, kv_heads = 4, settings.get("num_key_value_heads", 4)
    head_dim, biased = settings.get("head_dim", 8), "mlp_bias" in settings
    size = measure_layer(Checkpoint.open(make_llama(**settings)), 1)
    # Biases of the queries, keys and values, and of gate and up, go with their units; those of the outputs stay.
    assert size.num_units == kv_heads
    assert size.unit_parameters == head_dim * (heads // kv_heads * (2 * 32 + biased) + 2 * (32 + biased))
    assert size.num_channels == 48
    assert size.channel_parameters == 3 * 32 + 2 * biased
    assert size.attention_bias_parameters == size.mlp_bias_parameters == (0 if biased else 32)
    fixed = 2 * 32 + 2 * 32 * biased
    assert size.parameters == kv_heads * size.unit_parameters + 48 * size.channel_parameters + fixed
