"""The paper's order: layer by layer, attention first, each module seeing what the pruned ones before it leave."""

from actors import ShardGroup
from orchestrator.config import PruneConfig
from slimllm_ops.allocation import (
    Budget,
    LayerBudget,
    budget_by_ratio,
    budget_by_sparsity,
    measure_layer,
    published_settings,
)
from slimllm_ops.checkpoint import Checkpoint
from slimllm_ops.families import Branch
from slimllm_ops.plan import Decision

PRUNED = "pruned"


def allocate(config: PruneConfig, source: Checkpoint, similarities: list[float]) -> Budget:
    """Return what every layer gives, by the paper's own knobs or to meet a sparsity."""
    sizes = [measure_layer(source, layer) for layer in range(source.num_layers)]
    sparsity = config.target_sparsity
    # With the paper's own ratio, its settings at 20 % stand in for what was not given.
    num_pruned, alpha = published_settings(sparsity or config.ratio or 0.0, source.num_layers)
    num_pruned = min(config.pruned_layers or num_pruned, source.num_layers)
    alpha = alpha if config.alpha is None else config.alpha
    if sparsity is not None:
        return budget_by_sparsity(sizes, similarities, sparsity=sparsity, num_pruned=num_pruned, alpha=alpha)
    assert config.ratio is not None
    return budget_by_ratio(sizes, similarities, ratio=config.ratio, num_pruned=num_pruned, alpha=alpha)


def prune_layer(
    shards: ShardGroup, source: Checkpoint, layer: int, share: LayerBudget, keep_lowest: float
) -> tuple[Decision | None, Decision | None]:
    """Observe, decide and apply a layer's attention, then its MLP; None where a module stays whole."""
    if not share.units and not share.channels:
        shards.forward(PRUNED, layer)
        return None, None
    attention = _prune_attention(shards, source.family.attention, layer, share.units)
    mlp = _prune_mlp(shards, source.family.mlp, layer, share.channels, keep_lowest)
    return attention, mlp


def _prune_attention(shards: ShardGroup, branch: Branch, layer: int, num_removed: int) -> Decision | None:
    observed = shards.observe(PRUNED, layer, branch)
    heads = shards.decide_heads(PRUNED, layer, observed, num_removed=num_removed) if num_removed else None
    shards.apply(PRUNED, layer, branch, heads)
    return heads


def _prune_mlp(shards: ShardGroup, branch: Branch, layer: int, num_removed: int, keep_lowest: float) -> Decision | None:
    observed = shards.observe(PRUNED, layer, branch)
    channels = None
    if num_removed:
        channels = shards.decide_channels(PRUNED, layer, observed, num_removed=num_removed, keep_lowest=keep_lowest)
    shards.apply(PRUNED, layer, branch, channels)
    return channels
