r"""Measures how much the loss depends on what each module computes: one pass forward and one backward.

Let g be the gradient of a token block's loss with respect to the output y of a module's output projection. The loss is
that of tokens sampled from the model itself, so F = E[g g^T] is the Fisher information of y: an error e in y costs

    KL(dense || damaged) = 1/2 e^T F e

to second order. So errors of different modules are in one unit, and errors that the model does not notice cost nothing.
The power of the states is no substitute. A few tokens with massive activations hold nearly all of it, from some layer
on, and the loss does not depend on them (docs/method.md).

The tokens are sampled with a seed that comes from the block, so they do not depend on how blocks are spread.

Amari 1998; as a metric for pruning: Theis et al. 2018, van der Ouderaa et al. 2024 (The LLM Surgeon).

Shapes: b blocks in a batch, T tokens in a block, D hidden size, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.sensitivity import Sensitivity
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.models.families import Family
from slimllm_ops.models.pair import Pair
from slimllm_ops.moments.states import States, StateStore
from slimllm_ops.moments.sums import Mean, SecondMoment
from slimllm_ops.stream.padding import PADDING, filled, without_padding
from slimllm_ops.stream.passes import spans, summed_power
from slimllm_ops.stream.sampling import sample
from slimllm_ops.stream.weights import ModelWeights

# From this many tokens the sensitivities of a model of 135M parameters are known to a few percent (docs/method.md).
SENSITIVITY_TOKENS = 4096


def sensitivity_blocks(length: int) -> int:
    """Return how many blocks of a length are enough to measure sensitivities on."""
    return max(1, SENSITIVITY_TOKENS // length)


@dataclass(frozen=True)
class LayerSensitivity:
    """How much the loss depends on a layer, over the tokens of a shard.

    Attributes:
        attention: Moments of g at the output of the attention's output projection.
        mlp: The same of the MLP, or of the sum of its experts.
        output: |g|^2 at the states after the layer.
    """

    attention: SecondMoment
    mlp: SecondMoment
    output: Mean

    def merge(self, other: "LayerSensitivity") -> "LayerSensitivity":
        """Return the sums over both sets of tokens."""
        return LayerSensitivity(
            self.attention.merge(other.attention), self.mlp.merge(other.mlp), self.output.merge(other.output)
        )

    @property
    def value(self) -> Sensitivity:
        """The means over tokens."""
        return Sensitivity(Pair(self.attention.value, self.mlp.value), self.output.value)


class SensitivityStream:
    """The states of token blocks before every layer, on the way forward, then their gradients, on the way back.

    Call `forward_kept` for every layer in order, then `begin_backward`, then `backward` for every layer in reverse.

    Args:
        checkpoint: The model.
        batches: Token ids, each (b, T), int64; padding stands at the end of a block, as `PADDING`.
        device: Where the layers run.
        store: Returns an empty store for the states; there is one for each layer, so it should not be in memory.
    """

    def __init__(self, checkpoint: Checkpoint, batches: list[Tensor], device: torch.device, store: StateStore) -> None:
        self._batches = batches
        self._device = device
        self._store = store
        self._weights = ModelWeights(checkpoint, device)
        self._states = [self._held(self._weights.embed([filled(ids) for ids in batches]))]
        self._gradients = store()

    @torch.no_grad()
    def forward_kept(self, layer: int) -> None:
        """Run a layer, and keep the states that entered it."""
        module, call = self._weights.load(layer), self._weights.call(layer)
        self._states.append(self._held(module(states, **call) for states in self._states[layer]))

    def begin_backward(self) -> None:
        """Compute the gradient of the loss with respect to the states after the last layer."""
        with self._weights.head():
            self._gradients = self._held(map(self._gradient_of_loss, self._states.pop(), self._batches))

    def backward(self, layer: int) -> LayerSensitivity:
        """Return the moments of g in a layer, then go back to the states before the layer.

        Raises:
            NonFiniteError: A gradient holds NaN or infinity.
        """
        module, call, entered = self._weights.load(layer), self._weights.call(layer), self._states.pop()
        sums = []
        for index, ids in enumerate(self._batches):
            states, after = entered[index].requires_grad_(), self._gradients[index]
            with _recorded_outputs(module, self._weights.checkpoint.family) as outputs:
                left = module(states, **call)
            *inner, self._gradients[index] = torch.autograd.grad(left, [*outputs, states], after)
            attention, mlp, output = (self._tokens(one, ids) for one in (*inner, after))
            sums.append(LayerSensitivity(SecondMoment.of(attention[0]), SecondMoment.of(mlp[0]), summed_power(output)))
        seen = reduce(LayerSensitivity.merge, sums)
        if not all(np.isfinite(one).all() for one in (seen.attention.total_DD, seen.mlp.total_DD, seen.output.total)):
            raise NonFiniteError(
                f"layer {layer}: the gradient of the loss holds NaN or infinity in {self._weights.dtype}: the weights "
                f"of {self._weights.checkpoint.directory} are damaged, or its activations are too large for this dtype"
            )
        return seen

    def close(self) -> None:
        """Free all memory now."""
        self._weights.close()
        self._states, self._gradients = [], self._store()

    def _gradient_of_loss(self, states_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """Return the gradient, shape (b, T, D), of the loss of tokens that are sampled from the model; 0 at padding."""
        gradient_BTD, uniform_BT = torch.zeros_like(states_BTD), _uniform(ids_BT)
        parts = (spans(states_BTD, other) for other in (gradient_BTD, uniform_BT, ids_BT))
        for (states_bTD, gradient_bTD), (_, uniform_bT), (_, ids_bT) in zip(*parts, strict=True):
            leaf = states_bTD.clone().requires_grad_()
            logits_NV = self._weights.logits(leaf).flatten(0, 1).float()
            sampled_N = sample(logits_NV.detach(), uniform_bT.flatten().to(self._device))
            sampled_N[ids_bT.flatten().to(self._device) == PADDING] = PADDING
            loss = functional.cross_entropy(logits_NV, sampled_N, reduction="sum", ignore_index=PADDING)
            gradient_bTD.copy_(torch.autograd.grad(loss, leaf)[0])
        return gradient_BTD

    def _tokens(self, gradient: Tensor, ids_bT: Tensor) -> Tensor:
        """Return a gradient, (b, T, D) or (b T, D), at the tokens that are not padding: (1, N, D)."""
        mask_bT = (ids_bT != PADDING).to(self._device)
        return without_padding(gradient.reshape(*mask_bT.shape, -1), mask_bT)

    def _held(self, batches: Iterable[Tensor]) -> States:
        states = self._store()
        for batch in batches:
            states.append(batch)
        return states


@contextmanager
def _recorded_outputs(layer: nn.Module, family: Family) -> Iterator[list[Tensor]]:
    """Record the outputs of the attention's output projection and of the MLP's, or of its experts; in that order."""
    outputs: list[Tensor] = []
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for branch in family.branches:
            name = branch.module if branch.has_experts else branch.output
            hook = layer.get_submodule(name).register_forward_hook(partial(_keep, found, name))
            hooks.callback(hook.remove)
        yield outputs
    outputs += [found[branch.module if branch.has_experts else branch.output] for branch in family.branches]


def _keep(found: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    found[name] = output[0] if isinstance(output, tuple) else output


def _uniform(ids_BT: Tensor) -> Tensor:
    """Return a number in [0, 1) for each token, from generators that are seeded by the blocks."""
    generators = (torch.Generator().manual_seed(int(ids_T.sum())) for ids_T in ids_BT)
    return torch.stack([torch.rand(ids_BT.shape[1], generator=one) for one in generators])
