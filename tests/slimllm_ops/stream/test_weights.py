"""One layer at a time has weights: they are read once and ahead of time, and freed afterwards."""

import threading
from collections import Counter

import pytest
import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.stream.passes import LayerStream

NUM_LAYERS = 3


def test_the_next_layer_is_read_while_this_one_is_at_work(stream: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = [threading.Event() for _ in range(NUM_LAYERS)], Checkpoint.read_layer

    def noted(self: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
        read[layer].set()
        return original(self, layer)

    monkeypatch.setattr(Checkpoint, "read_layer", noted)
    stream.forward(0)
    assert read[1].wait(timeout=10)
    assert not read[2].is_set()


def test_a_layer_is_read_once(stream: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[int] = Counter()
    original = Checkpoint.read_layer

    def counted(self: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
        read[layer] += 1
        return original(self, layer)

    monkeypatch.setattr(Checkpoint, "read_layer", counted)
    for layer in range(NUM_LAYERS):
        for branch in (stream.checkpoint.family.attention, stream.checkpoint.family.mlp):
            stream.observe(layer, branch)
            stream.weights(layer)
            stream.apply(layer, branch, None)
    assert read == {0: 1, 1: 1, 2: 1}


def test_only_the_layer_that_is_passed_has_weights(stream: LayerStream) -> None:
    def in_memory() -> set[str]:
        names = {name for name, parameter in stream._weights._model.named_parameters() if not parameter.is_meta}
        depth = layers.count(".") + 2
        return {".".join(name.split(".")[:depth]) for name in names}

    layers = stream.checkpoint.family.layers
    assert in_memory() == set()
    for layer in range(NUM_LAYERS):
        stream.forward(layer)
        assert in_memory() == {f"{layers}.{layer}"}
    stream.negative_log_likelihood()
    assert in_memory() == set()


def test_a_layers_weights_are_those_of_the_checkpoint(stream: LayerStream) -> None:
    stored = stream.checkpoint.read_layer(1)
    weights = stream.weights(1)
    assert set(weights) == set(stored)
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
