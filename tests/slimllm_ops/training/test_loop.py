"""Training in this process: steps are those of a naive loop, checkpoints resume, and what goes wrong ends it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.training.job import TrainingJob
from slimllm_ops.training.local import fit_here
from slimllm_ops.training.losses import divergence
from slimllm_ops.training.outcome import LOSS, Outcome
from slimllm_ops.training.tuned import tuned
from tests.slimllm_ops.training.jobs import make_job, values_of

Told = list[tuple[int, dict[str, float]]]


def fit(job: TrainingJob, folder: Path) -> tuple[Outcome, Told]:
    told: Told = []
    return fit_here(job, folder, lambda step, metrics: told.append((step, metrics))), told


def naive_losses(directory: Path, blocks_BT: np.ndarray, order: list[list[int]], steps: int) -> list[float]:
    """Return the loss of each step of a plain loop over all parameters."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, 0, steps)
    losses = []
    for rows in order:
        ids = torch.from_numpy(blocks_BT[rows].astype(np.int64))
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_steps_are_those_of_a_naive_loop(gqa_model: Path, token_blocks: np.ndarray, tmp_path: Path) -> None:
    # A step reads all of the data, so that their order does not matter.
    blocks_BT = token_blocks[:12]
    job = make_job(tmp_path, gqa_model, blocks_BT, lora=None, batch_size=8, micro_batch_size=2)
    _, told = fit(job, tmp_path / "run")
    found = values_of(told, "loss")
    expected = naive_losses(gqa_model, blocks_BT, [list(range(8))] * 4, steps=4)
    assert list(found) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-5)


def test_a_resumed_training_ends_as_one_that_was_not_interrupted(
    gqa_model: Path, token_blocks: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, gqa_model, token_blocks, steps=6)
    whole, told = fit(job, tmp_path / "whole")

    def fail_at(step: int, metrics: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_here(job, tmp_path / "cut", fail_at)
    resumed, again = fit(job, tmp_path / "cut")
    assert sorted(values_of(again, "loss")) == [5, 6]
    assert (resumed.steps, resumed.losses[0], resumed.losses[6]) == (6, whole.losses[0], whole.losses[6])
    assert values_of(again, "loss")[6] == values_of(told, "loss")[6]


@pytest.mark.parametrize("settings", [{}, {"steps": 40, "learning_rate": 0.3, "patience": 2}], ids=["all", "early"])
def test_a_training_that_is_over_is_not_continued(
    settings: dict[str, Any], gqa_model: Path, token_blocks: np.ndarray, tmp_path: Path
) -> None:
    job = make_job(tmp_path, gqa_model, token_blocks, **settings)
    first, _ = fit(job, tmp_path / "run")
    again, told = fit(job, tmp_path / "run")
    assert not told
    assert (again.steps, again.losses, again.teacher_loss) == (first.steps, first.losses, first.teacher_loss)


@pytest.mark.parametrize("teacher", [False, True])
def test_the_best_and_the_latest_checkpoint_are_kept(
    teacher: bool, mha_model: Path, token_blocks: np.ndarray, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"teacher": mha_model, "loss": divergence} if teacher else {}
    # So high a rate makes the held-out loss rise.
    job = make_job(tmp_path, mha_model, token_blocks, steps=8, learning_rate=0.3, **asked)
    outcome, _ = fit(job, tmp_path / "run")
    best = outcome.best
    assert best is not None
    assert best.metrics[LOSS] == min(loss for step, loss in outcome.losses.items() if step)
    assert {one.metrics["step"] for one in outcome.saved} == {best.metrics["step"], 8}
    assert outcome.teacher_loss == (pytest.approx(outcome.losses[0]) if teacher else None)


def test_a_training_that_gets_no_better_ends_early(mha_model: Path, token_blocks: np.ndarray, tmp_path: Path) -> None:
    job = make_job(tmp_path, mha_model, token_blocks, steps=40, learning_rate=0.3, patience=2)
    outcome, _ = fit(job, tmp_path / "run")
    best = min(outcome.losses, key=lambda step: outcome.losses[step])
    assert outcome.steps == max(best, 0) + 4 < 40


def test_a_training_that_diverges_says_at_which_step(gqa_model: Path, token_blocks: np.ndarray, tmp_path: Path) -> None:
    job = make_job(tmp_path, gqa_model, token_blocks, lora=None, steps=20, learning_rate=1e9)
    outcome, told = fit(job, tmp_path / "run")
    assert outcome.diverged_at is not None
    assert outcome.steps == outcome.diverged_at < 20
    assert all(math.isfinite(one.metrics[LOSS]) for one in outcome.saved)
    assert told[-1][0] == outcome.diverged_at


def test_activations_may_be_computed_again(gqa_model: Path, token_blocks: np.ndarray, tmp_path: Path) -> None:
    job = make_job(tmp_path, gqa_model, token_blocks, steps=2)
    kept, _ = fit(job, tmp_path / "kept")
    again, _ = fit(replace(job, gradient_checkpointing=True), tmp_path / "again")
    assert again.losses == pytest.approx(kept.losses, rel=1e-6)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_tuned_checkpoint_computes_what_the_trainer_did(
    adapters: bool, gqa_model: Path, token_blocks: np.ndarray, tmp_path: Path
) -> None:
    job = make_job(tmp_path, gqa_model, token_blocks)
    outcome, _ = fit(job if adapters else replace(job, lora=None), tmp_path / "run")
    last = max(outcome.saved, key=lambda one: one.metrics["step"])
    checkpoint = Checkpoint.open(gqa_model)
    after = tuned(checkpoint, last.directory)
    model = AutoModelForCausalLM.from_pretrained(gqa_model, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(after.read([name])[name])
        ids = torch.from_numpy(token_blocks[-4:].astype(np.int64))
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(outcome.losses[4], rel=1e-5)
    assert loss != pytest.approx(outcome.losses[0], rel=1e-4)
