"""The refinement pass: a pruned checkpoint is corrected towards the dense stream, a layer at a time, in its place."""

import numpy as np
import torch
from torch import Tensor

from orchestrator.job import Job, Probe, Target
from slimllm_ops.checkpoint import Checkpoint
from slimllm_ops.families import Branch
from slimllm_ops.refinement import fold
from slimllm_ops.writer import replace_layer

REFINED = "refined"


def refine_model(job: Job, target: Target) -> Probe:
    """Run the dense and the pruned stream side by side; align, refit and rewrite layer by layer.

    Args:
        job: the run at hand.
        target: a checkpoint that is already whole.
    """
    source, pruned, shards = job.source, Checkpoint.open(target.directory), job.shards
    shards.open_refinement(REFINED, source, pruned, job.inputs.calibration_blocks())
    states = [shards.probe(REFINED)]
    for layer in job.reporter.layers("refining", source.num_layers, job.inputs.calibration.num_tokens):
        tensors = pruned.read_layer(layer)
        for branch in (source.family.attention, source.family.mlp):
            alignment_DD = shards.alignment(REFINED, layer, branch)
            refitted = shards.refit(REFINED, layer, branch)
            tensors |= _refined(tensors, branch, alignment_DD, *refitted)
        replace_layer(pruned, layer, tensors)
        states.append(shards.probe(REFINED))
    probe = Probe(shards.probed_ids(REFINED), states)
    shards.close_stream(REFINED)
    return probe


def _refined(
    tensors: dict[str, Tensor],
    branch: Branch,
    alignment_DD: np.ndarray,
    weight_DS: np.ndarray,
    bias_D: np.ndarray | None,
) -> dict[str, Tensor]:
    """Return a branch's tensors anew, in the dtype that they are stored in."""
    alignment = torch.from_numpy(alignment_DD.copy())
    refined = {name: fold(tensors[name], alignment) for name in branch.input_weights}
    stored = tensors[branch.output_weight]
    refined[branch.output_weight] = torch.from_numpy(weight_DS.copy()).to(stored.dtype)
    if bias_D is not None:
        refined[branch.output_bias] = torch.from_numpy(bias_D.copy()).to(stored.dtype)
    return refined
