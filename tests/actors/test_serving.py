"""A server returns the weights that are on disk, and its clients open no file."""

from pathlib import Path
from typing import NoReturn

import pytest
import torch

import slimllm_ops.checkpoint.reading
from actors.serving import weight_server
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.models.families import family_named
from tests.tiny import save_tiny


@pytest.mark.usefixtures("local_ray")
def test_a_served_weight_is_read_by_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a mixture, whose experts are merged where they arrive.
    checkpoint = Checkpoint.open(save_tiny(family_named("mixtral"), tmp_path))
    names = [branch.output_weight for branch in (checkpoint.family.attention, checkpoint.family.mlp)]
    expected = [checkpoint.read_weight(1, name) for name in names]

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("this process read a file itself")

    monkeypatch.setattr(slimllm_ops.checkpoint.reading, "read_tensors", refuse)
    with weight_server() as deliver:
        served = deliver(checkpoint)
        weights = [served.stored_weight(1, name).read() for name in names]
        assert torch.equal(served.read_weight(1, names[0]), expected[0])
    assert all(torch.equal(weight, one) for weight, one in zip(weights, expected, strict=True))
