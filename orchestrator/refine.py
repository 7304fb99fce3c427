"""The refinement pass: a pruned checkpoint is corrected towards the dense stream and written anew, layer by layer."""

from dataclasses import replace

import torch

from actors.shard import Refined
from orchestrator.job import Job, Target
from slimllm_ops.checkpoint import Checkpoint

REFINED = "refined"


def refine_model(job: Job, target: Target, pruned: Checkpoint) -> None:
    """Run the dense and the pruned stream side by side; align, refit and write layer by layer.

    Args:
        job: the run at hand.
        target: what is refined.
        pruned: its checkpoint as it was pruned, whole.
    """
    assert target.refined is not None, "a target that is to be refined has a place for it"
    shards, tokens, draft = job.shards, job.inputs.calibration.num_tokens, target.refined
    shards.open_refinement(REFINED, job.source, pruned, job.inputs.calibration_blocks())
    draft.log.begin(shards.probed_ids(REFINED), shards.probe(REFINED))
    # Of the same names and shapes: only the directory is another.
    refined = replace(pruned, directory=draft.writer.directory)
    for layer in job.reporter.layers("replaying", len(draft.log), tokens):
        shards.forward_refined(REFINED, layer, refined)
    for layer in job.reporter.layers("refining", job.source.num_layers, tokens, first=len(draft.log)):
        tensors = pruned.read_layer(layer)
        for branch in (job.source.family.attention, job.source.family.mlp):
            for solved in (shards.align(REFINED, layer, branch), shards.refit(REFINED, layer, branch)):
                tensors |= _stored(solved, pruned.dtype)
        draft.commit_tensors(target.pruned.log.plans[layer], tensors, shards.probe(REFINED))
    shards.close_stream(REFINED)


def _stored(refined: Refined, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return tensors in the dtype of the checkpoint, to which their values are rounded already."""
    return {name: torch.from_numpy(array.copy()).to(dtype) for name, array in refined.items()}
