"""Runs hidden states through a model one layer at a time, with only that layer's weights in memory.

Each branch runs once per layer and batch (`slimllm_ops.stream.branches`), whether it is observed, pruned or both.

Shapes: b blocks in a batch, T tokens in a block, D hidden size, P inputs of an output projection, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.models.families import Branch, Family, LayerShape, layer_shape
from slimllm_ops.moments.observation import Observed
from slimllm_ops.moments.states import States, StateStore
from slimllm_ops.moments.sums import DensePass, Mean
from slimllm_ops.stream.branches import Held, LayerBranch, layer_branch
from slimllm_ops.stream.padding import PADDING, filled, token_mask, without_padding
from slimllm_ops.stream.weights import ModelWeights

# Logits are computed for this many tokens at once: 0.5 GB in float32 for a vocabulary of 128k.
LOGIT_TOKENS = 1024
# Read-back compares the states of this many first tokens; attention is causal, so they depend on no later ones.
PROBED_TOKENS = 64


class Summed(Protocol):
    """Sums over tokens that can be checked."""

    def is_finite(self) -> bool:
        """Return whether the sums are free of NaN and infinity."""


Seen = TypeVar("Seen", bound=Summed)


class LayerStream:
    """The hidden states of batches of token blocks, on their way through a checkpoint.

    Args:
        checkpoint: The model.
        batches: Token ids, each (b, T), int64; padding stands at the end of a block, as `PADDING`.
        device: Where the layers run, in float32 on a CPU and in bfloat16 on a GPU.
        store: Returns an empty store for the batches' states; by default a list, in the device's memory.
        measures_change: Whether to keep the states that enter a layer, to measure what the layer changes.
        intercept: Whether recovery from the moments that `observe` returns may fit an intercept.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: list[Tensor],
        device: torch.device,
        store: StateStore = list,
        *,
        measures_change: bool = False,
        intercept: bool = True,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.batches = batches
        self._masks = [token_mask(ids, device) for ids in batches]
        self.store = store
        self._measures_change = measures_change
        self._intercept = intercept
        self._parallel = checkpoint.family.is_parallel(checkpoint.config)
        self._weights = ModelWeights(checkpoint, device)
        self._branch_inputs: Held[Any] = store()
        self._entered: tuple[int, States] | None = None
        self.hidden = self._held(self._weights.embed([filled(ids) for ids in batches]))

    @property
    def family(self) -> Family:
        """The checkpoint's model family."""
        return self.checkpoint.family

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that layers compute in."""
        return self._weights.dtype

    def shape(self, layer: int) -> LayerShape:
        """Return the shape of a layer's branches."""
        return layer_shape(self.checkpoint.config, layer)

    def weights(self, layer: int) -> dict[str, Tensor]:
        """Return a layer's tensors by their names in the layer, in the dtype that it computes in."""
        return dict(self._weights.load(layer).state_dict())

    def branch(self, layer: int, branch: Branch) -> LayerBranch[Any]:
        """Return a branch of a layer, ready to run."""
        return layer_branch(self._weights, layer, branch)

    @torch.inference_mode()
    def forward(self, layer: int) -> Mean:
        """Run a whole layer; return the cosine similarity of its input and output, summed over tokens."""
        module, call = self._weights.load(layer), self._weights.call(layer)
        total, count = 0.0, 0
        for index, before in enumerate(self.hidden):
            after = module(before, **call)
            one, other = (self.tokens(index, states).float() for states in (before, after))
            total += float(functional.cosine_similarity(one, other, dim=-1).double().sum())
            count += one.shape[0] * one.shape[1]
            self.hidden[index] = after
        if not _finite(total):
            self.raise_non_finite(layer, "output")
        return Mean(total, count)

    @torch.inference_mode()
    def observe(self, layer: int, branch: Branch) -> Observed:
        """Run a branch up to its output projection, keep the result until `apply`, and return its moments."""
        run = self.branch(layer, branch)
        seen, self._branch_inputs = run.begin_sum(), run.begin_states(self.store)
        for index, (normalised, x_bTP) in enumerate(self._run(layer, branch, run)):
            seen.add(self._tokens_of(run, index, x_bTP), self.tokens(index, normalised))
            self._branch_inputs.append(x_bTP)
        return self.require_finite(seen.packed(), layer, branch).with_intercept(self._intercept)

    @torch.inference_mode()
    def observe_dense(self, layer: int, branch: Branch) -> DensePass:
        """Run a dense branch; return its moments, and the norms of the resulting states.

        These moments allow an intercept, whatever they are used for later. Only the residual stream is held, and the
        layer's input if its change is measured.
        """
        run = self.branch(layer, branch)
        seen, power, change = run.begin_sum(), Mean(0.0, 0), Mean(0.0, 0)
        before = self._entered_by(layer) if self._measures_change else None
        project = run.projected(None)
        for index, (normalised, x_bTP) in enumerate(self._run(layer, branch, run)):
            seen.add(self._tokens_of(run, index, x_bTP), self.tokens(index, normalised))
            power = power.merge(self._add(index, run.contribution(project(x_bTP))))
            if before is not None:
                change = change.merge(summed_power(self.tokens(index, self.hidden[index] - before[index])))
        observed = self.require_finite(seen.packed(), layer, branch)
        return DensePass(observed, power, None if before is None else change)

    @torch.inference_mode()
    def forward_pruned(self, layer: int, plan: LayerPlan) -> None:
        """Run a layer as a plan prunes it, without observing it."""
        if plan.dropped:
            return
        for branch, decision in ((self.family.attention, plan.attention), (self.family.mlp, plan.mlp)):
            self.forward_branch(layer, branch, decision)

    @torch.inference_mode()
    def forward_branch(self, layer: int, branch: Branch, decision: Decision | None = None) -> None:
        """Run a branch as a decision prunes it, or as it is, without observing it."""
        run = self.branch(layer, branch)
        project = run.projected(decision)
        for index, (_, x_bTP) in enumerate(self._run(layer, branch, run)):
            self._add(index, run.contribution(project(x_bTP)))

    @torch.inference_mode()
    def apply(self, layer: int, branch: Branch, decision: Decision | None) -> Mean:
        """Add the observed branch's output to the residual stream, pruned if there is a decision.

        Returns:
            The squared norm of the resulting states, summed over tokens.
        """
        run, power = self.branch(layer, branch), Mean(0.0, 0)
        project = run.projected(decision)
        for index, x_bTP in enumerate(self._branch_inputs):
            power = power.merge(self._add(index, run.contribution(project(x_bTP))))
        self._branch_inputs = self.store()
        return power

    def entering(self, layer: int, branch: Branch) -> States:
        """Return the states that a branch of the current layer reads.

        These are the residual stream's states, except in the MLP of a parallel layer, which reads what the attention
        reads. A parallel layer's input is saved when this is first called for the layer.
        """
        return self._entered_by(layer) if self._parallel else self.hidden

    @torch.inference_mode()
    def negative_log_likelihood(self) -> Mean:
        """Return the negative log-likelihood of the next tokens, after the last layer has run."""
        total, count = 0.0, 0
        with self._weights.head():
            for hidden, ids in zip(self.hidden, self.batches, strict=True):
                for states_bTD, targets_bT in spans(hidden[:, :-1], ids[:, 1:].to(self.device)):
                    logits_NV = self._weights.logits(states_bTD).flatten(0, 1).float()
                    targets_N = targets_bT.flatten()
                    lost = functional.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=PADDING)
                    total += float(lost.double())
                    count += int((targets_N != PADDING).sum())
        return Mean(total, count)

    def probe(self) -> np.ndarray:
        """Return the states (T', D) of the first tokens of the first block, in float32."""
        return self.hidden[0][0, : len(self.probed_ids())].float().cpu().numpy()

    def probed_ids(self) -> np.ndarray:
        """Return the ids (T',) of the tokens whose states `probe` returns."""
        ids_T = self.batches[0][0, :PROBED_TOKENS]
        return ids_T[ids_T != PADDING].numpy()

    def tokens(self, index: int, states_bT: Tensor) -> Tensor:
        """Return a batch's states (b, T, ...) without those of padding, which are in no sum."""
        mask_bT = self._masks[index]
        return states_bT if mask_bT is None else without_padding(states_bT, mask_bT)

    def close(self) -> None:
        """Free all memory now."""
        self._weights.close()
        self.hidden, self._branch_inputs, self._entered = [], [], None

    def require_finite(self, observed: Seen, layer: int, branch: Branch) -> Seen:
        """Return an observation, after checking that it is free of NaN and infinity.

        Raises:
            NonFiniteError: It is not; the message names the layer and module.
        """
        if not observed.is_finite():
            self.raise_non_finite(layer, branch.described)
        return observed

    def _run(self, layer: int, branch: Branch, run: LayerBranch[Any]) -> Iterator[tuple[Tensor, Any]]:
        """Run a branch up to its output projection; yield its input (b, T, D), and X (b, T, P) or `Routed`."""
        for hidden in self.entering(layer, branch):
            normalised = run.normalise(hidden)
            yield normalised, run.run(normalised)

    def _tokens_of(self, run: LayerBranch[Any], index: int, x_bTP: Any) -> Any:
        """Return X or `Routed` of a batch without padding."""
        mask_bT = self._masks[index]
        return x_bTP if mask_bT is None else run.without_padding(x_bTP, mask_bT)

    def _add(self, index: int, added: Tensor) -> Mean:
        """Add a branch's contribution to a batch's states; return their new squared norm, summed over tokens."""
        hidden = self.hidden[index] + added
        self.hidden[index] = hidden
        return summed_power(self.tokens(index, hidden))

    def _entered_by(self, layer: int) -> States:
        """Return the states that entered a layer, saved on the first call for that layer."""
        if self._entered is None or self._entered[0] != layer:
            self._entered = (layer, self._held(iter(self.hidden)))
        return self._entered[1]

    @torch.inference_mode()
    def _held(self, batches: Iterator[Tensor]) -> States:
        """Return a store that holds the batches' states."""
        states = self.store()
        for batch in batches:
            states.append(batch)
        return states

    def raise_non_finite(self, layer: int, part: str) -> None:
        """Refuse activations of a part of a layer.

        Raises:
            NonFiniteError: Always.
        """
        raise NonFiniteError(
            f"layer {layer}: the activations of {part} hold NaN or infinity: "
            f"the weights of {self.checkpoint.directory} overflow {self.dtype}, or are damaged"
        )


def spans(states_BTD: Tensor, targets_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split states and targets into parts of at most `LOGIT_TOKENS` tokens."""
    blocks = max(1, LOGIT_TOKENS // states_BTD.shape[1])
    for states_bTD, targets_bT in zip(states_BTD.split(blocks), targets_BT.split(blocks), strict=True):
        yield from zip(states_bTD.split(LOGIT_TOKENS, dim=1), targets_bT.split(LOGIT_TOKENS, dim=1), strict=True)


def _power(states: Tensor) -> float:
    """Return the squared norm of states (..., D), summed over tokens."""
    return float(states.float().square().sum(dim=-1).double().sum())


def summed_power(states_bTD: Tensor) -> Mean:
    """Return the squared norm of a batch's states, summed over tokens."""
    return Mean(_power(states_bTD), states_bTD.shape[0] * states_bTD.shape[1])


def _finite(value: float) -> bool:
    return value - value == 0
