"""One forward pass of the dense model, and from its moments models of any method at any number of sparsities.

No barrier: while the shards observe a layer, solves of the layers before run wherever a processor is free.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from actors.pool import SolverPool, results
from orchestrator.inputs import Inputs
from orchestrator.pruning.run_context import Job, Target
from slimllm_ops.allocate.budget import Candidate
from slimllm_ops.allocate.form import Form
from slimllm_ops.allocate.layer_budget import Spent, layer_candidates, spend_on_layers_too
from slimllm_ops.allocate.layer_ratios import measure_layer, parameters_to_remove
from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.paths import LayerPaths
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.methods import METHODS, Method
from slimllm_ops.models.families import Branch, layer_shape
from slimllm_ops.module_solves import candidates_of
from slimllm_ops.stream.passes import PROBED_TOKENS, LayerStream

DENSE = "dense"


@dataclass(frozen=True)
class Ranked:
    """What a method can take, and the form to be met.

    Attributes:
        method: the method.
        candidates: every module, layer by layer, attention before the MLP.
        form: what is asked of the shapes.
        layers: every layer as a whole, where layers may go.
    """

    method: Method
    candidates: list[Candidate]
    form: Form
    layers: Sequence[Candidate] = ()

    def relative_change(self, layer: int) -> float | None:
        """Return what a layer adds to the states that leave it, relative to them, where it was measured."""
        if not self.layers:
            return None
        return self.layers[layer].output_variance / max(self.layers[layer].stream_power, 1e-300)

    def spend(self, target: int) -> Spent:
        """Return what goes, to remove so many parameters.

        Raises:
            InputError: the target is not reachable.
        """
        spend = partial(self.form.spend, self.method.spend)
        if not self.form.drop_layers:
            return Spent(tuple(spend(self.candidates, target)))
        return spend_on_layers_too(self.layers, self.candidates, target, spend)


def prune_one_pass(job: Job, targets: list[Target]) -> None:
    """Prune by `gram` to every target, from moments that are given or from one pass over the dense model."""
    prune_from_moments(job, observed_moments(job), METHODS[job.config.method], targets)


def prune_from_moments(job: Job, store: MomentStore, method: Method, targets: list[Target]) -> None:
    """Prune by a one-pass method to every target."""
    if all(len(target.pruned.log) == job.source.num_layers for target in targets):
        return
    ranked = job.survive(partial(rank_modules, job.pool, job.source, store, method, job.inputs.form))
    write_models(job, store, ranked, targets)


def observed_moments(job: Job) -> MomentStore:
    """Return the moments that the config names, or those of a pass that is made now."""
    if job.inputs.moments is not None:
        return MomentStore(job.inputs.moments, job.inputs.form.with_bias)
    store = MomentStore(job.staging.solved / "moments", job.inputs.form.with_bias)
    calibrate(job, store)
    return store


def calibrate(job: Job, store: MomentStore) -> None:
    """Pass the calibration data through the dense model once; keep every layer's moments and elimination paths."""
    num_saved = partial(store.num_saved, job.source.num_layers)
    if num_saved() < job.source.num_layers:
        job.survive(partial(_observe, job, store), num_saved)
    store.seal(moments_of(job.inputs))


def _observe(job: Job, store: MomentStore) -> None:
    shards, num_layers, tokens = job.shards, job.source.num_layers, job.inputs.calibration.num_tokens
    first = store.num_saved(num_layers)
    shards.open_stream(DENSE, job.source, job.inputs.calibration_blocks(), measures_change=job.inputs.form.drop_layers)
    for layer in job.reporter.layers("replaying", first, tokens):
        shards.forward_pruned(DENSE, layer, LayerPlan())
    solved = results(_observe_layers(job, range(first, num_layers)))
    for layer in job.reporter.layers("calibrating", num_layers, tokens, first):
        attention, mlp, attention_path, mlp_path, powers = next(solved)
        for observed in (attention, mlp):
            observed.require_tokens(tokens)
        store.save(layer, LayerPaths(attention_path, mlp_path, *powers), attention, mlp)
    shards.close_stream(DENSE)


def moments_of(inputs: Inputs) -> dict[str, Any]:
    """Return what identifies moments: the digests of the weights and of the calibration tokens."""
    return {
        "model": inputs.name,
        "model_digest": inputs.source_digest,
        "calibration": inputs.calibration.describe(),
        "drop_layers": inputs.form.drop_layers,
    }


def write_models(job: Job, store: MomentStore, ranked: Ranked, targets: list[Target]) -> None:
    """Decide and write every target's model, layer by layer; each layer's moments are read once for all of them."""
    logs = [target.pruned.log for target in targets]
    job.survive(partial(_write_models, job, store, ranked, targets), lambda: sum(map(len, logs)))


