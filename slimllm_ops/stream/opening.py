"""Opening streams: the two kinds that shards hold, each from the place where it computes and its token ids."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.moments.states import StateStore
from slimllm_ops.stream.passes import LayerStream
from slimllm_ops.stream.refinement import RefinementStream


@dataclass(frozen=True)
class Workplace:
    """Where a stream computes, and what holds its states."""

    device: torch.device
    store: StateStore = list


def open_stream(
    place: Workplace, ids: list[Tensor], checkpoint: Checkpoint, measures_change: bool, intercept: bool
) -> LayerStream:
    """Embed batches of token ids as the input of a model's first layer.

    Args:
        place: Where the layers run.
        ids: Token ids, each (b, T), int64.
        checkpoint: The model.
        measures_change: Whether to hold what enters a layer, to measure what the layer changes.
        intercept: Whether fits to its moments have an intercept.
    """
    return LayerStream(checkpoint, ids, place.device, place.store, measures_change=measures_change, intercept=intercept)


def open_refinement(
    place: Workplace, ids: list[Tensor], dense: Checkpoint, pruned: Checkpoint, origins: tuple[int, ...]
) -> RefinementStream:
    """Embed batches of token ids in the dense and in the pruned model, side by side.

    Args:
        place: Where the layers run.
        ids: Token ids, each (b, T), int64.
        dense: The dense model.
        pruned: The pruned model.
        origins: The dense layer that each pruned layer comes from.
    """
    of_dense, of_pruned = (LayerStream(model, ids, place.device, place.store) for model in (dense, pruned))
    return RefinementStream(of_dense, of_pruned, origins)
