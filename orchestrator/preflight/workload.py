"""What a run is made of: a model, texts and workers, as far as an estimate depends on them."""

from dataclasses import dataclass
from functools import cached_property

import psutil
import torch

from cluster import WorkerPlan
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.stream.operations import LayerOperations, Rates


@dataclass(frozen=True)
class Text:
    """Token blocks, without the tokens."""

    num_blocks: int
    length: int

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return self.num_blocks * self.length


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run is made of.

    Attributes:
        config: what is asked.
        source: the model.
        calibration: the blocks that pass it, or those that kept moments are of.
        held_out: what perplexity is measured on.
        workers: who does it.
        rates: what a worker was seen to reach; None where that is not known.
        driver: bytes that the driver takes already.
    """

    config: PruneConfig
    source: Checkpoint
    calibration: Text
    held_out: tuple[Text, ...]
    workers: WorkerPlan
    rates: Rates | None
    driver: int

    @classmethod
    def of(cls, config: PruneConfig, inputs: Inputs, workers: WorkerPlan, rates: Rates | None) -> "Workload":
        """Describe a run whose inputs are at hand."""
        calibration = Text(inputs.calibration.num_blocks, inputs.calibration.block_length)
        held_out = tuple(Text(*blocks.input_ids_BT.shape) for blocks in inputs.held_out)
        return cls.of_texts(config, inputs.source, calibration, held_out, workers, rates)

    @classmethod
    def of_texts(
        cls,
        config: PruneConfig,
        source: Checkpoint,
        calibration: Text,
        held_out: tuple[Text, ...],
        workers: WorkerPlan,
        rates: Rates | None,
    ) -> "Workload":
        """Describe a run from this process, which will drive it."""
        return cls(
            config=config,
            source=source,
            calibration=calibration,
            held_out=held_out,
            workers=workers,
            rates=rates,
            driver=psutil.Process().memory_full_info().uss,
        )

    @property
    def device(self) -> torch.device:
        """Where workers compute."""
        return torch.device("cuda" if self.workers.gpus_per_worker else "cpu")

    @cached_property
    def layers(self) -> list[LayerOperations]:
        """The operations of every layer, for blocks of the calibration's length."""
        return [
            LayerOperations.of(self.source, layer, self.calibration.length) for layer in range(self.source.num_layers)
        ]

    @cached_property
    def stored_bytes(self) -> int:
        """The model as it is stored."""
        return self.source.num_bytes()

    @cached_property
    def embedding_bytes(self) -> int:
        """A table of the vocabulary as stored: of the embeddings, or of the head."""
        parameters = self.source.num_parameters(list(self.source.files))
        return self.source.config.vocab_size * self.source.config.hidden_size * self.stored_bytes // parameters
