"""Lets the dense model sample calibration sequences, before anything else passes through it.

complete_calibration
sample_missing           each worker continues a batch of prompts; what comes back is saved at once
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from orchestrator.calibration import GENERATED, Calibration, Sampling
from orchestrator.data import freeze, save_blocks
from orchestrator.pruning.run_context import RunContext
from slimllm_ops.files import written_whole
from slimllm_ops.stream.generation import GenerationStream, numbered

GENERATING = "generating"


@dataclass(frozen=True)
class _SavedSequences:
    """Sequences in a folder, a file for each batch, so that a run that ends early keeps them."""

    folder: Path

    def save(self, rows: np.ndarray) -> None:
        """Write rows (b, 1 + T): the number of each sequence, then its tokens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.folder / f"{rows[0, 0]:06d}.npy") as partial, partial.open("wb") as file:
            np.save(file, rows)

    def numbers(self) -> np.ndarray:
        """Return the numbers of the sequences that are saved."""
        return np.array([row[0] for rows in self._load() for row in rows], dtype=np.int32)

    def sequences(self) -> np.ndarray:
        """Return all sequences (N, T), int32, in the order of their numbers."""
        return np.concatenate(self._load())[:, 1:]

    def _load(self) -> list[np.ndarray]:
        return [np.load(path) for path in sorted(self.folder.glob("*.npy"))]


def complete_calibration(context: RunContext) -> RunContext:
    """Return a context whose calibration data have all their blocks, those that the model samples too."""
    sampling = context.inputs.sampling
    if sampling is None:
        return context
    saved = _SavedSequences(context.staging.solved / "generated")
    for attempt in context.attempts(lambda: len(saved.numbers())):
        with attempt:
            _sample_missing(context, sampling, saved)
    calibration = sampling.completed(saved.sequences())
    return replace(context, inputs=replace(context.inputs, calibration=calibration, sampling=None))


def _sample_missing(context: RunContext, sampling: Sampling, saved: _SavedSequences) -> None:
    """Sample and save every sequence that is not saved yet."""
    numbers = np.setdiff1d(np.arange(len(sampling.prompts_NP)), saved.numbers())
    if not len(numbers):
        return
    shards, prompts = context.shards, numbered(numbers, sampling.prompts_NP[numbers])
    rounds = shards.open_generation(
        GENERATING, context.source, prompts, length=sampling.length, seed=context.config.seed
    )
    tokens = len(numbers) * sampling.length // rounds
    for _ in context.reporter.steps(GENERATING, "batch", rounds, tokens):
        for rows in shards.each(GENERATING, GenerationStream.generate_next):
            if len(rows):
                saved.save(rows)
    shards.close_stream(GENERATING)


def keep_generated(calibration: Calibration, moments: Path) -> None:
    """Save the sequences that the model sampled, if there are any, for a refinement from the moments."""
    if calibration.generated:
        sequences = calibration.generated_BT
        save_blocks(freeze(calibration.spec, sequences, len(sequences), None), moments / GENERATED)
