"""Removes units from a layer's tensors: rows of the input projections, and columns of the output projection.

Shapes: P inputs of an output projection, S of them kept, D hidden size; E experts with I channels each, S of them kept.
"""

import torch
from torch import Tensor

from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.models.families import Branch, Family


def prune_layer(tensors: dict[str, Tensor], family: Family, plan: LayerPlan) -> dict[str, Tensor]:
    """Return a pruned layer's tensors, in the dtype of `tensors`, by names relative to the layer.

    Raises:
        NonFiniteError: A recovered weight or bias overflows that dtype.
    """
    pruned = dict(tensors)
    for branch, decision in ((family.attention, plan.attention), (family.mlp, plan.mlp)):
        if decision is not None:
            prune = _prune_experts if branch.has_experts else _prune_branch
            pruned |= prune(tensors, branch, decision)
    return pruned


def recovered_projection(weight_DP: Tensor, bias_D: Tensor | None, decision: Decision) -> tuple[Tensor, Tensor | None]:
    """Return the output projection's new weight (D, S) and bias (D,), computed in the precision of `weight_DP`."""
    if decision.recovery is None:
        raise ValueError("this decision was read from a plan: the weights of its refit are in the checkpoint")
    kept_S = decision.kept_rows(weight_DP.shape[1]).to(weight_DP.device)
    weight_DS = decision.recovery.restore(weight_DP[:, kept_S].T).T
    return weight_DS.contiguous(), recovered_bias(bias_D, decision, weight_DP)


def recovered_bias(bias_D: Tensor | None, decision: Decision, like: Tensor) -> Tensor | None:
    """Return the output projection's new bias (D,); None if it has none.

    Args:
        bias_D: Its bias before; None if it had none.
        decision: What to recover.
        like: A tensor of the dtype to compute in, on the device to compute on.
    """
    if not decision.with_bias or decision.recovery is None:
        return bias_D
    recovered_D = decision.recovery.bias_D.to(like)
    return recovered_D if bias_D is None else recovered_D + bias_D


def recovered_experts(weight_EDI: Tensor, decision: Decision) -> tuple[Tensor, Tensor]:
    """Return the experts' new output weights and kept channels.

    Returns:
        The weights (E, D, S), computed in the precision of `weight_EDI`, and the channels (E, S) that each expert
        keeps, ascending.
    """
    num_experts, _, num_channels = weight_EDI.shape
    weight_DS, _ = recovered_projection(weight_EDI.transpose(0, 1).flatten(1), None, decision)
    kept_ES = torch.tensor(decision.kept, device=weight_EDI.device).unflatten(0, (num_experts, -1)) % num_channels
    return weight_DS.unflatten(1, (num_experts, -1)).transpose(0, 1).contiguous(), kept_ES


def _prune_experts(tensors: dict[str, Tensor], branch: Branch, decision: Decision) -> dict[str, Tensor]:
    stored = tensors[branch.output_weight]
    weight_EDS, kept_ES = recovered_experts(stored.float(), decision)
    pruned = {branch.output_weight: _rounded(weight_EDS, stored.dtype, branch.output_weight)}
    for name in branch.input_weights:
        # The projections stored as one tensor are stacked, each with a row for every channel.
        parts = tensors[name].split(stored.shape[2], dim=1)
        rows = [
            torch.stack([part[kept_S] for part, kept_S in zip(parts_EID, kept_ES, strict=True)]) for parts_EID in parts
        ]
        pruned[name] = torch.cat(rows, dim=1)
    return pruned


def _prune_branch(tensors: dict[str, Tensor], branch: Branch, decision: Decision) -> dict[str, Tensor]:
    pruned, stored = {}, tensors[branch.output_weight]
    for name in branch.inputs:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in tensors:
                rows = branch.kept_rows(len(tensors[key]), stored.shape[1], decision.kept, decision.num_units)
                pruned[key] = tensors[key][rows]
    bias_D = tensors.get(branch.output_bias)
    # The recovery is computed in float32 and rounded once, to the source's dtype.
    weight_DS, new_bias_D = recovered_projection(stored.float(), None if bias_D is None else bias_D.float(), decision)
    pruned[branch.output_weight] = _rounded(weight_DS, stored.dtype, branch.output_weight)
    if new_bias_D is not None:
        pruned[branch.output_bias] = _rounded(new_bias_D, stored.dtype, branch.output_bias)
    return pruned


def _rounded(recovered: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a recovered tensor in the source's dtype.

    Raises:
        NonFiniteError: A value overflows that dtype.
    """
    rounded = recovered.to(dtype)
    if not rounded.isfinite().all():
        raise NonFiniteError(
            f"the recovery of {name} reaches {float(recovered.abs().max()):.2g}, which {dtype} cannot hold: "
            f"convert the model to bfloat16 first"
        )
    return rounded
