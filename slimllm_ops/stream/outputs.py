"""Prunes the MLP of a layer by its outputs, as the published method does on its way through the layers.

Three steps in turn: `observe_output`, `compare_outputs` for the channels that were chosen, and `add_recovered` for the
line that was fitted. Between them, X and the output wait in memory, so no product is computed twice.

Shapes: b blocks in a batch, T tokens in a block, D hidden size, P inputs of the output projection, S of them kept.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from slimllm_ops.checkpoint.surgery import recovered_bias
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.decide.recovery import Line
from slimllm_ops.moments.outputs import OutputObservation, OutputPairs, OutputSum
from slimllm_ops.moments.states import States
from slimllm_ops.stream.passes import LayerStream


class LayerwiseStream(LayerStream):
    """A stream whose MLPs wait for the channels, then for the line that recovers the output; see `LayerStream`."""

    _outputs: States

    @torch.inference_mode()
    def observe_output(self, layer: int) -> OutputObservation:
        """Run an MLP, keep X and the output until the next steps, and return what the scores need of them."""
        branch = self.family.mlp
        run, weight_DP = self.branch(layer, branch), self.weights(layer)[branch.output_weight]
        seen, self._branch_inputs, self._outputs = OutputSum(self._intercept), self.store(), self.store()
        for index, (normalised, x_bTP) in enumerate(self._run(layer, branch, run)):
            y_bTD = functional.linear(x_bTP, weight_DP)
            seen.add(*(self.tokens(index, states) for states in (x_bTP, normalised, y_bTD)))
            self._branch_inputs.append(x_bTP)
            self._outputs.append(y_bTD)
        return self.require_finite(seen.packed(), layer, branch)

    @torch.inference_mode()
    def compare_outputs(self, layer: int, kept: Sequence[int]) -> OutputPairs:
        """Keep the output of some channels in place of the full one; return sums over both."""
        keep = output_of(kept, self.weights(layer)[self.family.mlp.output_weight])
        pairs = []
        for index, x_bTP in enumerate(self._branch_inputs):
            y_bTD = self._outputs[index]
            z_bTD = keep(x_bTP, y_bTD)
            kept_ND, full_ND = (self.tokens(index, states).flatten(0, 1) for states in (z_bTD, y_bTD))
            pairs.append(OutputPairs.of(kept_ND, full_ND, self._intercept))
            self._outputs[index] = z_bTD
        self._branch_inputs = self.store()
        return self.require_finite(reduce(OutputPairs.merge, pairs), layer, self.family.mlp)

    @torch.inference_mode()
    def add_recovered(self, layer: int, decision: Decision) -> None:
        """Add the MLP's recovered output to the residual stream."""
        run, recover = self.branch(layer, self.family.mlp), self._recovery(layer, decision)
        for index, z_bTD in enumerate(self._outputs):
            self._add(index, run.contribution(recover(z_bTD)))
        self._outputs = self.store()

    @torch.inference_mode()
    def forward_pruned(self, layer: int, plan: LayerPlan) -> None:
        """Run a layer as a plan prunes it, to the same bits as the steps that made the plan."""
        if plan.mlp is None or self.family.mlp.has_experts:
            super().forward_pruned(layer, plan)
            return
        self.forward_branch(layer, self.family.attention, plan.attention)
        run, weight_DP = self.branch(layer, self.family.mlp), self.weights(layer)[self.family.mlp.output_weight]
        keep, recover = output_of(plan.mlp.kept, weight_DP), self._recovery(layer, plan.mlp)
        for index, (_, x_bTP) in enumerate(self._run(layer, self.family.mlp, run)):
            z_bTD = keep(x_bTP, functional.linear(x_bTP, weight_DP))
            self._add(index, run.contribution(recover(z_bTD)))

    def close(self) -> None:
        """Free all memory now."""
        super().close()
        self._outputs = []

    def _recovery(self, layer: int, decision: Decision) -> Callable[[Tensor], Tensor]:
        """Return a function from the kept channels' output (b, T, D) to the recovered output, by the line."""
        line = decision.recovery
        assert isinstance(line, Line), "the paper's method recovers every output by a line"
        scale_D = line.scale_D.float().to(self.device)
        bias_D = recovered_bias(self.weights(layer).get(self.family.mlp.output_bias), decision, scale_D)
        shift_D = torch.zeros_like(scale_D) if bias_D is None else bias_D
        return lambda z_bTD: torch.addcmul(shift_D, z_bTD.float(), scale_D).to(z_bTD.dtype)


def output_of(kept: Sequence[int], weight_DP: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from X (b, T, P) and X W (b, T, D) to X_S W_S (b, T, D).

    X_S W_S is X W without the product of the other channels, so the function computes the smaller of both products.

    Args:
        kept: The channels S.
        weight_DP: W, as PyTorch stores it.
    """
    stays_P = torch.zeros(weight_DP.shape[1], dtype=torch.bool)
    stays_P[list(kept)] = True
    subtract = 2 * len(kept) > len(stays_P)
    channels = torch.where(~stays_P if subtract else stays_P)[0].to(weight_DP.device)
    weight = weight_DP[:, channels]

    def output(x_bTP: Tensor, y_bTD: Tensor) -> Tensor:
        product_bTD = functional.linear(x_bTP[..., channels], weight)
        return y_bTD - product_bTD if subtract else product_bTD

    return output
