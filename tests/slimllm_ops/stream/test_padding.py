"""Padding at the end of blocks is in no sum: rows of several lengths give what they give one by one."""

from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.moments.sums import DensePass, Mean
from slimllm_ops.stream.padding import PADDING, count_tokens, filled
from slimllm_ops.stream.passes import LayerStream
from tests.slimllm_ops.naive import observations
from tests.slimllm_ops.stream.whole import NUM_LAYERS

CPU = torch.device("cpu")
LENGTHS = (7, 1, 12)


@pytest.fixture
def padded(ids: torch.Tensor) -> list[torch.Tensor]:
    """Two batches of rows of several lengths, the first of fewer rows, and one without padding."""
    rows = ids[: len(LENGTHS), :12].clone()
    for row, length in zip(rows, LENGTHS, strict=True):
        row[length:] = PADDING
    return [rows[:2], rows[2:], ids[5:6, :12]]


def one_by_one(checkpoint: Checkpoint, padded: list[torch.Tensor]) -> list[LayerStream]:
    """A stream for each row, without padding."""
    rows = [row[row != PADDING][None] for rows in padded for row in rows]
    return [LayerStream(checkpoint, [row], CPU, measures_change=True) for row in rows]


def assert_same_mean(found: Mean, expected: Mean) -> None:
    assert found.count == expected.count
    assert found.total == pytest.approx(expected.total, rel=1e-5)


def test_padded_rows_give_the_moments_of_the_rows_alone(model_dir: Path, padded: list[torch.Tensor]) -> None:
    checkpoint = Checkpoint.open(model_dir)
    stream, alone = LayerStream(checkpoint, padded, CPU, measures_change=True), one_by_one(checkpoint, padded)
    holding = LayerStream(checkpoint, padded, CPU)
    for layer in range(NUM_LAYERS):
        for branch in (checkpoint.family.attention, checkpoint.family.mlp):
            found = stream.observe_dense(layer, branch)
            expected = reduce(DensePass.merge, [one.observe_dense(layer, branch) for one in alone])
            found.require_tokens(sum(LENGTHS) + 12)
            assert found.change is not None
            assert expected.change is not None
            assert_same_mean(found.power, expected.power)
            assert_same_mean(found.change, expected.change)
            held = holding.observe(layer, branch)
            assert_same_mean(holding.apply(layer, branch, None), expected.power)
            for one in (found.observed, held):
                for seen, right in zip(*map(observations, (one, expected.observed)), strict=True):
                    assert seen.moments.count == right.moments.count
                    np.testing.assert_allclose(seen.moments.mean_P, right.moments.mean_P, rtol=1e-4, atol=1e-5)
                    np.testing.assert_allclose(seen.input_squares_D, right.input_squares_D, rtol=1e-4, atol=1e-6)
                    for row, right_row in zip(seen.moments.rows, right.moments.rows, strict=True):
                        np.testing.assert_allclose(row, right_row, rtol=1e-3, atol=1e-4 * np.abs(right_row).max())


def test_the_likelihood_of_padded_rows_is_that_of_transformers_with_a_mask(
    model_dir: Path, padded: list[torch.Tensor]
) -> None:
    checkpoint = Checkpoint.open(model_dir)
    stream, alone = LayerStream(checkpoint, padded, CPU), one_by_one(checkpoint, padded)
    for layer in range(NUM_LAYERS):
        assert_same_mean(stream.forward(layer), reduce(Mean.merge, [one.forward(layer) for one in alone]))
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    total = 0.0
    for rows in padded:
        mask = rows != PADDING
        with torch.inference_mode():
            logits = model(input_ids=rows.clamp(min=0), attention_mask=mask.long()).logits[:, :-1]
        chosen = mask[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits[chosen], rows[:, 1:][chosen], reduction="sum")
        total += float(losses)
    found = stream.negative_log_likelihood()
    assert found.count == sum(length - 1 for length in (*LENGTHS, 12))
    assert found.total == pytest.approx(total, rel=1e-5)


def test_the_probe_holds_no_padding(model_dir: Path, padded: list[torch.Tensor]) -> None:
    stream = LayerStream(Checkpoint.open(model_dir), padded, CPU)
    assert stream.probed_ids().tolist() == padded[0][0, : LENGTHS[0]].tolist()
    assert np.array_equal(stream.probe(), stream.hidden[0][0, : LENGTHS[0]].numpy())


def test_padding_is_filled_with_a_token_of_its_block() -> None:
    ids = torch.tensor([[5, 6, PADDING], [7, PADDING, PADDING]])
    assert filled(ids).tolist() == [[5, 6, 5], [7, 7, 7]]
    assert count_tokens(ids.numpy()) == 3
