"""Measures models on texts: loss, perplexity, bits per byte, and the distance from the first model."""

import math
from collections.abc import Sequence

import numpy as np

from actors.group import ShardGroup
from orchestrator.evaluation.inputs import Evaluated, EvaluationInputs, Text
from orchestrator.evaluation.results import Distance, TextResult
from orchestrator.evaluation.statistics import paired_difference, standard_error
from orchestrator.progress import Reporter
from orchestrator.pruning.attempts import attempts
from slimllm_ops.checkpoint.whole import WholeModel
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.evaluation.scoring import ScoringStream, TokenScores

PERCENTILES = (50, 90, 99)


def measure_texts(
    shards: ShardGroup, inputs: EvaluationInputs, reporter: Reporter
) -> dict[str, tuple[TextResult, ...]]:
    """Measure every model on every text; return the results by the models' names."""
    found: dict[str, dict[Text, TextResult]] = {one.name: {} for one in inputs.models}
    for together in _groups(inputs.models):
        for text in inputs.texts_of(together[-1]):
            stage = f"{together[-1].name}, {text.length} tokens"
            scores = _score(shards, [one.whole for one in together], text, reporter, stage)
            for number, model in enumerate(together):
                # The first model is measured beside each of the others.
                if text not in found[model.name]:
                    found[model.name][text] = _result(model, text, scores[number], scores[0] if number else None)
    return {name: tuple(results.values()) for name, results in found.items()}


def _groups(models: Sequence[Evaluated]) -> list[tuple[Evaluated, ...]]:
    """Return the models that are measured together: each beside the first, or alone if they are not comparable."""
    first, *others = models
    groups: list[tuple[Evaluated, ...]] = [(first, one) if one.comparable else (one,) for one in others]
    return groups if any(one.comparable for one in others) else [(first,), *groups]


def _score(
    shards: ShardGroup, models: list[WholeModel], text: Text, reporter: Reporter, stage: str
) -> list[TokenScores]:
    """Return each model's scores of a text's windows, in their order."""
    windows_WT = text.windows.ids_WT
    for attempt in attempts(shards, reporter):
        with attempt:
            rounds = shards.open_scoring(stage, models, windows_WT)
            parts = [
                shards.each(stage, ScoringStream.score, number)
                for number in reporter.steps(stage, "batch", rounds, windows_WT.size // rounds)
            ]
            shards.close_stream(stage)
    by_shard = [part for shard in zip(*parts, strict=True) for part in shard if part]
    return [TokenScores.joined([part[number] for part in by_shard]) for number in range(len(models))]


def _result(model: Evaluated, text: Text, scores: TokenScores, first: TokenScores | None) -> TextResult:
    """Return a model's figures from its scores.

    Raises:
        NonFiniteError: A loss is NaN.
    """
    windows = text.windows
    loss = float(scores.loss_WT[windows.counted_WT].mean(dtype=np.float64))
    if math.isnan(loss):
        raise NonFiniteError(
            f"the logits of {model.directory} on {text.blocks.spec} hold NaN or infinity: the weights overflow, or are "
            f"damaged"
        )
    return TextResult(
        data=text.blocks.spec,
        digest=text.blocks.digest,
        length=text.length,
        stride=text.stride,
        tokens=windows.num_counted,
        loss=loss,
        loss_stderr=standard_error(_means_of_windows(scores.loss_WT, windows.counted_WT)),
        bits_per_byte=text.num_bytes and loss * windows.num_counted / math.log(2) / text.num_bytes,
        distance=None if first is None else _distance(scores, first, windows.counted_WT),
    )


def _distance(scores: TokenScores, first: TokenScores, counted_WT: np.ndarray) -> Distance:
    divergence = scores.divergence_WT[counted_WT].astype(np.float64)
    losses = [_means_of_windows(one.loss_WT, counted_WT) for one in (scores, first)]
    return Distance(
        mean=float(divergence.mean()),
        percentiles=dict(zip(PERCENTILES, map(float, np.percentile(divergence, PERCENTILES)), strict=True)),
        agreement=float(scores.agreement_WT[counted_WT].mean()),
        loss=paired_difference(*losses),
    )


def _means_of_windows(values_WT: np.ndarray, counted_WT: np.ndarray) -> np.ndarray:
    """Return the means over the counted tokens of each window (W,); windows without any are left out."""
    counts = counted_WT.sum(axis=1)
    sums = np.where(counted_WT, values_WT, 0).sum(axis=1, dtype=np.float64)
    return sums[counts > 0] / counts[counts > 0]
