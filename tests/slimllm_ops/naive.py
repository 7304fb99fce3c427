"""Computes the paper's equations over raw activations, slowly and literally, as a reference for the fast code.

Everything is float64 NumPy, and nothing here uses moments.

Shapes: N tokens, P inputs of an output projection, D hidden size, H units (heads, or KV groups with all their query
heads), S inputs kept.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.decide.recovery import Line
from slimllm_ops.models.families import LayerShape, family_of
from slimllm_ops.moments.moments import Moments
from slimllm_ops.moments.observation import ObservationSum, Observed, PackedObservation
from slimllm_ops.moments.projection import Projection
from slimllm_ops.moments.routing import PackedExperts


def random_activations(
    seed: int, tokens: int = 200, width: int = 24, hidden: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Return correlated inputs x (N, P) with means that dwarf some spreads, and a weight (P, D)."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * rng.uniform(0.2, 2.0, size=width)
    x_NP = rng.normal(size=(tokens, width)) @ mixing + rng.normal(size=width) * 5
    return x_NP, rng.normal(size=(width, hidden))


def projection_of(x_NP: np.ndarray, weight_PD: np.ndarray) -> Projection:
    """Return what the code under test knows of the same activations."""
    return Projection.of(Moments.of(torch.from_numpy(x_NP)), torch.from_numpy(weight_PD).T)


def exact_projection(x_NP: np.ndarray, weight_PD: np.ndarray) -> Projection:
    """Return the same with a scatter summed in float64; what observes activations multiplies in float32."""
    x, weight = torch.from_numpy(x_NP), torch.from_numpy(weight_PD)
    centred = x - x.mean(dim=0)
    return Projection(Moments(len(x), x.mean(dim=0), centred.T @ centred / len(x)), weight)


def unit_columns(unit: int, width: int) -> slice:
    """Return the inputs that belong to a unit, which lie side by side."""
    return slice(unit * width, (unit + 1) * width)


def unit_outputs(x_NP: np.ndarray, weight_PD: np.ndarray, num_units: int) -> np.ndarray:
    """Return what each unit alone adds to the output, (N, D, H)."""
    width = x_NP.shape[1] // num_units
    columns = [unit_columns(unit, width) for unit in range(num_units)]
    return np.stack([x_NP[:, part] @ weight_PD[part] for part in columns], axis=-1)


def unit_covariances(x_NP: np.ndarray, weight_PD: np.ndarray, num_units: int) -> np.ndarray:
    """Return the covariances (D, H, H) of the units' outputs, one output dim after the other."""
    outputs_NDH = unit_outputs(x_NP, weight_PD, num_units)
    return np.stack([np.cov(outputs_NDH[:, dim], rowvar=False, bias=True) for dim in range(weight_PD.shape[1])])


def similarity(x_NP: np.ndarray, weight_PD: np.ndarray, num_units: int, kept: Sequence[int]) -> float:
    """Return the absolute correlation of the kept units' output with the whole one, summed over output dims."""
    outputs_NDH = unit_outputs(x_NP, weight_PD, num_units)
    whole_ND = outputs_NDH.sum(axis=-1)
    kept_ND = outputs_NDH[:, :, list(kept)].sum(axis=-1)
    return sum(abs(np.corrcoef(kept_ND[:, j], whole_ND[:, j])[0, 1]) for j in range(whole_ND.shape[1]))


def choose_heads(
    x_NP: np.ndarray, weight_PD: np.ndarray, num_units: int, num_removed: int
) -> tuple[list[int], list[int], list[float]]:
    """Return the kept units after and before the exchange, and the similarity after each accepted exchange."""

    def similarity_of(kept: Sequence[int]) -> float:
        return similarity(x_NP, weight_PD, num_units, kept)

    units = range(num_units)
    scores = [similarity_of([other for other in units if other != unit]) for unit in units]
    most_prunable = sorted(units, key=lambda unit: -scores[unit])
    dropped, kept = most_prunable[:num_removed], most_prunable[num_removed:]
    before, path = sorted(kept), [similarity_of(kept)]
    for candidate in dropped:
        trials = [[*kept[:slot], candidate, *kept[slot + 1 :]] for slot in range(len(kept))]
        best = max(trials, key=similarity_of)
        if similarity_of(best) > path[-1]:
            kept = best
            path.append(similarity_of(best))
    return sorted(kept), before, path


