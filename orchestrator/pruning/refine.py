"""The refinement pass: corrects a pruned checkpoint towards the dense stream and writes it again, layer by layer.

refine_model                 one pass of the dense and the pruned model side by side; for each branch:
align                        observe both inputs, solve, replace the branch's input projections
refit                        observe kept inputs and target, solve, replace the output projection
"""

from dataclasses import replace

import torch

from orchestrator.pruning.run_context import RunContext
from orchestrator.pruning.targets import Target
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.models.families import Branch
from slimllm_ops.stream.refinement import Refined, RefinementStream

REFINED = "refined"


def refine_model(context: RunContext, target: Target, pruned: Checkpoint) -> None:
    """Run the dense and the pruned stream side by side; align, refit and write each layer.

    Args:
        context: The run.
        target: The target to refine.
        pruned: The target's checkpoint before refinement.
    """
    assert target.refined is not None, "a target to refine has a draft for the result"
    shards, tokens = context.shards, context.inputs.calibration.num_tokens
    draft, plans = target.refined, target.pruned.log.plans
    origins = tuple(layer for layer, plan in enumerate(plans) if not plan.dropped)
    # The refined checkpoint has the same names and shapes; only the directory differs.
    written = shards.deliver(replace(pruned, directory=draft.writer.directory))
    for attempt in context.attempts(draft.log.__len__):
        with attempt:
            if len(draft.log) == context.source.num_layers:
                continue
            shards.open_refinement(REFINED, context.source, pruned, context.inputs.calibration_blocks(), origins)
            draft.log.begin(
                shards.first(REFINED, RefinementStream.probed_ids), shards.first(REFINED, RefinementStream.probe)
            )
            for layer in context.reporter.layers("replaying", len(draft.log), tokens):
                if plans[layer].dropped:
                    shards.each(REFINED, RefinementStream.forward_dropped, layer)
                else:
                    shards.each(REFINED, RefinementStream.forward_refined, origins.index(layer), written)
            for layer in context.reporter.layers("refining", context.source.num_layers, tokens, first=len(draft.log)):
                if plans[layer].dropped:
                    shards.each(REFINED, RefinementStream.forward_dropped, layer)
                    tensors = {}
                elif layer in context.inputs.form.whole_layers:
                    shards.each(REFINED, RefinementStream.forward_whole, origins.index(layer))
                    tensors = pruned.read_layer(origins.index(layer))
                else:
                    tensors = _refine_layer(context, pruned, origins.index(layer))
                draft.commit_tensors(plans[layer], tensors, shards.first(REFINED, RefinementStream.probe))
            shards.close_stream(REFINED)


def _refine_layer(context: RunContext, pruned: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
    """Align and refit a pruned layer; return its tensors."""
    tensors = pruned.read_layer(layer)
    for branch in pruned.family.branches:
        for solved in (_align(context, layer, branch), _refit(context, layer, branch)):
            tensors |= _stored(solved, pruned.dtype)
    return tensors


def _align(context: RunContext, layer: int, branch: Branch) -> Refined:
    """Align a branch's input with the dense stream's on every shard; return its new input projections."""
    shards = context.shards
    observed = shards.merge(REFINED, RefinementStream.observe_inputs, layer, branch)
    aligned = shards.decide(REFINED, RefinementStream.solve_alignment, observed, layer, branch)
    shards.give(REFINED, RefinementStream.align, aligned, layer)
    return shards.get(aligned)


def _refit(context: RunContext, layer: int, branch: Branch) -> Refined:
    """Refit a branch's output to its target on every shard; return its new output projection."""
    shards = context.shards
    observed = shards.merge(REFINED, RefinementStream.observe_targets, layer, branch)
    refitted = shards.decide(REFINED, RefinementStream.solve_refit, observed, layer, branch)
    shards.give(REFINED, RefinementStream.apply, refitted, layer, branch)
    return shards.get(refitted)


def _stored(refined: Refined, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return tensors in the dtype of the checkpoint; their values are already rounded to it."""
    return {name: torch.from_numpy(array.copy()).to(dtype) for name, array in refined.items()}
