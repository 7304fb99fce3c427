"""Streams through small models of every family and build."""

from pathlib import Path

import pytest
import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.stream.passes import LayerStream


@pytest.fixture(scope="module")
def batches(ids: torch.Tensor) -> list[torch.Tensor]:
    """Batches of unequal size, as the last one of a shard is."""
    return [ids[:3], ids[3:5]]


@pytest.fixture
def stream(model_dir: Path, batches: list[torch.Tensor]) -> LayerStream:
    return LayerStream(Checkpoint.open(model_dir), batches, torch.device("cpu"))
