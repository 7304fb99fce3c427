"""Describes a run's model, texts and workers, as far as an estimate depends on them."""

from dataclasses import dataclass
from functools import cached_property

import psutil
import torch

from cluster import WorkerPlan
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.stream.footprint import moment_bytes


@dataclass(frozen=True)
class Text:
    """The number and length of a text's token blocks."""

    num_blocks: int
    length: int

    @property
    def num_tokens(self) -> int:
        """The total number of tokens."""
        return self.num_blocks * self.length


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The parts of a run that an estimate depends on.

    Attributes:
        config: The settings.
        source: The model.
        calibration: The calibration blocks, or those that stored moments were made from.
        held_out: The texts that perplexity is measured on.
        workers: The workers.
        driver: Bytes that the driver already takes.
        sampled: The sequences of the calibration blocks that the model samples first; None if there are none.
    """

    config: PruneConfig
    source: Checkpoint
    calibration: Text
    held_out: tuple[Text, ...]
    workers: WorkerPlan
    driver: int
    sampled: Text | None = None

    @classmethod
    def of(cls, config: PruneConfig, inputs: Inputs, workers: WorkerPlan) -> "Workload":
        """Describe a run whose inputs are loaded."""
        calibration = Text(inputs.calibration.num_blocks, inputs.calibration.block_length)
        held_out = tuple(Text(*blocks.input_ids_BT.shape) for blocks in inputs.held_out)
        sampling = inputs.sampling
        sampled = None if sampling is None else Text(len(sampling.prompts_NP), sampling.length)
        return cls.of_texts(config, inputs.source, calibration, held_out, workers, sampled)

    @classmethod
    def of_texts(
        cls,
        config: PruneConfig,
        source: Checkpoint,
        calibration: Text,
        held_out: tuple[Text, ...],
        workers: WorkerPlan,
        sampled: Text | None = None,
    ) -> "Workload":
        """Describe a run by its texts' sizes; call this in the process that will drive it."""
        return cls(
            config=config,
            source=source,
            calibration=calibration,
            held_out=held_out,
            workers=workers,
            driver=psutil.Process().memory_full_info().uss,
            sampled=sampled,
        )

    @property
    def device(self) -> torch.device:
        """The device that workers compute on."""
        return torch.device("cuda" if self.workers.gpus_per_worker else "cpu")

    @cached_property
    def stored_bytes(self) -> int:
        """The bytes of the stored model."""
        return self.source.num_bytes()

    @cached_property
    def embedding_bytes(self) -> int:
        """The bytes of a stored vocabulary table: the embeddings or the head."""
        parameters = self.source.num_parameters(list(self.source.files))
        return self.source.config.vocab_size * self.source.config.hidden_size * self.stored_bytes // parameters

    @cached_property
    def output_bytes(self) -> int:
        """The bytes of all checkpoints that the run writes; with the paper's ratio, those of whole models."""
        names = [name for layer in range(self.source.num_layers) for name in self.source.layer_names(layer)]
        share = self.source.num_parameters(names) / self.source.num_parameters(list(self.source.files))
        return int(sum(self.stored_bytes * (1 - share * (sparsity or 0.0)) for sparsity in self.config.targets))

    @cached_property
    def kept_moments(self) -> int:
        """The bytes of the moments and sensitivities of all layers, as they are stored."""
        sensitivity = 2 * torch.float32.itemsize * self.source.config.hidden_size**2
        return self.source.num_layers * (moment_bytes(self.source, self.device) + sensitivity)
