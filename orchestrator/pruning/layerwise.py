"""The paper's order: layer by layer, attention first. Each module sees the output of the pruned ones before it.

prune_layerwise
measure_similarities     one pass of the dense model
allocate                 each layer's heads and channels, from similarities
_prune_model             one pass for each target; for each layer:
_prune_attention         observe moments of X, decide where they were merged, apply on every shard
_prune_mlp               observe the output, choose channels, compare their output with it, apply the line
_prune_experts           as attention
"""

from dataclasses import replace

from orchestrator.pruning.run_context import RunContext
from orchestrator.pruning.targets import Target
from slimllm_ops.allocate.layer_ratios import (
    Budget,
    LayerBudget,
    budget_by_ratio,
    budget_by_sparsity,
    prunable,
    published_settings,
)
from slimllm_ops.allocate.layer_size import measure_layer
from slimllm_ops.decide.paper import choose_channels_by_output, decide_experts, decide_heads, recover_output
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.moments.observation import require_tokens
from slimllm_ops.stream.outputs import LayerwiseStream
from slimllm_ops.stream.passes import LayerStream

DENSE, PRUNED = "dense", "pruned"


def prune_layerwise(context: RunContext, targets: list[Target]) -> None:
    """Prune by the paper's method: one pass measures similarities, then one pass prunes each target."""
    similarities = context.staging.results.once("similarities", lambda: measure_similarities(context))
    for target in targets:
        budget = allocate(context, similarities, target.sparsity)
        if budget.note:
            context.reporter.note(budget.note)
        if len(target.pruned.log) < context.source.num_layers:
            _prune_model(context, target, similarities, budget)


def measure_similarities(context: RunContext) -> list[float]:
    """Return s_l of every layer: the mean cosine between its input and its output in the dense model."""
    shards, num_layers = context.shards, context.source.num_layers
    for attempt in context.attempts():
        with attempt:
            shards.open_stream(DENSE, context.source, context.inputs.calibration_blocks())
            layers = context.reporter.layers("layer similarities", num_layers, context.inputs.calibration.num_tokens)
            similarities = [shards.mean(DENSE, LayerStream.forward, layer) for layer in layers]
            shards.close_stream(DENSE)
    return similarities


def allocate(context: RunContext, similarities: list[float], sparsity: float | None) -> Budget:
    """Return what each layer removes to reach a sparsity, or by the paper's ratio if the sparsity is None."""
    config, form, num_layers = context.config, context.inputs.form, context.source.num_layers
    sizes = form.sizes([measure_layer(context.source, layer, form.with_bias) for layer in range(num_layers)])
    if form.uniform:
        similarities = similarities[:1]
    # The paper's published settings fill in the settings that the config leaves out.
    num_pruned, alpha = published_settings(sparsity or config.ratio or 0.0, num_layers)
    num_pruned = min(config.pruned_layers or num_pruned, len(prunable(sizes)))
    alpha = alpha if config.alpha is None else config.alpha
    if sparsity is not None:
        budget = budget_by_sparsity(sizes, similarities, sparsity=sparsity, num_pruned=num_pruned, alpha=alpha)
    else:
        assert config.ratio is not None
        budget = budget_by_ratio(sizes, similarities, ratio=config.ratio, num_pruned=num_pruned, alpha=alpha)
    return replace(budget, layers=form.layers(budget.layers, num_layers))


def _prune_model(context: RunContext, target: Target, similarities: list[float], budget: Budget) -> None:
    """Pass through the layers once; decide, apply and commit each."""
    shards, tokens, log = context.shards, context.inputs.calibration.num_tokens, target.pruned.log
    for attempt in context.attempts(log.__len__):
        with attempt:
            blocks, intercept = context.inputs.calibration_blocks(), context.inputs.form.with_bias
            shards.open_layerwise(PRUNED, context.source, blocks, intercept=intercept)
            log.begin(shards.first(PRUNED, LayerStream.probed_ids), shards.first(PRUNED, LayerStream.probe))
            for layer in context.reporter.layers("replaying", len(log), tokens):
                shards.each(PRUNED, LayerwiseStream.forward_pruned, layer, log.plans[layer])
            for layer in context.reporter.layers("pruning", context.source.num_layers, tokens, first=len(log)):
                attention, mlp = _prune_layer(context, layer, budget.layers[layer])
                plan = LayerPlan(attention, mlp, similarities[layer], budget.layers[layer].ratio)
                target.pruned.commit(plan, shards.first(PRUNED, LayerStream.probe))
                context.log_layer(target.run, layer, plan)
            shards.close_stream(PRUNED)


def _prune_layer(context: RunContext, layer: int, share: LayerBudget) -> tuple[Decision | None, Decision | None]:
    """Observe, decide and apply a layer's attention, then its MLP; a module that stays whole has no decision."""
    if not share.units and not share.channels:
        context.shards.each(PRUNED, LayerStream.forward_pruned, layer, LayerPlan())
        return None, None
    prune_mlp = _prune_experts if context.source.family.mlp.has_experts else _prune_mlp
    return _prune_attention(context, layer, share.units), prune_mlp(context, layer, share.channels)


def _prune_attention(context: RunContext, layer: int, num_removed: int) -> Decision | None:
    shards, branch, heads = context.shards, context.source.family.attention, None
    observed = shards.merge(PRUNED, LayerStream.observe, layer, branch)
    if num_removed:
        heads = shards.get(shards.decide(PRUNED, decide_heads, observed, layer, num_removed=num_removed))
    shards.each(PRUNED, LayerStream.apply, layer, branch, heads)
    return heads


def _prune_mlp(context: RunContext, layer: int, num_removed: int) -> Decision | None:
    shards, branch = context.shards, context.source.family.mlp
    if not num_removed:
        shards.each(PRUNED, LayerStream.forward_branch, layer, branch)
        return None
    observed = shards.merge(PRUNED, LayerwiseStream.observe_output, layer)
    keep_lowest = context.config.keep_lowest
    choice = shards.decide(
        PRUNED, choose_channels_by_output, observed, layer, num_removed=num_removed, keep_lowest=keep_lowest
    )
    chosen = shards.get(choice)
    pairs = shards.get(shards.merge(PRUNED, LayerwiseStream.compare_outputs, layer, chosen.kept))
    require_tokens(pairs, context.inputs.calibration.num_tokens, f"layer {layer}, {branch.described}")
    channels = recover_output(pairs, chosen)
    shards.each(PRUNED, LayerwiseStream.add_recovered, layer, channels)
    return channels


def _prune_experts(context: RunContext, layer: int, num_removed: int) -> Decision | None:
    shards, branch, channels = context.shards, context.source.family.mlp, None
    observed = shards.merge(PRUNED, LayerStream.observe, layer, branch)
    if num_removed:
        keep_lowest = context.config.keep_lowest
        decision = shards.decide(
            PRUNED, decide_experts, observed, layer, num_removed=num_removed, keep_lowest=keep_lowest
        )
        channels = shards.get(decision)
    shards.each(PRUNED, LayerStream.apply, layer, branch, channels)
    return channels
