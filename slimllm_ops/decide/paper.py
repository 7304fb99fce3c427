"""Decides as the published `slimllm` method does: which units of a module stay, and the line that recovers its output.

Both decisions run in the process that merged the moments and holds the layer's weights.

Shapes: D hidden size, P inputs of an output projection.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from slimllm_ops.decide.channels import ChannelChoice, choose_channels, drop_lowest
from slimllm_ops.decide.experts import join_lines
from slimllm_ops.decide.heads import choose_heads
from slimllm_ops.decide.parts import fit_part
from slimllm_ops.decide.plan import Decision
from slimllm_ops.decide.recovery import fit_line
from slimllm_ops.models.families import Family, LayerShape
from slimllm_ops.moments.observation import Observed, Part


class LayerSource(Protocol):
    """A model whose layers a decision can read."""

    @property
    def family(self) -> Family:
        """The model's family."""

    def shape(self, layer: int) -> LayerShape:
        """Return the shape of a layer's branches."""

    def weights(self, layer: int) -> dict[str, Tensor]:
        """Return a layer's tensors by their names in it, on the device to compute on."""


@torch.inference_mode()
def decide_heads(source: LayerSource, observed: Observed, layer: int, *, num_removed: int) -> Decision:
    """Choose the KV groups that stay in an attention module, and the line that recovers its output.

    Args:
        source: The model.
        observed: The merged observation of the layer's attention.
        layer: The number of the layer.
        num_removed: Number of KV groups to remove.
    """
    (part,) = observed.parts(source.weights(layer)[source.family.attention.output_weight])
    assert part.projection is not None, "every token passes an attention"
    num_units = source.shape(layer).num_attention_units
    choice = choose_heads(part.projection, num_units=num_units, num_removed=num_removed)
    # What is prunable has a high similarity without it. Plans say the importance of every unit, whatever its kind.
    importance_H = (1 - choice.scores_H.double() / len(part.weight_DP)).clamp(min=0)
    return fit_part(part, choice.kept, tuple(importance_H.tolist()), fit_line).decision(observed)


@torch.inference_mode()
def decide_channels(
    source: LayerSource, observed: Observed, layer: int, *, num_removed: int, keep_lowest: float
) -> Decision:
    """Choose the channels that stay in an MLP, or in each of its experts, and the line that recovers its output.

    Args:
        source: The model.
        observed: The merged observation of the layer's MLP.
        layer: The number of the layer.
        num_removed: Number of channels to remove, from each expert if there are several.
        keep_lowest: Fraction of the channels, those with the lowest scores, that are kept.
    """
    weights, branch = source.weights(layer), source.family.mlp
    # Each part's input weights, split from the tensors that hold those of all parts.
    inputs = zip(*(observed.split(weights[name]) for name in branch.input_weights), strict=True)
    fits = []
    for part, stored in zip(observed.parts(weights[branch.output_weight]), inputs, strict=True):
        inputs_PD = [one for rows in stored for one in branch.unstack(rows, part.weight_DP.shape[1])]
        choice = _choose_channels(part, inputs_PD, num_removed, keep_lowest)
        fits.append(fit_part(part, choice.kept, tuple(choice.scores_P.tolist()), fit_line))
    return observed.joined(fits, join_lines).decision(observed)


def _choose_channels(
    part: Part, input_weights_PD: Sequence[Tensor], num_removed: int, keep_lowest: float
) -> ChannelChoice:
    """Choose a part's channels; a part without tokens is scored by the norms of its weights."""
    if part.projection is None or part.observation is None:
        norms_P = [weight_PD.float().norm(dim=1) for weight_PD in input_weights_PD]
        scores_P = sum(norms_P, start=part.weight_DP.float().norm(dim=0))
        return ChannelChoice(drop_lowest(scores_P, num_removed, keep_lowest), scores_P)
    return choose_channels(
        part.projection,
        input_norm_D=part.observation.input_squares_D.sqrt(),
        input_weights_PD=input_weights_PD,
        num_removed=num_removed,
        keep_lowest=keep_lowest,
    )
