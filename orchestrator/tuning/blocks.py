"""Trains a pruned checkpoint branch by branch beside the dense model, and writes it again, layer by layer.

tune_blocks                  one pass of the dense and the tuned model side by side (correction.py); for each branch:
prepare                      run it in the dense stream; measure the loss
train                        once per epoch, on one shard after the other
apply                        round, replace the branch's weights, run it in the tuned stream, measure the loss
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from actors.group import ShardGroup
from actors.workers import Reference
from orchestrator.progress import Reporter
from orchestrator.pruning.attempts import Attempts
from orchestrator.pruning.correction import Correction, Tensors, stored
from orchestrator.pruning.targets import Draft
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.models.families import Branch
from slimllm_ops.moments.sums import Mean
from slimllm_ops.stream.padding import count_tokens
from slimllm_ops.stream.paired import BranchTensors
from slimllm_ops.training.branches import BranchState, BranchTraining, BranchTrainingStream, require_trainable

TUNED = "tuned"


def tune_blocks(
    shards: ShardGroup,
    source: Checkpoint,
    pruned: Checkpoint,
    plans: Sequence[LayerPlan],
    blocks_BT: np.ndarray,
    draft: Draft,
    reporter: Reporter,
    attempts: Attempts,
    settings: BranchTraining,
) -> None:
    """Train the branches of a pruned model one after the other, and commit each layer to a draft.

    Args:
        shards: The shards to train on; the result does not depend on how many they are.
        source: The dense model.
        pruned: The pruned model, refined or not; it stays as it is.
        plans: The pruned model's plan of each dense layer, from its pruning/plan.json.
        blocks_BT: The token blocks to train on, int32.
        draft: What the trained layers are written to; layers that it has are not trained again.
        reporter: Shows the progress, and each branch's loss in a verbose run.
        attempts: Yields attempts until one keeps all its workers.
        settings: How each branch is trained.

    Raises:
        InputError: The family cannot be trained so, or a worker lacks the memory for it.
        NonFiniteError: The training diverged.
        ShardError: Workers were lost too often.
    """
    require_trainable(pruned.family)
    trainer = _Trainer(shards, pruned, reporter, settings, settings.epochs * len(blocks_BT))

    def open_streams(origins: tuple[int, ...]) -> None:
        shards.open_branch_training(TUNED, source, pruned, blocks_BT, origins)

    Correction(
        stage="tuning",
        stream=TUNED,
        open_streams=open_streams,
        pruned=pruned,
        plans=plans,
        draft=draft,
        correct_layer=trainer.train_layer,
    ).run(shards, reporter, attempts, count_tokens(blocks_BT))


@dataclass(frozen=True)
class _Trainer:
    """Trains the branches of a layer on shards that hold both streams."""

    shards: ShardGroup
    pruned: Checkpoint
    reporter: Reporter
    settings: BranchTraining
    num_steps: int

    def train_layer(self, layer: int) -> Tensors:
        """Train both branches of a pruned layer, and run them in both streams; return the layer's tensors."""
        tensors = self.pruned.read_layer(layer)
        for branch in self.pruned.family.branches:
            tensors |= stored(self._train_branch(layer, branch), self.pruned.dtype)
        return tensors

    def _train_branch(self, layer: int, branch: Branch) -> BranchTensors:
        """Train a branch, and run it in both streams; return its tensors."""
        shards, settings = self.shards, self.settings
        before = shards.mean(TUNED, BranchTrainingStream.prepare, layer, branch)
        state: Reference[BranchState] | None = None
        for _ in range(settings.epochs):
            state = shards.hand_on(
                TUNED, BranchTrainingStream.train, state, layer, branch, settings, num_steps=self.num_steps
            )
        assert state is not None, "a branch is trained for an epoch at least"
        rounded = shards.first_with(TUNED, BranchTrainingStream.rounded, state, layer, branch)
        after = reduce(Mean.merge, shards.give(TUNED, BranchTrainingStream.apply, rounded, layer, branch)).value
        self.reporter.detail(f"layer {layer}, {branch.described}: loss {before:.4g} before, {after:.4g} after")
        return shards.get(rounded)
