"""Prunes layers on a group of shards as the published method does."""

from actors.group import ShardGroup
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.paper import choose_channels_by_output, decide_experts, decide_heads, recover_output
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.stream.outputs import LayerwiseStream


def prune_layer(group: ShardGroup, name: str, checkpoint: Checkpoint, layer: int, num_channels: int) -> LayerPlan:
    """Remove a KV group and some channels from a layer of an open stream."""
    attention = checkpoint.family.attention
    observed = group.merge(name, LayerwiseStream.observe, layer, attention)
    heads = group.get(group.decide(name, decide_heads, observed, layer, num_removed=1))
    group.each(name, LayerwiseStream.apply, layer, attention, heads)
    prune = prune_experts if checkpoint.family.mlp.has_experts else prune_mlp
    return LayerPlan(heads, prune(group, name, checkpoint, layer, num_channels))


def prune_mlp(group: ShardGroup, name: str, checkpoint: Checkpoint, layer: int, num_channels: int) -> Decision:
    seen = group.merge(name, LayerwiseStream.observe_output, layer)
    share = {"num_removed": num_channels, "keep_lowest": 0.01}
    chosen = group.get(group.decide(name, choose_channels_by_output, seen, layer, **share))
    decision = recover_output(group.get(group.merge(name, LayerwiseStream.compare_outputs, layer, chosen.kept)), chosen)
    group.each(name, LayerwiseStream.add_recovered, layer, decision)
    return decision


def prune_experts(group: ShardGroup, name: str, checkpoint: Checkpoint, layer: int, num_channels: int) -> Decision:
    branch = checkpoint.family.mlp
    seen = group.merge(name, LayerwiseStream.observe, layer, branch)
    decided = group.decide(name, decide_experts, seen, layer, num_removed=num_channels, keep_lowest=0.01)
    decision = group.get(decided)
    group.each(name, LayerwiseStream.apply, layer, branch, decision)
    return decision
