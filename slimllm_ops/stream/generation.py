"""Samples sequences from the dense model, so that calibration needs less text, or none.

A sequence begins with a prompt: the token that begins a text, or tokens of the calibration text. The model samples the
rest, token by token, at temperature 1. Each sequence has a number, and its random numbers depend on the seed and that
number only. So the sequences do not depend on which worker samples them.

LLM-QAT (Liu et al. 2023) calibrates on such sequences. docs/method.md has what they are worth here.

Shapes: b sequences in a batch, P tokens of a prompt, T tokens of a sequence, V vocabulary.
"""

from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.stream.sampling import sample
from slimllm_ops.stream.weights import ModelWeights


def numbered(numbers: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return rows (b, 1 + T), int32: the number of each sequence, then its tokens."""
    return np.concatenate([numbers[:, None], ids], axis=1).astype(np.int32)


class GenerationStream:
    """Batches of prompts, and the dense model that continues them.

    Args:
        checkpoint: The model.
        batches: Rows (b, 1 + P), int64: the number of each sequence, then its prompt. A batch is sampled at once.
        device: Where the model runs.
        length: The tokens of a sequence, prompt included.
        seed: The seed of the random numbers.
        keep_layers: Whether all layers stay in memory. Otherwise every token reads each of them from the disk.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: list[Tensor],
        device: torch.device,
        length: int,
        seed: int,
        keep_layers: bool,
    ) -> None:
        self._batches = list(batches)
        self._device = device
        self._length = length
        self._seed = seed
        self._weights = ModelWeights(checkpoint, device)
        self._loaded = ExitStack()
        self._model = self._loaded.enter_context(self._weights.whole(keep_layers=keep_layers))

    def generate_next(self) -> np.ndarray:
        """Continue the next batch of prompts.

        Returns:
            Rows (b, 1 + T), int32: the number of each sequence, then its tokens. No row if there is no more batch.

        Raises:
            NonFiniteError: Logits hold NaN or infinity.
        """
        if not self._batches:
            return np.empty((0, 1 + self._length), dtype=np.int32)
        rows = self._batches.pop(0)
        numbers = rows[:, 0].numpy()
        uniform_bT = torch.stack([self._uniform(int(number)) for number in numbers])
        return numbered(numbers, self._continued(rows[:, 1:], uniform_bT).numpy())

    def close(self) -> None:
        """Free all memory now."""
        self._loaded.close()
        self._weights.close()

    @torch.inference_mode()
    def _continued(self, prompts_bP: Tensor, uniform_bT: Tensor) -> Tensor:
        """Return sequences (b, T) that begin with the prompts."""
        ids_bT = torch.empty(len(prompts_bP), self._length, dtype=torch.int64)
        start, cache = prompts_bP.shape[1], None
        ids_bT[:, :start] = new = prompts_bP
        for place in range(start, self._length):
            answer = self._model(
                input_ids=new.to(self._device), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache, logits_bV = answer.past_key_values, answer.logits[:, -1].float()
            self._require_finite(logits_bV)
            new = sample(logits_bV, uniform_bT[:, place].to(self._device))[:, None].cpu()
            ids_bT[:, place : place + 1] = new
        return ids_bT

    def _uniform(self, number: int) -> Tensor:
        """Return a number in [0, 1) for each token of a sequence."""
        (mixed,) = np.random.SeedSequence([self._seed, number]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed) >> 1)
        return torch.rand(self._length, generator=generator)

    def _require_finite(self, logits_bV: Tensor) -> None:
        if not torch.isfinite(logits_bV.amax(dim=-1)).all():
            raise NonFiniteError(
                f"the logits hold NaN or infinity in {self._weights.dtype} while the model samples sequences: the "
                f"weights of {self._weights.checkpoint.directory} are damaged, or its activations overflow"
            )