def _write_models(job: Job, store: MomentStore, ranked: Ranked, targets: list[Target]) -> None:
    asked = [target_parameters(job.source, target.sparsity) for target in targets]
    num_layers, first = job.source.num_layers, min(len(target.pruned.log) for target in targets)
    witness = _Witness(job.source)
    for target in targets:
        target.pruned.log.begin(*witness.start())
    decided = decide_layers(job.pool, job.source, store, ranked, asked, range(first, num_layers))
    for layer in job.reporter.layers("deciding", num_layers, job.inputs.calibration.num_tokens, first):
        for target, plan in zip(targets, next(decided), strict=True):
            # An earlier attempt may have ended between two targets.
            if len(target.pruned.log) == layer:
                state_TD = witness.forward(target.pruned.log.last_state(), layer, plan)
                target.pruned.commit(plan, state_TD)
                job.log_layer(target.run, layer, plan)
    witness.close()


class _Witness:
    """Passes a few tokens through pruned layers as decided, for the read-back of what was written.

    No shard does so, since the moments are of the dense model. One layer's weights serve all targets.
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
        """Return what a layer, as a plan leaves it, makes of states (T, D)."""
        self._stream.hidden = [torch.from_numpy(state_TD)[None]]
        self._stream.forward_pruned(layer, plan)
        return self._stream.hidden[0][0].numpy()

    def close(self) -> None:
        """Give its memory back."""
        self._stream.close()


def _observe_layers(job: Job, layers: range) -> Iterator[tuple[Any, ...]]:
    """Send layers' observations and solves on their way; yield references to what will come of them."""
    source, shards, pool = job.source, job.shards, job.pool
    attention, mlp = source.family.attention, source.family.mlp
    for layer in layers:
        shape = layer_shape(source.config, layer)
        attention_ref, _ = shards.observe_dense(DENSE, layer, attention)
        attention_path = pool.eliminate(layer, attention, attention_ref, shape.num_attention_units)
        mlp_ref, powers = shards.observe_dense(DENSE, layer, mlp)
        mlp_path = pool.eliminate(layer, mlp, mlp_ref, shape.intermediate_size)
        yield attention_ref, mlp_ref, attention_path, mlp_path, powers


def rank_modules(pool: SolverPool, source: Checkpoint, store: MomentStore, method: Method, form: Form) -> Ranked:
    """Rank every module's units by a method; gram's ranking, where biases recover, was kept with the moments."""
    paths = [store.load_paths(layer) for layer in range(source.num_layers)]
    if method.rank is METHODS["gram"].rank and form.with_bias:
        rankings = [[path.attention.ranking, path.mlp.ranking] for path in paths]
    else:
        rankings = list(results(_submit_rankings(pool, source, store, method, form)))
    sizes = [measure_layer(source, layer, form.with_bias) for layer in range(source.num_layers)]
    layers = layer_candidates(sizes, paths) if form.drop_layers else ()
    return Ranked(method, candidates_of(sizes, paths, rankings), form, layers)


def decide_layers(
    pool: SolverPool,
    source: Checkpoint,
    store: MomentStore,
    ranked: Ranked,
    targets: Sequence[int],
    layers: range,
) -> Iterator[list[LayerPlan]]:
    """Yield, for each of the layers, its plan at each target of removed parameters."""
    spent = [ranked.spend(target) for target in targets]
    decided = results(_submit_decisions(pool, source, store, ranked, spent, layers))
    for layer, (attention, mlp) in zip(layers, decided, strict=True):
        change = ranked.relative_change(layer)
        yield [
            LayerPlan(attention=heads, mlp=channels, relative_change=change, dropped=layer in one.dropped)
            for heads, channels, one in zip(attention, mlp, spent, strict=True)
        ]


def target_parameters(source: Checkpoint, sparsity: float | None) -> int:
    """Return how many parameters a sparsity removes from the decoder layers."""
    assert sparsity is not None, "a config with a ratio is refused for one-pass methods"
    return parameters_to_remove([measure_layer(source, layer) for layer in range(source.num_layers)], sparsity)


def _submit_rankings(
    pool: SolverPool, source: Checkpoint, store: MomentStore, method: Method, form: Form
) -> Iterator[tuple[ray.ObjectRef, ...]]:
    for layer in range(source.num_layers):
        shape = layer_shape(source.config, layer)
        units = (shape.num_attention_units, shape.intermediate_size)
        yield tuple(
            pool.rank(layer, branch, ray.put(store.load_moments(layer, module)), num_units, method)
            for (module, branch), num_units in zip(_branches(source), units, strict=True)
        )


def _submit_decisions(
    pool: SolverPool,
    source: Checkpoint,
    store: MomentStore,
    ranked: Ranked,
    spent: Sequence[Spent],
    layers: range,
) -> Iterator[tuple[ray.ObjectRef, ...]]:
    for layer in layers:
        yield tuple(
            pool.decide(
                layer,
                branch,
                ray.put(store.load_moments(layer, module)),
                ranked.method,
                ranked.candidates[2 * layer + number].ranking,
                [one.units[2 * layer + number] for one in spent],
            )
            for number, (module, branch) in enumerate(_branches(source))
        )


def _branches(source: Checkpoint) -> tuple[tuple[str, Branch], tuple[str, Branch]]:
    return ("attention", source.family.attention), ("mlp", source.family.mlp)
