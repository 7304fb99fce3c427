"""Decides as the published `slimllm` method does: which units of a module stay, and the line that recovers its output.

Attention, and each expert of a mixture, is decided at once, from the moments of its output projection's input. An MLP
takes two steps, without those moments: `choose_channels_by_output` chooses its channels, and once the shards have
compared the chosen channels' output with the full one, `recover_output` fits the line. A mixture keeps the moments:
most have experts narrower than the hidden states, so moments of their outputs would be larger.

All but `recover_output` run in the process that merged the moments and holds the layer's weights.

Shapes: D hidden size, P inputs of an output projection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slimllm_ops.decide.channels import ChannelChoice, ChannelStatistics, choose_channels, drop_lowest
from slimllm_ops.decide.experts import join_lines
from slimllm_ops.decide.heads import choose_heads
from slimllm_ops.decide.parts import fit_part
from slimllm_ops.decide.plan import Decision
from slimllm_ops.decide.recovery import fit_line, fit_line_to_outputs
from slimllm_ops.models.families import Family, LayerShape
from slimllm_ops.moments.observation import Observed, Part
from slimllm_ops.moments.outputs import OutputObservation, OutputPairs


class LayerSource(Protocol):
    """A model whose layers a decision can read."""

    @property
    def family(self) -> Family:
        """The model's family."""

    def shape(self, layer: int) -> LayerShape:
        """Return the shape of a layer's branches."""

    def weights(self, layer: int) -> dict[str, Tensor]:
        """Return a layer's tensors by their names in it, on the device to compute on."""


@dataclass(frozen=True)
class ChosenChannels:
    """The channels that stay in an MLP, before its output is recovered.

    Attributes:
        kept: The channels that stay, ascending.
        scores: The importance of every channel.
        power_D: The power of the kept channels in every output dim, sum_s E x_s^2 W_sj^2, in float64.
    """

    kept: tuple[int, ...]
    scores: tuple[float, ...]
    power_D: Tensor


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
def choose_channels_by_output(
    source: LayerSource, observed: OutputObservation, layer: int, *, num_removed: int, keep_lowest: float
) -> ChosenChannels:
    """Choose the channels that stay in an MLP.

    Args:
        source: The model.
        observed: The merged observation of the layer's MLP.
        layer: The number of the layer.
        num_removed: Number of channels to remove.
        keep_lowest: Fraction of the channels, those with the lowest scores, that are kept.
    """
    weights, branch = source.weights(layer), source.family.mlp
    weight_DP = weights[branch.output_weight]
    outputs = observed.output_moments(weight_DP.device)
    weight_PD = weight_DP.T.to(outputs.covariance_PP.dtype)
    squares_P, input_squares_D = (
        torch.from_numpy(squares.copy()).to(weight_PD) for squares in (observed.x_squares_P, observed.input_squares_D)
    )
    statistics = ChannelStatistics(
        weight_PD,
        squares_P.sqrt(),
        outputs.covariance_PP,
        input_squares_D.sqrt(),
        [one for name in branch.input_weights for one in branch.unstack(weights[name], weight_DP.shape[1])],
    )
    choice = choose_channels(statistics, num_removed=num_removed, keep_lowest=keep_lowest)
    kept_S = torch.tensor(choice.kept, device=weight_DP.device)
    power_D = weight_PD[kept_S].square().T @ (squares_P[kept_S] / outputs.count)
    return ChosenChannels(choice.kept, tuple(choice.scores_P.tolist()), power_D.double().cpu())


def recover_output(pairs: OutputPairs, chosen: ChosenChannels) -> Decision:
    """Fit the line that recovers an MLP's output.

    Args:
        pairs: The merged sums over the outputs of the chosen channels and of all channels.
        chosen: The channels that stay.
    """
    line = fit_line_to_outputs(pairs, chosen.power_D)
    return Decision(chosen.kept, chosen.scores, line, line.relative_error, pairs.intercept)


@torch.inference_mode()
def decide_experts(
    source: LayerSource, observed: Observed, layer: int, *, num_removed: int, keep_lowest: float
) -> Decision:
    """Choose the channels that stay in each expert of an MLP, and the lines that recover their outputs.

    Args:
        source: The model.
        observed: The merged observation of the layer's experts.
        layer: The number of the layer.
        num_removed: Number of channels to remove from each expert.
        keep_lowest: Fraction of the channels, those with the lowest scores, that are kept.
    """
    weights, branch = source.weights(layer), source.family.mlp
    # Each expert's input weights, split from the tensors that hold those of all experts.
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
    """Choose an expert's channels; one without tokens is scored by the norms of its weights."""
    if part.projection is None or part.observation is None:
        norms_P = [weight_PD.float().norm(dim=1) for weight_PD in input_weights_PD]
        scores_P = sum(norms_P, start=part.weight_DP.float().norm(dim=0))
        return ChannelChoice(drop_lowest(scores_P, num_removed, keep_lowest), scores_P)
    statistics = ChannelStatistics(
        part.projection.weight_PD,
        part.projection.moments.norm_P,
        part.projection.output_covariance_DD,
        part.observation.input_squares_D.sqrt(),
        input_weights_PD,
    )
    return choose_channels(statistics, num_removed=num_removed, keep_lowest=keep_lowest)
