"""The refinement pass: a pruned checkpoint is corrected towards the dense stream and written anew, layer by layer."""

from dataclasses import replace

import torch

from actors.shard import Refined
from orchestrator.pruning.run_context import Job, Target
from slimllm_ops.checkpoint.reading import Checkpoint

REFINED = "refined"


def refine_model(job: Job, target: Target, pruned: Checkpoint) -> None:
    """Run the dense and the pruned stream side by side; align, refit and write layer by layer.

    Args:
        job: the run at hand.
        target: what is refined.
        pruned: its checkpoint as it was pruned, whole.
    """
    assert target.refined is not None, "a target that is to be refined has a place for it"
    shards, tokens = job.shards, job.inputs.calibration.num_tokens
    draft, plans = target.refined, target.pruned.log.plans
    origins = [layer for layer, plan in enumerate(plans) if not plan.dropped]
    shards.open_refinement(REFINED, job.source, pruned, job.inputs.calibration_blocks(), origins)
    draft.log.begin(shards.probed_ids(REFINED), shards.probe(REFINED))
    # Of the same names and shapes: only the directory is another.
    refined = replace(pruned, directory=draft.writer.directory)
    for layer in job.reporter.layers("replaying", len(draft.log), tokens):
        if plans[layer].dropped:
            shards.forward_dropped(REFINED, layer)
        else:
            shards.forward_refined(REFINED, origins.index(layer), refined)
    for layer in job.reporter.layers("refining", job.source.num_layers, tokens, first=len(draft.log)):
        if plans[layer].dropped:
            shards.forward_dropped(REFINED, layer)
            tensors = {}
        else:
            tensors = _refine_layer(job, pruned, origins.index(layer))
        draft.commit_tensors(plans[layer], tensors, shards.probe(REFINED))
    shards.close_stream(REFINED)


def _refine_layer(job: Job, pruned: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
    """Align and refit a pruned layer; return its tensors."""
    tensors = pruned.read_layer(layer)
    for branch in (pruned.family.attention, pruned.family.mlp):
        for solved in (job.shards.align(REFINED, layer, branch), job.shards.refit(REFINED, layer, branch)):
            tensors |= _stored(solved, pruned.dtype)
    return tensors


def _stored(refined: Refined, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return tensors in the dtype of the checkpoint, to which their values are rounded already."""
    return {name: torch.from_numpy(array.copy()).to(dtype) for name, array in refined.items()}
