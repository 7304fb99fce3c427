"""The paper's order: layer by layer, attention first, each module seeing what the pruned ones before it leave."""

from dataclasses import replace
from functools import partial

from orchestrator.pruning.run_context import Job, Target
from slimllm_ops.allocate.layer_ratios import (
    Budget,
    LayerBudget,
    budget_by_ratio,
    budget_by_sparsity,
    measure_layer,
    published_settings,
)
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.models.families import Branch

DENSE, PRUNED = "dense", "pruned"


def prune_layerwise(job: Job, targets: list[Target]) -> None:
    """Prune by the paper's method, a pass over the layers for each target after one that measures similarities."""
    measure = partial(job.survive, partial(measure_similarities, job))
    similarities = job.staging.results.once("similarities", measure)
    for target in targets:
        budget = allocate(job, similarities, target.sparsity)
        if budget.note:
            job.reporter.note(budget.note)
        log = target.pruned.log
        if len(log) < job.source.num_layers:
            job.survive(partial(_prune_model, job, target, similarities, budget), log.__len__)


def measure_similarities(job: Job) -> list[float]:
    """Return s_l, the mean cosine between the input and the output of every layer of the dense model."""
    job.shards.open_stream(DENSE, job.source, job.inputs.calibration_blocks())
    layers = job.reporter.layers("layer similarities", job.source.num_layers, job.inputs.calibration.num_tokens)
    similarities = [job.shards.forward(DENSE, layer) for layer in layers]
    job.shards.close_stream(DENSE)
    return similarities


def allocate(job: Job, similarities: list[float], sparsity: float | None) -> Budget:
    """Return what every layer gives, to meet a sparsity or, where that is None, by the paper's own ratio."""
    config, form, num_layers = job.config, job.inputs.form, job.source.num_layers
    sizes = form.sizes([measure_layer(job.source, layer, form.with_bias) for layer in range(num_layers)])
    if form.uniform:
        similarities = similarities[:1]
    # With the paper's own ratio, its published settings stand in for what was not given.
    num_pruned, alpha = published_settings(sparsity or config.ratio or 0.0, num_layers)
    num_pruned = min(config.pruned_layers or num_pruned, len(sizes))
    alpha = alpha if config.alpha is None else config.alpha
    if sparsity is not None:
        budget = budget_by_sparsity(sizes, similarities, sparsity=sparsity, num_pruned=num_pruned, alpha=alpha)
    else:
        assert config.ratio is not None
        budget = budget_by_ratio(sizes, similarities, ratio=config.ratio, num_pruned=num_pruned, alpha=alpha)
    return replace(budget, layers=form.layers(budget.layers, num_layers))


def _prune_model(job: Job, target: Target, similarities: list[float], budget: Budget) -> None:
    shards, tokens, committed = job.shards, job.inputs.calibration.num_tokens, target.pruned.log.plans
    intercept = job.inputs.form.with_bias
    shards.open_stream(PRUNED, job.source, job.inputs.calibration_blocks(), deciding=True, intercept=intercept)
    target.pruned.log.begin(shards.probed_ids(PRUNED), shards.probe(PRUNED))
    for layer in job.reporter.layers("replaying", len(committed), tokens):
        shards.forward_pruned(PRUNED, layer, committed[layer])
    for layer in job.reporter.layers("pruning", job.source.num_layers, tokens, first=len(committed)):
        attention, mlp = _prune_layer(job, layer, budget.layers[layer])
        plan = LayerPlan(attention, mlp, similarities[layer], budget.layers[layer].ratio)
        target.pruned.commit(plan, shards.probe(PRUNED))
        job.log_layer(target.run, layer, plan)
    shards.close_stream(PRUNED)


def _prune_layer(job: Job, layer: int, share: LayerBudget) -> tuple[Decision | None, Decision | None]:
    """Observe, decide and apply a layer's attention, then its MLP; None where a module stays whole."""
    if not share.units and not share.channels:
        job.shards.forward_pruned(PRUNED, layer, LayerPlan())
        return None, None
    attention = _prune_attention(job, job.source.family.attention, layer, share.units)
    return attention, _prune_mlp(job, job.source.family.mlp, layer, share.channels)


def _prune_attention(job: Job, branch: Branch, layer: int, num_removed: int) -> Decision | None:
    observed = job.shards.observe(PRUNED, layer, branch)
    heads = None
    if num_removed:
        heads = job.shards.decide_heads(PRUNED, layer, observed, num_removed=num_removed)
    job.shards.apply(PRUNED, layer, branch, heads)
    return heads


def _prune_mlp(job: Job, branch: Branch, layer: int, num_removed: int) -> Decision | None:
    observed = job.shards.observe(PRUNED, layer, branch)
    channels = None
    if num_removed:
        settings = {"keep_lowest": job.config.keep_lowest}
        channels = job.shards.decide_channels(PRUNED, layer, observed, num_removed=num_removed, **settings)
    job.shards.apply(PRUNED, layer, branch, channels)
    return channels
