"""Scores of next tokens are those of transformers and of the definition, however windows are batched."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from slimllm_ops.evaluation.scoring import ScoringStream, TokenScores
from slimllm_ops.stream.padding import PADDING

CPU = torch.device("cpu")


def log_probs(directory: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits[:, :-1].double().log_softmax(dim=-1)


def score(directories: list[Path], batches: list[Tensor]) -> list[TokenScores]:
    stream = ScoringStream(directories, batches, CPU)
    parts = [stream.score(number) for number in range(len(batches))]
    assert stream.score(len(batches)) == []
    return [TokenScores.joined(one) for one in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def ids(token_blocks: np.ndarray) -> Tensor:
    return torch.from_numpy(token_blocks[:7].astype(np.int64))


def test_losses_divergences_and_agreement_are_those_of_the_definition(
    gqa_model: Path, mha_model: Path, ids: Tensor
) -> None:
    first, other = (log_probs(one, ids) for one in (gqa_model, mha_model))
    reference, scores = score([gqa_model, mha_model], list(ids.split(3)))
    expected = -other.gather(-1, ids[:, 1:, None])[..., 0]
    assert scores.loss_WT == pytest.approx(expected.numpy(), abs=1e-5)
    assert scores.divergence_WT == pytest.approx((first.exp() * (first - other)).sum(dim=-1).numpy(), abs=1e-5)
    assert np.array_equal(scores.agreement_WT, (first.argmax(dim=-1) == other.argmax(dim=-1)).numpy())
    assert not scores.agreement_WT.all()
    assert not reference.divergence_WT.any()
    assert reference.agreement_WT.all()


def test_padding_changes_no_other_score(gqa_model: Path, ids: Tensor) -> None:
    padded = torch.cat([ids, torch.full((len(ids), 3), PADDING)], dim=1)
    (whole,), (other,) = score([gqa_model], [ids]), score([gqa_model], [padded])
    assert other.loss_WT[:, : ids.shape[1] - 1] == pytest.approx(whole.loss_WT, abs=1e-6)
