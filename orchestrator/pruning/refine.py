"""The refinement pass: corrects a pruned checkpoint towards the dense stream and writes it again, layer by layer.

refine_model                 one pass of the dense and the pruned model side by side (correction.py); for each branch:
align                        observe both inputs, solve, replace the branch's input projections
refit                        observe kept inputs and target, solve, replace the output projection
"""

from functools import partial

from orchestrator.pruning.correction import Correction, Tensors, origins_of, stored
from orchestrator.pruning.run_context import RunContext
from orchestrator.pruning.targets import Target
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.models.families import Branch
from slimllm_ops.stream.paired import BranchTensors
from slimllm_ops.stream.refinement import RefinementStream

REFINED = "refined"


def refine_model(context: RunContext, target: Target, pruned: Checkpoint) -> None:
    """Run the dense and the pruned stream side by side; align, refit and write each layer.

    Args:
        context: The run.
        target: The target to refine.
        pruned: The target's checkpoint before refinement.
    """
    assert target.refined is not None, "a target to refine has a draft for the result"
    shards, plans = context.shards, target.pruned.log.plans

    def open_streams(origins: tuple[int, ...]) -> None:
        shards.open_refinement(REFINED, context.source, pruned, context.inputs.calibration_blocks(), origins)

    whole = {number for number, layer in enumerate(origins_of(plans)) if layer in context.inputs.form.whole_layers}
    Correction(
        stage="refining",
        stream=REFINED,
        open_streams=open_streams,
        pruned=pruned,
        plans=plans,
        draft=target.refined,
        correct_layer=partial(_refine_layer, context, pruned, whole),
    ).run(shards, context.reporter, context.attempts, context.inputs.calibration.num_tokens)


def _refine_layer(context: RunContext, pruned: Checkpoint, whole: set[int], layer: int) -> Tensors:
    """Align and refit a pruned layer, unless it is to stay whole; return its tensors."""
    tensors = pruned.read_layer(layer)
    if layer in whole:
        context.shards.each(REFINED, RefinementStream.forward_whole, layer)
        return tensors
    for branch in pruned.family.branches:
        for solved in (_align(context, layer, branch), _refit(context, layer, branch)):
            tensors |= stored(solved, pruned.dtype)
    return tensors


def _align(context: RunContext, layer: int, branch: Branch) -> BranchTensors:
    """Align a branch's input with the dense stream's on every shard; return its new input projections."""
    shards = context.shards
    observed = shards.merge(REFINED, RefinementStream.observe_inputs, layer, branch)
    aligned = shards.decide(REFINED, RefinementStream.solve_alignment, observed, layer, branch)
    shards.give(REFINED, RefinementStream.align, aligned, layer)
    return shards.get(aligned)


def _refit(context: RunContext, layer: int, branch: Branch) -> BranchTensors:
    """Refit a branch's output to its target on every shard; return its new output projection."""
    shards = context.shards
    observed = shards.merge(REFINED, RefinementStream.observe_targets, layer, branch)
    refitted = shards.decide(REFINED, RefinementStream.solve_refit, observed, layer, branch)
    shards.give(REFINED, RefinementStream.apply, refitted, layer, branch)
    return shards.get(refitted)
