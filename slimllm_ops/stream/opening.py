"""Opens the kinds of streams that shards hold, from token ids and the place where they run."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.moments.states import StateStore
from slimllm_ops.stream.generation import GenerationStream
from slimllm_ops.stream.outputs import LayerwiseStream
from slimllm_ops.stream.paired import PairedStream
from slimllm_ops.stream.passes import LayerStream
from slimllm_ops.stream.sensitivity import SensitivityStream

Paired = TypeVar("Paired", bound=PairedStream)


@dataclass(frozen=True)
class Workplace:
    """The device that a stream runs on, the kind of store that holds its states, and one that is not in memory."""

    device: torch.device
    store: StateStore
    spill: StateStore


def open_stream(place: Workplace, ids: list[Tensor], checkpoint: Checkpoint, measures_change: bool) -> LayerStream:
    """Embed batches of token ids as the input of a model's first layer.

    Args:
        place: Where the layers run, and what holds the states.
        ids: Token ids, each (b, T), int64.
        checkpoint: The model.
        measures_change: Whether to keep the states that enter a layer, to measure what the layer changes.
    """
    return LayerStream(checkpoint, ids, place.device, place.store, measures_change=measures_change)


def open_layerwise(place: Workplace, ids: list[Tensor], checkpoint: Checkpoint, intercept: bool) -> LayerwiseStream:
    """Embed batches of token ids as the input of a model's first layer, to prune one layer after the other.

    Args:
        place: Where the layers run, and what holds the states.
        ids: Token ids, each (b, T), int64.
        checkpoint: The model.
        intercept: Whether recovery may fit an intercept.
    """
    return LayerwiseStream(checkpoint, ids, place.device, place.store, intercept=intercept)


def open_pair(
    place: Workplace,
    ids: list[Tensor],
    dense: Checkpoint,
    pruned: Checkpoint,
    origins: tuple[int, ...],
    kind: type[Paired],
) -> Paired:
    """Embed batches of token ids in the dense and in the pruned model, as two streams that run side by side.

    Args:
        place: Where the layers run, and what holds the states.
        ids: Token ids, each (b, T), int64.
        dense: The dense model.
        pruned: The pruned model.
        origins: The dense layer that each pruned layer comes from.
        kind: The class of the pair, which says what it corrects.
    """
    of_dense, of_pruned = (LayerStream(model, ids, place.device, place.store) for model in (dense, pruned))
    return kind(of_dense, of_pruned, origins)


def open_sensitivity(place: Workplace, ids: list[Tensor], checkpoint: Checkpoint) -> SensitivityStream:
    """Embed batches of token ids as the input of a model's first layer, to measure the layers' sensitivities.

    Args:
        place: Where the layers run, and what holds the states that enter each layer.
        ids: Token ids, each (b, T), int64.
        checkpoint: The model.
    """
    return SensitivityStream(checkpoint, ids, place.device, place.spill)


def open_generation(
    place: Workplace, rows: list[Tensor], checkpoint: Checkpoint, length: int, seed: int, keep_layers: bool
) -> GenerationStream:
    """Load a model that continues prompts.

    Args:
        place: Where the model runs.
        rows: Batches (b, 1 + P), int64: the number of each sequence, then its prompt.
        checkpoint: The model.
        length: The tokens of a sequence, prompt included.
        seed: The seed of the random numbers.
        keep_layers: Whether all layers stay in memory.
    """
    return GenerationStream(checkpoint, rows, place.device, length, seed, keep_layers)
