"""Scores next tokens by whole models: the loss, and how far a model's predictions are from a reference model's.

Shapes: W windows of T tokens, w windows in a batch, V vocabulary. A window predicts its last T - 1 tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from slimllm_ops.evaluation.reading import read_on
from slimllm_ops.stream.padding import PADDING, filled

# Next tokens whose log-probabilities are computed at once.
AT_ONCE = 512


@dataclass(frozen=True)
class TokenScores:
    """What a model predicts of the next tokens of windows; places of padding hold numbers without meaning.

    Attributes:
        loss_WT: Negative log-likelihoods (W, T - 1), float32, in nats.
        divergence_WT: KL(reference || model) of each prediction, float32, in nats; 0 for the reference itself.
        agreement_WT: Whether the most likely token is the reference's, bool.
    """

    loss_WT: np.ndarray
    divergence_WT: np.ndarray
    agreement_WT: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["TokenScores"], axis: int = 0) -> "TokenScores":
        """Return the scores of all windows of some parts, in their order; with axis 1, of all tokens of windows."""
        names = ("loss_WT", "divergence_WT", "agreement_WT")
        return cls(*(np.concatenate([getattr(part, name) for part in parts], axis=axis) for name in names))


class ScoringStream:
    """Batches of windows, and the models that score them; the first model is the reference.

    Args:
        directories: The models' directories.
        batches: Token ids, each (w, T), int64; padding stands at the end of a window.
        device: Where the models run, in float32 on a CPU and in bfloat16 on a GPU.
    """

    def __init__(self, directories: Sequence[Path], batches: list[Tensor], device: torch.device) -> None:
        self._device, self._batches = device, batches
        self._models = [read_on(one, device) for one in directories]

    @torch.inference_mode()
    def score(self, index: int) -> list[TokenScores]:
        """Return each model's scores of a batch; nothing if there are fewer batches."""
        if index >= len(self._batches):
            return []
        ids = self._batches[index].to(self._device)
        inputs, mask = filled(ids), (ids != PADDING).long()
        logits = [
            model(input_ids=inputs, attention_mask=mask, use_cache=False).logits[:, :-1] for model in self._models
        ]
        spans = list(_spans(logits, inputs[:, 1:]))
        return [TokenScores.joined([span[number] for span in spans], axis=1) for number in range(len(logits))]

    def close(self) -> None:
        """Free all memory now."""
        self._models, self._batches = [], []


def _spans(logits: list[Tensor], targets_wT: Tensor) -> Iterator[list[TokenScores]]:
    """Yield each model's scores of a part of the next tokens, from logits (w, T - 1, V)."""
    size = max(1, AT_ONCE // len(targets_wT))
    for start in range(0, targets_wT.shape[1], size):
        part = slice(start, start + size)
        log_probs = [functional.log_softmax(one[:, part].float(), dim=-1) for one in logits]
        yield [_scores(log_probs[0], one, targets_wT[:, part]) for one in log_probs]


def _scores(reference_wTV: Tensor, model_wTV: Tensor, targets_wT: Tensor) -> TokenScores:
    """Return a model's scores of next tokens, from its log-probabilities and the reference's."""
    loss = -model_wTV.gather(-1, targets_wT[..., None])[..., 0]
    is_reference = model_wTV is reference_wTV
    divergence = torch.zeros_like(loss) if is_reference else _divergence(reference_wTV, model_wTV)
    agreement = model_wTV.argmax(dim=-1) == reference_wTV.argmax(dim=-1)
    return TokenScores(*(one.cpu().numpy() for one in (loss, divergence, agreement)))


def _divergence(reference_wTV: Tensor, model_wTV: Tensor) -> Tensor:
    """Return KL(reference || model) of each prediction, from log-probabilities."""
    return functional.kl_div(model_wTV, reference_wTV, log_target=True, reduction="none").sum(dim=-1)
