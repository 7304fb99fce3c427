"""Prunes from the moments of the dense model: by any one-pass method, to any number of sparsities.

prune_one_pass
observed_moments         from a MomentStore, or from a pass now (calibrate.py)
rank_modules             the order in which the method removes units
write_models             spends the budget; decides, writes and commits each layer for every target
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from actors.pool import SolverPool, in_flight
from actors.workers import Reference
from orchestrator.pruning.calibrate import calibrate
from orchestrator.pruning.run_context import RunContext
from orchestrator.pruning.targets import Target
from slimllm_ops.allocate.budget import Candidate
from slimllm_ops.allocate.candidates import module_candidates
from slimllm_ops.allocate.form import Form
from slimllm_ops.allocate.layer_budget import Spent, layer_candidates, spend_on_layers_too
from slimllm_ops.allocate.layer_size import LayerSize, measure_layer, parameters_to_remove
from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.paths import LayerPaths
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.methods import METHODS, Method
from slimllm_ops.models.families import layer_shape
from slimllm_ops.models.pair import MODULES, Pair
from slimllm_ops.module_solves import decide_module, rank_module
from slimllm_ops.moments.ranking import Ranking
from slimllm_ops.stream.passes import PROBED_TOKENS, LayerStream


@dataclass(frozen=True)
class Ranked:
    """A method's rankings of all modules, and the form of the model.

    Attributes:
        method: The method.
        candidates: The units that each module can remove.
        form: The form.
        layers: All layers as candidates, if layers may be dropped; else empty.
    """

    method: Method
    candidates: list[Pair[Candidate]]
    form: Form
    layers: Sequence[Candidate] = ()

    def relative_change(self, layer: int) -> float | None:
        """Return E|h_out - h_in|^2 / E|h_out|^2 of a layer; None if it was not measured."""
        if not self.layers:
            return None
        return self.layers[layer].output_variance / max(self.layers[layer].stream_power, 1e-300)

    def spend(self, target: int) -> Spent:
        """Return the units and layers to remove for a number of parameters.

        Raises:
            InputError: The target is not reachable.
        """
        spend = partial(self.form.spend, self.method.spend)
        if not self.form.drop_layers:
            return Spent(tuple(spend(self.candidates, target)))
        return spend_on_layers_too(self.layers, self.candidates, target, spend)


def prune_one_pass(method: Method, context: RunContext, targets: list[Target]) -> None:
    """Prune by a one-pass method to every target, from kept moments or from one pass over the dense model."""
    prune_from_moments(context, observed_moments(context), method, targets)


def prune_from_moments(context: RunContext, store: MomentStore, method: Method, targets: list[Target]) -> None:
    """Prune by a one-pass method to every target."""
    if all(len(target.pruned.log) == context.source.num_layers for target in targets):
        return
    write_models(context, store, rank_modules(context, store, method), targets)


def observed_moments(context: RunContext) -> MomentStore:
    """Return the moments that the config names, or make a pass now."""
    intercept = context.inputs.form.with_bias
    if context.inputs.moments is not None:
        return MomentStore(context.inputs.moments, intercept)
    store = MomentStore(context.staging.solved / "moments", intercept)
    calibrate(context, store)
    return store


def rank_modules(context: RunContext, store: MomentStore, method: Method) -> Ranked:
    """Rank each module's units by a method; the moments' store has gram's ranking with an intercept already."""
    source, form = context.source, context.inputs.form
    paths = [store.load_paths(layer) for layer in range(source.num_layers)]
    if method.rank is METHODS["gram"].rank and form.with_bias:
        rankings = [Pair(path.attention.ranking, path.mlp.ranking) for path in paths]
    else:
        for attempt in context.attempts():
            with attempt:
                submitted = in_flight(_submit_rankings(context.pool, source, store, method))
                rankings = [pair.map(context.pool.get) for pair in submitted]
    sizes = form.limited([measure_layer(source, layer, form.with_bias) for layer in range(source.num_layers)])
    return Ranked(
        method, module_candidates(sizes, paths, rankings), form, _droppable_layers(context, store, sizes, paths)
    )


def _droppable_layers(
    context: RunContext, store: MomentStore, sizes: Sequence[LayerSize], paths: Sequence[LayerPaths]
) -> Sequence[Candidate]:
    """Return the layers as candidates, if layers may be dropped."""
    if not context.inputs.form.drop_layers:
        return ()
    return layer_candidates(sizes, paths, map(store.load_sensitivity, range(len(sizes))))


