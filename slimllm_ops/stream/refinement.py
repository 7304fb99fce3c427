r"""A second pass that corrects a pruned model towards the dense stream, layer by layer.

Two streams run side by side, the dense model's states h and the pruned one's h'. For each branch, with u and u' the
two streams' normalised inputs,

    align    M = I + (U'^T U' + d I)^-1 U'^T (U - U'),     folded into the projections into the branch: W_in M^T
    refit    t = X W + m ((h_after - h'_before) - X W)
             W_new = W_S + (C_SS + d I)^-1 (C_St - C_SS W_S),     bias = E t - E x_S^T W_new

so that the branch sees what it saw in the dense model as nearly as a linear map allows, and its output brings the
residual stream back to the dense one's. X is the dense branch run on the pruned stream's input, x_S the pruned and
aligned branch's. A module that stayed whole has no bias: it is refitted with moments that are not centred.

Everything is rounded as it will be stored before it is used, so that later layers correct what rounding costs, and
so that what is written is what the run computed with: a layer that is passed again from its file gives the same bits.

m = .75 and the full alignment were the best constants over all models tried (docs/method.md); m = 1 overfits where
calibration tokens are few.

Shapes: N tokens, D hidden size, S kept inputs of an output projection.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from slimllm_ops.decide.elimination import factorise_with_ridge, ridge
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.errors import InputError
from slimllm_ops.models.families import Branch, Family
from slimllm_ops.moments.moments import Moments
from slimllm_ops.moments.observation import ObservationSum, PackedObservation
from slimllm_ops.stream.passes import LayerStream

MIX = 0.75


def require_refinable(family: Family) -> None:
    """Refuse a family whose branches are not one output projection each.

    Raises:
        InputError: its MLP has one for every expert.
    """
    if family.mlp.has_experts:
        raise InputError(
            f"{family.name} models cannot be refined, since that corrects one output projection of a branch, and their "
            f"MLPs have one for every expert: leave refinement out"
        )


class RefinementStream:
    """The dense and the pruned model's hidden states over the same blocks.

    Args:
        dense: the dense model's.
        pruned: the pruned model's; layers are numbered as in it.
        origins: which dense layer each of the pruned ones is; those between are passed by `forward_dropped`.
    """

    def __init__(self, dense: LayerStream, pruned: LayerStream, origins: Sequence[int]) -> None:
        self._dense = dense
        self.pruned = pruned
        self._origins = origins
        self._kept_inputs = pruned.store()

    @torch.inference_mode()
    def observe_inputs(self, layer: int, branch: Branch) -> PackedObservation:
        """Return the joint moments of [u', u - u'] (N, 2 D)."""
        seen = _summed(torch.cat([pruned, dense - pruned], dim=-1) for dense, pruned in self._normalised(layer, branch))
        return self.pruned.require_finite(seen, layer, branch)

    @torch.inference_mode()
    def aligned(self, layer: int, branch: Branch, alignment_DD: Tensor) -> dict[str, Tensor]:
        """Return the pruned branch's input projections with an alignment folded in, W_in M^T, by name."""
        weights = self.pruned.weights(layer)
        return {
            name: (weights[name].to(alignment_DD) @ alignment_DD.T).to(self.pruned.checkpoint.dtype)
            for name in branch.input_weights
        }

    @torch.inference_mode()
    def replace(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Let the pruned layer have other tensors, given by name."""
        weights = self.pruned.weights(layer)
        for name, tensor in tensors.items():
            weights[name].copy_(tensor)

    def forward_refined(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Pass a layer whose refined tensors are known in both streams, without a look at its moments."""
        self.forward_dropped(self._origins[layer])
        self.replace(layer, tensors)
        self.pruned.forward_pruned(layer, LayerPlan())

    def forward_dropped(self, layer: int) -> None:
        """Pass a dense layer in the dense stream alone."""
        self._dense.forward_pruned(layer, LayerPlan())

    @torch.inference_mode()
    def observe_targets(self, layer: int, branch: Branch) -> PackedObservation:
        """Run the branch in both streams, the dense one passing it; return the joint moments of [x_S, t] (N, S + D)."""
        self._kept_inputs = self.pruned.store()
        return self.pruned.require_finite(_summed(self._targets(layer, branch)), layer, branch)

    @torch.inference_mode()
    def apply(self, layer: int, branch: Branch, weight_DS: Tensor, bias_D: Tensor | None) -> None:
        """Add the refitted branch's output to the pruned stream; the dense one has gone on already."""
        weight_DS = weight_DS.to(self.pruned.device, self.pruned.dtype)
        bias_D = None if bias_D is None else bias_D.to(weight_DS)
        run = self.pruned.branch(layer, branch)
        for index, x_bTS in enumerate(self._kept_inputs):
            added = run.contribution(functional.linear(x_bTS, weight_DS, bias_D))
            self.pruned.hidden[index] = self.pruned.hidden[index] + added
        self._kept_inputs = self.pruned.store()

    def close(self) -> None:
        """Give both streams' memory back."""
        self._dense.close()
        self.pruned.close()

    def _normalised(self, layer: int, branch: Branch) -> Iterator[tuple[Tensor, Tensor]]:
        origin = self._origins[layer]
        entering = (self._dense.entering(origin, branch), self.pruned.entering(layer, branch))
        dense_run, pruned_run = self._dense.branch(origin, branch), self.pruned.branch(layer, branch)
        for dense, pruned in zip(*entering, strict=True):
            yield dense_run.normalise(dense), pruned_run.normalise(pruned)

    def _targets(self, layer: int, branch: Branch) -> Iterator[Tensor]:
        dense_run, pruned_run = self._dense.branch(self._origins[layer], branch), self.pruned.branch(layer, branch)
        project = dense_run.projected(None)
        states = zip(self._dense.hidden, self.pruned.hidden, self._normalised(layer, branch), strict=True)
        for index, (dense, pruned, (dense_input, pruned_input)) in enumerate(states):
            dense_after = dense + dense_run.contribution(project(dense_run.run(dense_input)))
            whole = project(dense_run.run(pruned_input))
            kept = pruned_run.run(pruned_input)
            missing = MIX * ((dense_after - pruned) - dense_run.contribution(whole))
            target = whole + dense_run.change_of_output(whole, missing)
            self._dense.hidden[index] = dense_after
            self._kept_inputs.append(kept)
            yield torch.cat([kept, target], dim=-1)


@torch.inference_mode()
def solve_alignment(moments: Moments) -> Tensor:
    """Return M (D, D) from the joint moments of [u', u - u'].

    Raises:
        SolveError: the pruned stream's moments cannot be factorised.
    """
    second = moments.about_zero().covariance_PP
    size = len(second) // 2
    inputs_DD = second[:size, :size]
    factor_DD = factorise_with_ridge(inputs_DD, ridge(inputs_DD))
    correction_DD = torch.cholesky_solve(second[:size, size:], factor_DD)
    return torch.eye(size, dtype=second.dtype, device=second.device) + correction_DD


@torch.inference_mode()
def solve_refit(moments: Moments, weight_SD: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Return the new weight (S, D) and bias (D,) from the joint moments of [x_S, t].

    Args:
        moments: of x_S beside t.
        weight_SD: the weight that the ridge holds the new one to.
        with_bias: whether the projection has a bias, and so whether the moments are centred.

    Raises:
        SolveError: the kept inputs' moments cannot be factorised.
    """
    kept = len(weight_SD)
    joint = (moments if with_bias else moments.about_zero()).covariance_PP
    weight_SD = weight_SD.to(joint)
    inputs_SS = joint[:kept, :kept]
    factor_SS = factorise_with_ridge(inputs_SS, ridge(inputs_SS))
    missing_SD = joint[:kept, kept:] - inputs_SS @ weight_SD
    new_SD = weight_SD + torch.cholesky_solve(missing_SD, factor_SS)
    if not with_bias:
        return new_SD, None
    return new_SD, moments.mean_P[kept:] - moments.mean_P[:kept] @ new_SD


def _summed(batches: Iterable[Tensor]) -> PackedObservation:
    """Return the moments of the rows of all batches (b, T, ...), one after the other."""
    seen = ObservationSum()
    for batch in batches:
        seen.add(batch.flatten(0, 1), batch.flatten(0, 1))
    return seen.packed()
