"""The pruned model that the clients use."""

from pathlib import Path

import pytest

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.models.families import layer_shape
from tests.slimllm_ops.naive import random_decision
from tests.slimllm_ops.pruned import write_pruned


@pytest.fixture(scope="module")
def directory(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model with its tokenizer, in which every layer keeps other numbers of heads and channels."""
    source = Checkpoint.open(shared / "models" / "stories260k-gqa")
    shape, hidden = layer_shape(source.config, 0), source.config.hidden_size
    plans = [
        LayerPlan(
            random_decision(layer, range(1 + layer % shape.num_key_value_heads), shape.num_attention_units, hidden),
            random_decision(layer, range(shape.num_channels - 5 * layer), shape.num_channels, hidden),
        )
        for layer in range(source.num_layers)
    ]
    return write_pruned(source, plans, tmp_path_factory.mktemp("clients"))