def _submit_rankings(
    pool: SolverPool, source: Checkpoint, store: MomentStore, method: Method
) -> Iterator[Pair[Reference[Ranking]]]:
    for layer in range(source.num_layers):
        shape = layer_shape(source.config, layer)
        units = Pair(shape.num_attention_units, shape.intermediate_size)
        fishers = store.load_sensitivity(layer).modules
        yield Pair(
            *(
                pool.submit(
                    rank_module,
                    layer,
                    branch,
                    pool.put(store.load_moments(layer, module)),
                    num_units,
                    fisher_DD,
                    method,
                )
                for module, branch, num_units, fisher_DD in zip(
                    MODULES, source.family.branches, units, fishers, strict=True
                )
            )
        )


def write_models(context: RunContext, store: MomentStore, ranked: Ranked, targets: list[Target]) -> None:
    """Decide and write every target's model, layer by layer; read each layer's moments once for all of them."""
    source, logs = context.source, [target.pruned.log for target in targets]
    spent = [ranked.spend(target_parameters(source, target.sparsity)) for target in targets]
    for attempt in context.attempts(lambda: sum(map(len, logs))):
        with attempt:
            first, witness = min(map(len, logs)), _Witness(source)
            for log in logs:
                log.begin(*witness.start())
            plans = _decide_layers(context.pool, source, store, ranked, spent, range(first, source.num_layers))
            tokens = context.inputs.calibration.num_tokens
            for layer in context.reporter.layers("deciding", source.num_layers, tokens, first):
                for target, plan in zip(targets, next(plans), strict=True):
                    # An earlier attempt can end between two targets.
                    if len(target.pruned.log) == layer:
                        target.pruned.commit(plan, witness.forward(target.pruned.log.last_state(), layer, plan))
                        context.log_layer(target.run, layer, plan)
            witness.close()


def _decide_layers(
    pool: SolverPool, source: Checkpoint, store: MomentStore, ranked: Ranked, spent: Sequence[Spent], layers: range
) -> Iterator[list[LayerPlan]]:
    """Yield each layer's plan for every target."""
    submitted = in_flight(_submit_decisions(pool, source, store, ranked, spent, layers))
    for layer, pair in zip(layers, submitted, strict=True):
        decided, change = pair.map(pool.get), ranked.relative_change(layer)
        yield [
            LayerPlan(attention=heads, mlp=channels, relative_change=change, dropped=layer in one.dropped)
            for heads, channels, one in zip(*decided, spent, strict=True)
        ]


def _submit_decisions(
    pool: SolverPool, source: Checkpoint, store: MomentStore, ranked: Ranked, spent: Sequence[Spent], layers: range
) -> Iterator[Pair[Reference[list[Decision | None]]]]:
    for layer in layers:
        removals = Pair([one.units[layer].attention for one in spent], [one.units[layer].mlp for one in spent])
        candidates = ranked.candidates[layer]
        yield Pair(
            *(
                pool.submit(
                    decide_module,
                    layer,
                    branch,
                    # Read one layer at a time, so that memory does not grow with depth.
                    pool.put(store.load_moments(layer, module)),
                    ranked.method,
                    candidate.ranking,
                    counts,
                )
                for module, branch, candidate, counts in zip(
                    MODULES, source.family.branches, candidates, removals, strict=True
                )
            )
        )


def target_parameters(source: Checkpoint, sparsity: float | None) -> int:
    """Return how many parameters a sparsity removes from the decoder layers."""
    assert sparsity is not None, "a config with a ratio is refused for one-pass methods"
    return parameters_to_remove([measure_layer(source, layer) for layer in range(source.num_layers)], sparsity)


class _Witness:
    """A few tokens that pass through the pruned layers, so that the read-back of the checkpoint can compare.

    The shards pass through the dense model only. All targets use one copy of a layer's weights.
    """

    def __init__(self, source: Checkpoint) -> None:
        num_tokens = min(PROBED_TOKENS, source.config.max_position_embeddings)
        generator = torch.Generator().manual_seed(0)
        self._ids_1T = torch.randint(source.config.vocab_size, (1, num_tokens), generator=generator)
        self._stream = LayerStream(source, [self._ids_1T], torch.device("cpu"))

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens' ids (T,), and their states (T, D) before the first layer."""
        return self._ids_1T[0].numpy(), self._stream.hidden[0][0].numpy()

    def forward(self, state_TD: np.ndarray, layer: int, plan: LayerPlan) -> np.ndarray:
        """Return the states (T, D) after a layer pruned by a plan."""
        self._stream.hidden = [torch.from_numpy(state_TD)[None]]
        self._stream.forward_pruned(layer, plan)
        return self._stream.hidden[0][0].numpy()

    def close(self) -> None:
        """Free its memory."""
        self._stream.close()