def channel_scores(
    x_NP: np.ndarray, weight_PD: np.ndarray, input_ND: np.ndarray, input_weights_PD: Sequence[np.ndarray]
) -> np.ndarray:
    """Return the score of each channel, by the general eigenvalue problem of the output's covariance."""
    output_ND = x_NP @ weight_PD
    eigenvalues_D, directions_DD = np.linalg.eig(np.cov(output_ND, rowvar=False, bias=True))
    magnitude_D = np.abs(eigenvalues_D)
    f_D = 1 / (1 + np.exp(-magnitude_D / magnitude_D.mean()))
    input_norm_D = np.array([math.sqrt(sum(value**2 for value in feature)) for feature in input_ND.T])
    scores = []
    for channel in range(len(weight_PD)):
        score = sum(np.linalg.norm(weight_PD_in[channel] * input_norm_D) for weight_PD_in in input_weights_PD)
        along_D = np.array([weight_PD[channel] @ direction for direction in directions_DD.T])
        scores.append(score + np.linalg.norm(x_NP[:, channel]) * np.linalg.norm(along_D * f_D))
    return np.array(scores)


def channel_scores_through_zero(
    x_NP: np.ndarray, weight_PD: np.ndarray, input_ND: np.ndarray, input_weights_PD: Sequence[np.ndarray]
) -> np.ndarray:
    """Return the score of each channel where nothing has a mean: by as many tokens again of the other sign."""
    both_NP, inputs_ND = (np.concatenate([rows, -rows]) for rows in (x_NP, input_ND))
    return channel_scores(both_NP, weight_PD, inputs_ND, input_weights_PD) / math.sqrt(2)


