r"""Trains each branch of a pruned model on its own, to give the dense stream's change of the hidden states.

Two streams run side by side: the dense model's states h and the tuned model's h'. A branch f of the tuned model, with
its output projection and what its family does after it, reads its normalised input u' and is trained to

    minimise    sum_t w_t |f(u'_t) - (h_after,t - h'_t)|^2 / D,     w_t = 1 / (|h_after,t|^2 / D + eps)

with Adam, one step per block. So the branch also corrects what the branches before it left. Only its linear maps are
trained; norms stay. The trained weights are rounded to the stored dtype before they run in the tuned stream.

The shards train one after the other and hand on weights and optimiser. So the steps are the same for any number of
shards, and no shard holds more than its own states and one branch.

The idea is that of "A Free Lunch in LLM Compression" (arXiv 2510.14444), which trains blocks of layers so. Adam: Kingma
and Ba 2015; the cosine: Loshchilov and Hutter 2017.

Shapes: b blocks in a batch, T tokens in a block, D hidden size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slimllm_ops.errors import InputError, NonFiniteError
from slimllm_ops.models.families import Branch, Family
from slimllm_ops.moments.sums import Mean
from slimllm_ops.stream.padding import token_mask
from slimllm_ops.stream.paired import BranchTensors, PairedStream, to_numpy

# The fraction of the steps in which the learning rate rises.
WARM_UP = 0.1
# eps: states of no power have a finite weight.
SMALLEST_POWER = 1e-6
# What the optimiser calls its means of the gradient and of the squared gradient.
ADAM = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class BranchTraining:
    """How a branch is trained.

    Attributes:
        epochs: How often the data pass through each branch while it is trained; at least once.
        learning_rate: The highest learning rate; it rises for a tenth of the steps, then falls as a cosine.
    """

    epochs: int
    learning_rate: float

    def rate(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step, numbered from 0."""
        rising = WARM_UP * num_steps
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        return self.learning_rate * (1 + math.cos(math.pi * (step - rising) / (num_steps - rising))) / 2


@dataclass(frozen=True)
class BranchState:
    """A branch while it is trained: float32 arrays by the tensors' names in the layer.

    Attributes:
        weights: The weights and biases.
        means: Adam's mean of the gradient of each.
        squares: Adam's mean of the squared gradient.
        steps: How many steps were made.
    """

    weights: dict[str, np.ndarray]
    means: dict[str, np.ndarray]
    squares: dict[str, np.ndarray]
    steps: int


class Examples(NamedTuple):
    """A batch of blocks to train a branch on.

    Attributes:
        inputs_bTD: The branch's normalised input u'.
        missing_bTD: What it should add, h_after - h', in float32.
        weight_bT: The weight of each token's squared error, in float32; 0 at padding.
    """

    inputs_bTD: Tensor
    missing_bTD: Tensor
    weight_bT: Tensor

    @property
    def num_tokens(self) -> int:
        """The number of tokens, without padding."""
        return int(self.weight_bT.count_nonzero())

    def error_of(self, added_bTD: Tensor) -> Tensor:
        """Return the weighted squared error of what a branch adds, summed over tokens."""
        return weighted_error(added_bTD.float() - self.missing_bTD, self.weight_bT)

    def blocks(self) -> Iterator["Examples"]:
        """Yield each block as a batch of its own."""
        yield from map(Examples._make, zip(*(part.split(1) for part in self), strict=True))


def require_trainable(family: Family) -> None:
    """Refuse a family whose branches cannot be trained one by one.

    Raises:
        InputError: The family's MLP has one output projection per expert.
    """
    if family.mlp.has_experts:
        raise InputError(
            f"{family.name} models cannot be trained branch by branch, since that trains one output projection per "
            f"branch, and their MLPs have one per expert: choose another method"
        )


