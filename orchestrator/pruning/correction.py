"""Corrects a pruned model towards the dense one, layer by layer, and commits each layer to a draft.

The dense and the pruned model run side by side. A layer that was dropped runs in the dense one only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from actors.group import ShardGroup
from orchestrator.progress import Reporter
from orchestrator.pruning.attempts import Attempts
from orchestrator.pruning.targets import Draft
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.stream.paired import BranchTensors, PairedStream

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Correction:
    """The correction of a pruned model.

    Attributes:
        stage: What the correction is called in progress lines.
        stream: The name of the two models' streams, a `PairedStream`.
        open_streams: Opens them on the shards, given the dense layer that each pruned layer comes from.
        pruned: The pruned model.
        plans: Its plan of each dense layer.
        draft: What the corrected layers are written to.
        correct_layer: Corrects a pruned layer in all streams, and returns its tensors.
    """

    stage: str
    stream: str
    open_streams: Callable[[tuple[int, ...]], None]
    pruned: Checkpoint
    plans: Sequence[LayerPlan]
    draft: Draft
    correct_layer: Callable[[int], Tensors]

    @property
    def origins(self) -> tuple[int, ...]:
        """The dense layer that each pruned layer comes from."""
        return origins_of(self.plans)

    def run(self, shards: ShardGroup, reporter: Reporter, attempts: Attempts, num_tokens: int) -> None:
        """Correct and commit every layer after the last that is committed.

        Args:
            shards: The shards of the streams.
            reporter: Shows the progress.
            attempts: Yields attempts until one keeps all its workers.
            num_tokens: The tokens that pass through each layer.

        Raises:
            ShardError: Workers were lost too often.
        """
        log, stream = self.draft.log, self.stream
        # The corrected checkpoint has the same names and shapes; only the directory differs.
        written = shards.deliver(replace(self.pruned, directory=self.draft.writer.directory))
        for attempt in attempts(log.__len__):
            with attempt:
                if len(log) == len(self.plans):
                    continue
                self.open_streams(self.origins)
                log.begin(shards.first(stream, PairedStream.probed_ids), shards.first(stream, PairedStream.probe))
                for layer in reporter.layers("replaying", len(log), num_tokens):
                    self._replay(shards, layer, written)
                for layer in reporter.layers(self.stage, len(self.plans), num_tokens, first=len(log)):
                    self._correct(shards, layer)
                shards.close_stream(stream)

    def _replay(self, shards: ShardGroup, layer: int, written: Checkpoint) -> None:
        """Pass a dense layer that is committed."""
        if self.plans[layer].dropped:
            shards.each(self.stream, PairedStream.forward_dropped, layer)
        else:
            shards.each(self.stream, PairedStream.forward_written, self.origins.index(layer), written)

    def _correct(self, shards: ShardGroup, layer: int) -> None:
        """Correct a dense layer's pruned one and commit it."""
        tensors: Tensors = {}
        if self.plans[layer].dropped:
            shards.each(self.stream, PairedStream.forward_dropped, layer)
        else:
            tensors = self.correct_layer(self.origins.index(layer))
        self.draft.commit_tensors(self.plans[layer], tensors, shards.first(self.stream, PairedStream.probe))


def origins_of(plans: Sequence[LayerPlan]) -> tuple[int, ...]:
    """Return the dense layer that each pruned layer comes from."""
    return tuple(layer for layer, plan in enumerate(plans) if not plan.dropped)


def stored(tensors: BranchTensors, dtype: torch.dtype) -> Tensors:
    """Return a branch's tensors in the dtype of the checkpoint; their values are already rounded to it."""
    return {name: torch.from_numpy(array.copy()).to(dtype) for name, array in tensors.items()}