def fit_lines(x_NP: np.ndarray, weight_PD: np.ndarray, kept_S: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the slope and intercept (D,) of each full output dim over the kept part's, by polynomial fitting."""
    y_ND, part_ND = x_NP @ weight_PD, x_NP[:, list(kept_S)] @ weight_PD[list(kept_S)]
    lines = [np.polyfit(part_ND[:, j], y_ND[:, j], deg=1) for j in range(y_ND.shape[1])]
    return np.array([line[0] for line in lines]), np.array([line[1] for line in lines])


def unexplained_fraction(
    x_NP: np.ndarray, weight_PD: np.ndarray, kept_S: Sequence[int], scale_D: np.ndarray, bias_D: np.ndarray
) -> float:
    """Return the squared residual of the recovered output over the output's squared deviation from its mean."""
    y_ND = x_NP @ weight_PD
    recovered_ND = (x_NP[:, list(kept_S)] @ weight_PD[list(kept_S)]) * scale_D + bias_D
    return float(((y_ND - recovered_ND) ** 2).sum() / ((y_ND - y_ND.mean(axis=0)) ** 2).sum())


def ridge_fit(x_NP: np.ndarray, weight_PD: np.ndarray, kept_S: Sequence[int], d: float) -> np.ndarray:
    """Return the weight (S, D) of the kept inputs that fits the whole output, held to the dense weight by a ridge d.

    The ridge is so many further rows of data: |X_c (W - V)|^2 / N + d |W - V|^2, V without the removed inputs.
    """
    rows_MP = np.concatenate([(x_NP - x_NP.mean(axis=0)) / math.sqrt(len(x_NP)), math.sqrt(d) * np.eye(len(weight_PD))])
    return np.linalg.lstsq(rows_MP[:, list(kept_S)], rows_MP @ weight_PD, rcond=None)[0]


def ridge_fit_through_zero(x_NP: np.ndarray, weight_PD: np.ndarray, kept_S: Sequence[int], d: float) -> np.ndarray:
    """Return the same fit without an intercept: to inputs that are mirrored, so that their mean is 0."""
    return ridge_fit(np.concatenate([x_NP, -x_NP]), weight_PD, kept_S, d)


def ridge_residual_through_zero(x_NP: np.ndarray, weight_PD: np.ndarray, kept_S: Sequence[int], d: float) -> float:
    """Return what is left of that fit's objective."""
    return ridge_residual(np.concatenate([x_NP, -x_NP]), weight_PD, kept_S, d)


def ridge_residual(x_NP: np.ndarray, weight_PD: np.ndarray, kept_S: Sequence[int], d: float) -> float:
    """Return what is left of the ridge's objective with only these inputs kept."""
    fitted_PD = np.zeros_like(weight_PD)
    fitted_PD[list(kept_S)] = ridge_fit(x_NP, weight_PD, kept_S, d)
    lost_ND = (x_NP - x_NP.mean(axis=0)) @ (weight_PD - fitted_PD)
    return float((lost_ND**2).sum() / len(x_NP) + d * ((weight_PD - fitted_PD) ** 2).sum())


def observe(x_NP: torch.Tensor, input_ND: torch.Tensor | None = None) -> PackedObservation:
    """Return the observation of rows that enter an output projection, and of those that entered its branch."""
    seen = ObservationSum()
    seen.add(x_NP, torch.zeros(len(x_NP), 4) if input_ND is None else input_ND)
    return seen.packed()


def random_decision(seed: int, kept: Sequence[int], num_units: int, hidden: int = 32) -> Decision | None:
    """Return a decision whose line is far from the identity in every output dim; none where no unit can go."""
    if num_units == 1:
        return None
    generator = torch.Generator().manual_seed(seed)
    scale_D, bias_D = torch.randn(2, hidden, generator=generator, dtype=torch.float64)
    scores = torch.rand(num_units, generator=generator, dtype=torch.float64)
    return Decision(tuple(kept), tuple(scores.tolist()), Line(scale_D, bias_D, 0.1 / 3), relative_error=0.1 / 3)


@torch.inference_mode()
def expert_activations(directory: Path, ids: torch.Tensor, layer: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, of each of a layer's experts in the whole model, what enters its output projection, weighted, (n, I).

    And what entered the expert, (n, D): a row for every token that was sent to it, token by token.
    """
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    block = model.model.layers[layer].mlp
    given: list[tuple[torch.Tensor, ...]] = []
    block.experts.register_forward_pre_hook(lambda module, arguments: given.append(arguments))
    model(ids)
    ((input_ND, experts_Nk, weights_Nk),) = given
    rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in block.experts.gate_up_proj]
    for token_D, experts, weights in zip(input_ND, experts_Nk.tolist(), weights_Nk, strict=True):
        for expert, weight in zip(experts, weights, strict=True):
            gate_ID, up_ID = block.experts.gate_up_proj[expert].chunk(2)
            x_I = torch.nn.functional.silu(gate_ID @ token_D) * (up_ID @ token_D) * weight
            rows[expert].append((x_I, token_D))
    return [tuple(torch.stack(part).double().numpy() for part in zip(*one, strict=True)) for one in rows]


def random_channels(seed: int, kept: Sequence[int], shape: LayerShape) -> Decision:
    """Return such a decision about an MLP; of its experts, each keeps other channels and has a line through zero."""
    if shape.num_experts == 1:
        decision = random_decision(seed, kept, shape.intermediate_size)
        assert decision is not None
        return decision
    width, generator = shape.intermediate_size, torch.Generator().manual_seed(seed)
    channels = [sorted((channel + expert) % width for channel in kept) for expert in range(shape.num_experts)]
    units = tuple(expert * width + channel for expert, ours in enumerate(channels) for channel in ours)
    scale_ED = torch.randn(shape.num_experts, 32, generator=generator, dtype=torch.float64)
    scores = torch.rand(shape.num_channels, generator=generator, dtype=torch.float64)
    line = Line(scale_ED, torch.zeros(32, dtype=torch.float64), 0.1 / 3)
    return Decision(units, tuple(scores.tolist()), line, relative_error=0.1 / 3, with_bias=False)


def observations(observed: Observed) -> list[PackedObservation]:
    """Return what was observed of a branch's output projection, or of each of its experts' that tokens reached."""
    if isinstance(observed, PackedExperts):
        return [seen for seen in observed.experts if seen is not None]
    assert isinstance(observed, PackedObservation)
    return [observed]


def flat(weight: torch.Tensor) -> torch.Tensor:
    """Return output weights (D, P); those of experts (E, D, I), side by side."""
    return weight if weight.dim() == 2 else torch.cat(list(weight), dim=1)


def masked_model(directory: Path, plans: Sequence[LayerPlan]) -> PreTrainedModel:
    """Return the dense model with what each plan removes multiplied by zero, and its lines put into the weights."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for (attention, mlp), plan in zip(_output_projections(model), plans, strict=True):
        for projection, decision in ((attention, plan.attention), (mlp, plan.mlp)):
            if decision is not None:
                _mask(projection, decision, list(range(_num_inputs(projection))))
    return model


# An output projection, or the weights (E, D, I) of experts' ones.
Output = torch.nn.Linear | torch.nn.Parameter


def _output_projections(model: PreTrainedModel) -> list[tuple[torch.nn.Linear, Output]]:
    """Return every layer's output projections: that of the attention, and that of the MLP."""
    family = family_of(model.config)
    layers = model.get_submodule(family.layers)
    find = "get_submodule" if family.mlp.reading.experts is None else "get_parameter"
    return [(layer.get_submodule(family.attention.output), getattr(layer, find)(family.mlp.output)) for layer in layers]


def _num_inputs(projection: Output) -> int:
    return flat(projection if isinstance(projection, torch.nn.Parameter) else projection.weight).shape[1]


def mask_again(model: PreTrainedModel, plans: Sequence[LayerPlan], further: Sequence[LayerPlan]) -> PreTrainedModel:
    """Mask a model that `masked_model` masked by `plans` by plans that were made for what those left."""
    for (attention, mlp), plan, more in zip(_output_projections(model), plans, further, strict=True):
        modules = ((attention, plan.attention, more.attention), (mlp, plan.mlp, more.mlp))
        for projection, first, second in modules:
            if second is not None:
                whole = list(range(_num_inputs(projection)))
                _mask(projection, second, whole if first is None else kept_columns(first, len(whole)))
    return model


def kept_columns(decision: Decision, num_columns: int) -> list[int]:
    """Return the inputs of an output projection that stay, unit after unit."""
    width = num_columns // len(decision.scores)
    return [unit * width + column for unit in decision.kept for column in range(width)]


@torch.no_grad()
def _mask(projection: Output, decision: Decision, columns: list[int]) -> None:
    """Mask a decision about those of a projection's inputs that are left."""
    kept = [columns[index] for index in kept_columns(decision, len(columns))]
    gone = [column for column in range(_num_inputs(projection)) if column not in kept]
    if isinstance(projection, torch.nn.Parameter):
        for unit in gone:
            projection[unit // projection.shape[2], :, unit % projection.shape[2]] = 0
        projection *= decision.recovery.scale_D[:, :, None].float()
        return
    projection.weight[:, gone] = 0
    projection.weight *= decision.recovery.scale_D[:, None].float()
    bias_D = decision.recovery.bias_D.float()
    projection.bias = torch.nn.Parameter(bias_D if projection.bias is None else projection.bias + bias_D)