class BranchTrainingStream(PairedStream):
    """The dense and the tuned model's hidden states, on the way through the training; see `PairedStream`.

    For each branch, in order: `prepare`, then `train` once per epoch on one shard after the other, then `rounded` and
    `apply`.
    """

    def prepare(self, layer: int, branch: Branch) -> Mean:
        """Run a branch in the dense stream, which gives the target; return the loss before training, over tokens.

        Raises:
            NonFiniteError: The activations hold NaN or infinity.
        """
        self._dense.forward_branch(self._origins[layer], branch)
        run, loss = self.pruned.branch(layer, branch), Mean(0.0, 0)
        for batch in self._examples(layer, branch):
            with torch.no_grad():
                loss = loss.merge(Mean(float(batch.error_of(run.added(batch.inputs_bTD, {}))), batch.num_tokens))
        if not math.isfinite(loss.total):
            self.pruned.raise_non_finite(layer, branch.described)
        return loss

    def train(
        self, state: BranchState | None, layer: int, branch: Branch, settings: BranchTraining, *, num_steps: int
    ) -> BranchState:
        """Pass this shard's blocks through a branch once, with one step of Adam for each; return the branch after it.

        Args:
            state: The branch as the shard before left it; None begins with the weights that it has.
            layer: The pruned layer.
            branch: The branch.
            settings: How it is trained.
            num_steps: The steps of all shards and epochs, over which the learning rate falls.
        """
        state = state or self._begin(layer, branch)
        run, dtype, steps = self.pruned.branch(layer, branch), self.pruned.dtype, state.steps
        weights = {name: one.requires_grad_() for name, one in self._tensors(state.weights).items()}
        optimiser = self._optimiser(weights, state)
        for block in (block for batch in self._examples(layer, branch) for block in batch.blocks()):
            optimiser.param_groups[0]["lr"] = settings.rate(steps, num_steps)
            added_bTD = run.added(block.inputs_bTD, {name: weight.to(dtype) for name, weight in weights.items()})
            optimiser.zero_grad()
            (block.error_of(added_bTD) / block.num_tokens).backward()
            optimiser.step()
            steps += 1
        means, squares = ({name: to_numpy(optimiser.state[one][key]) for name, one in weights.items()} for key in ADAM)
        return BranchState({name: to_numpy(one) for name, one in weights.items()}, means, squares, steps)

    def rounded(self, state: BranchState, layer: int, branch: Branch) -> BranchTensors:
        """Return a trained branch's tensors, rounded to the checkpoint's dtype.

        Raises:
            NonFiniteError: The training diverged.
        """
        dtype = self.pruned.checkpoint.dtype
        tensors = {name: torch.from_numpy(array.copy()).to(dtype) for name, array in state.weights.items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise NonFiniteError(
                f"layer {layer}: the training of {branch.described} diverged to values that {dtype} cannot hold: "
                f"lower the learning rate"
            )
        return {name: to_numpy(tensor) for name, tensor in tensors.items()}

    def apply(self, rounded: BranchTensors, layer: int, branch: Branch) -> Mean:
        """Run a trained branch in the tuned stream; return the loss after training, over tokens.

        The dense stream is past the branch since `prepare`.
        """
        self._replace(layer, self._tensors(rounded))
        self.pruned.forward_branch(layer, branch)
        loss = Mean(0.0, 0)
        for after, states, ids in zip(self._dense.hidden, self.pruned.hidden, self.pruned.batches, strict=True):
            weight_bT = token_weights(after, ids)
            error = weighted_error(after.float() - states.float(), weight_bT)
            loss = loss.merge(Mean(float(error), int(weight_bT.count_nonzero())))
        return loss

    @torch.no_grad()
    def _examples(self, layer: int, branch: Branch) -> Iterator[Examples]:
        """Yield each batch's examples, for a branch that has run in the dense stream only."""
        run = self.pruned.branch(layer, branch)
        entering, states = self.pruned.entering(layer, branch), self.pruned.hidden
        for entered, after, before, ids in zip(entering, self._dense.hidden, states, self.pruned.batches, strict=True):
            # A tensor of inference mode cannot be saved for a backward pass.
            inputs_bTD = run.normalise(entered.clone())
            yield Examples(inputs_bTD, after.float() - before.float(), token_weights(after, ids))

    def _begin(self, layer: int, branch: Branch) -> BranchState:
        """Return a branch of the pruned model before its training."""
        held = self.pruned.weights(layer)
        names = [f"{name}.{kind}" for name in (*branch.inputs, branch.output) for kind in ("weight", "bias")]
        weights = {name: to_numpy(held[name]) for name in names if name in held}
        zeros = {name: np.zeros_like(array) for name, array in weights.items()}
        return BranchState(weights, zeros, zeros, 0)

    def _optimiser(self, weights: dict[str, Tensor], state: BranchState) -> torch.optim.AdamW:
        """Return an optimiser of weights that continues from a state."""
        optimiser = torch.optim.AdamW(weights.values(), weight_decay=0.0)
        for key, moments in zip(ADAM, (state.means, state.squares), strict=True):
            for name, moment in self._tensors(moments).items():
                optimiser.state[weights[name]][key] = moment
        for weight in weights.values():
            optimiser.state[weight]["step"] = torch.tensor(float(state.steps))
        return optimiser


def token_weights(after_bTD: Tensor, ids_bT: Tensor) -> Tensor:
    """Return the weight of each token's squared error (b, T), in float32: one over the power of its dense states.

    Args:
        after_bTD: The dense stream's states after the branch.
        ids_bT: The token ids; padding has the weight 0.
    """
    weight_bT = 1 / (after_bTD.float().square().mean(dim=-1) + SMALLEST_POWER)
    mask_bT = token_mask(ids_bT, after_bTD.device)
    return weight_bT if mask_bT is None else weight_bT * mask_bT


def weighted_error(error_bTD: Tensor, weight_bT: Tensor) -> Tensor:
    """Return the squared error, averaged over D and summed over tokens by their weights."""
    return (weight_bT * error_bTD.square().mean(dim=-1)).sum()
