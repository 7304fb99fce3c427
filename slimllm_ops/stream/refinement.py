r"""Corrects a pruned model towards the dense one in a second pass, layer by layer.

Two streams run side by side: the dense model's states h and the pruned model's h'. For each branch, with u and u' the
two streams' normalised inputs,

    align    M = I + (U'^T U' + d I)^-1 U'^T (U - U'),     folded into the branch's input projections: W_in M^T
    refit    t = X W + m ((h_after - h'_before) - X W)
             W_new = W_S + (C_SS + d I)^-1 (C_St - C_SS W_S),     bias = E t - E x_S^T W_new

The alignment brings the branch's input as close to the dense one as a linear map can. The refit makes its output bring
the residual stream back to the dense one. X comes from the dense branch on the pruned stream's input, x_S from the
pruned and aligned branch. A module that was not pruned has no bias: it is refitted with uncentred moments.

Tensors are rounded to the stored dtype before they are used. So later layers correct the rounding too, and the run
computes with what it writes: running a layer again from its file gives the same bits.

m = .75 and the full alignment were the best constants over all models tried (docs/method.md); m = 1 overfits when
there are few calibration tokens.

Shapes: N tokens, D hidden size, S kept inputs of an output projection.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from slimllm_ops.decide.elimination import factorise_with_ridge, ridge
from slimllm_ops.errors import InputError
from slimllm_ops.models.families import Branch, Family
from slimllm_ops.moments.moments import Moments
from slimllm_ops.moments.observation import ObservationSum, PackedObservation
from slimllm_ops.stream.paired import BranchTensors, PairedStream, to_numpy
from slimllm_ops.stream.passes import LayerStream

MIX = 0.75


def require_refinable(family: Family) -> None:
    """Refuse a family with more than one output projection in a branch.

    Raises:
        InputError: The family's MLP has one output projection per expert.
    """
    if family.mlp.has_experts:
        raise InputError(
            f"{family.name} models cannot be refined, since refinement corrects one output projection per branch, and "
            f"their MLPs have one per expert: leave refinement out"
        )


class RefinementStream(PairedStream):
    """The dense and the pruned model's hidden states, on the way through the refinement; see `PairedStream`."""

    def __init__(self, dense: LayerStream, pruned: LayerStream, origins: Sequence[int]) -> None:
        super().__init__(dense, pruned, origins)
        self._kept_inputs = pruned.store()

    @torch.inference_mode()
    def observe_inputs(self, layer: int, branch: Branch) -> PackedObservation:
        """Return the joint moments of [u', u - u'] (N, 2 D)."""
        joint = (torch.cat([pruned, dense - pruned], dim=-1) for dense, pruned in self._normalised(layer, branch))
        seen = self._summed(joint)
        return self.pruned.require_finite(seen, layer, branch)

    @torch.inference_mode()
    def solve_alignment(self, observed: PackedObservation, layer: int, branch: Branch) -> BranchTensors:
        """Return the pruned branch's input projections with the alignment folded in: W_in M^T.

        Args:
            observed: The joint moments from `observe_inputs`, merged over all shards.
            layer: The pruned layer.
            branch: The branch.
        """
        alignment_DD = solve_alignment(observed.unpack(self.pruned.device).moments).float()
        weights, dtype = self.pruned.weights(layer), self.pruned.checkpoint.dtype
        return {
            name: to_numpy((weights[name].to(alignment_DD) @ alignment_DD.T).to(dtype)) for name in branch.input_weights
        }

    @torch.inference_mode()
    def align(self, aligned: BranchTensors, layer: int) -> None:
        """Put aligned input projections into a branch of the pruned stream."""
        self._replace(layer, self._tensors(aligned))

    @torch.inference_mode()
    def observe_targets(self, layer: int, branch: Branch) -> PackedObservation:
        """Run a branch, and finish it in the dense stream; return the joint moments of [x_S, t] (N, S + D)."""
        self._kept_inputs = self.pruned.store()
        return self.pruned.require_finite(self._summed(self._targets(layer, branch)), layer, branch)

    @torch.inference_mode()
    def solve_refit(self, observed: PackedObservation, layer: int, branch: Branch) -> BranchTensors:
        """Return a branch's new output projection: the weight (D, S), and the bias (D,) if it has one.

        Args:
            observed: The joint moments from `observe_targets`, merged over all shards.
            layer: The pruned layer.
            branch: The branch.
        """
        weights, dtype = self.pruned.weights(layer), self.pruned.checkpoint.dtype
        moments = observed.unpack(self.pruned.device).moments
        weight_SD, bias_D = solve_refit(moments, weights[branch.output_weight].T, branch.output_bias in weights)
        refitted = {branch.output_weight: to_numpy(weight_SD.T.to(dtype))}
        return refitted if bias_D is None else refitted | {branch.output_bias: to_numpy(bias_D.to(dtype))}

    @torch.inference_mode()
    def apply(self, refitted: BranchTensors, layer: int, branch: Branch) -> None:
        """Add the refitted branch's output to the pruned stream; the dense stream already has its own."""
        tensors = {name: tensor.to(self.pruned.dtype) for name, tensor in self._tensors(refitted).items()}
        weight_DS, bias_D = tensors[branch.output_weight], tensors.get(branch.output_bias)
        run = self.pruned.branch(layer, branch)
        for index, x_bTS in enumerate(self._kept_inputs):
            added = run.contribution(functional.linear(x_bTS, weight_DS, bias_D))
            self.pruned.hidden[index] = self.pruned.hidden[index] + added
        self._kept_inputs = self.pruned.store()

    def _summed(self, batches: Iterable[Tensor]) -> PackedObservation:
        """Return the moments of the tokens of all batches (b, T, ...), without padding."""
        seen = ObservationSum()
        for index, batch in enumerate(batches):
            tokens = self.pruned.tokens(index, batch)
            seen.add(tokens, tokens)
        return seen.packed()

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
        SolveError: The pruned stream's moments cannot be factorised.
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
        moments: The joint moments of x_S and t.
        weight_SD: The current weight; the ridge pulls the new one towards it.
        with_bias: Whether the projection has a bias; if so, the moments are centred.

    Raises:
        SolveError: The kept inputs' moments cannot be factorised.
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
