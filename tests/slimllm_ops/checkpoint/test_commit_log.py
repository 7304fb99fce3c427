"""The commit log, when opened again, continues exactly where it ended."""

from pathlib import Path

import numpy as np
import pytest
import torch

from slimllm_ops.checkpoint.commit_log import CommitLog
from slimllm_ops.decide.least_squares import Refit
from slimllm_ops.decide.plan import Decision, LayerPlan
from tests.slimllm_ops.naive import random_decision

STATES = np.random.default_rng(0).normal(size=(4, 5, 8)).astype(np.float32)


def test_what_is_committed_is_there_again_to_the_last_bit(tmp_path: Path) -> None:
    plans = [
        LayerPlan(attention=random_decision(0, [0, 2], 4), mlp=random_decision(1, range(3, 40), 48), similarity=1 / 3),
        LayerPlan(),
    ]
    log = CommitLog(tmp_path / "log")
    log.begin(np.arange(5), STATES[0])
    for plan, state in zip(plans, STATES[1:], strict=False):
        log.commit(plan, state)

    again = CommitLog(tmp_path / "log")
    assert len(again) == 2
    assert [plan.describe() for plan in again.plans] == [plan.describe() for plan in plans]
    probe = again.probe()
    assert np.array_equal(probe.ids_T, np.arange(5))
    assert all(np.array_equal(*pair) for pair in zip(probe.states_TD, STATES[:3], strict=True))
    again.commit(LayerPlan(), STATES[3])
    assert np.array_equal(CommitLog(tmp_path / "log").last_state(), STATES[3])


def test_layers_that_are_dropped_are_committed_but_not_followed(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)
    log.begin(np.arange(5), STATES[0])
    for dropped, state in ((True, STATES[0]), (False, STATES[1]), (True, STATES[1])):
        log.commit(LayerPlan(dropped=dropped), state)
    again = CommitLog(tmp_path)
    assert (len(again), again.num_kept) == (3, 1)
    assert all(np.array_equal(*pair) for pair in zip(again.probe().states_TD, STATES[:2], strict=True))


def test_a_layer_without_its_record_was_not_committed(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)
    log.begin(np.arange(5), STATES[0])
    log.commit(LayerPlan(), STATES[1])
    # A process that was killed between the two files.
    (tmp_path / "layer-00001.npy").write_bytes((tmp_path / "layer-00000.npy").read_bytes())
    again = CommitLog(tmp_path)
    assert len(again) == 1
    assert np.array_equal(again.last_state(), STATES[1])


def test_the_weights_of_a_refit_are_not_held(tmp_path: Path) -> None:
    refit = Refit(torch.ones(3, 8), torch.ones(8), 0.5)
    log = CommitLog(tmp_path)
    log.begin(np.arange(5), STATES[0])
    log.commit(LayerPlan(mlp=Decision((0, 1, 2), (1.0, 2.0, 3.0, 0.0), refit, 0.5)), STATES[1])
    for known in (log, CommitLog(tmp_path)):
        decision = known.plans[0].mlp
        assert decision is not None
        assert decision.recovery is None
        assert decision.kept == (0, 1, 2)


@pytest.mark.parametrize("content", [b"", bytes(90), b"{", b"[]", b"{}", b"\xff\xfe", b"\x93NUMPY"])
@pytest.mark.parametrize(
    ("name", "whole"), [("layer-00001.json", 1), ("layer-00001.npy", 1), ("layer-00000.json", 0), ("start.npz", 0)]
)
def test_the_log_ends_before_the_first_damaged_record(tmp_path: Path, content: bytes, name: str, whole: int) -> None:
    log = CommitLog(tmp_path)
    log.begin(np.arange(5), STATES[0])
    for state in STATES[1:]:
        log.commit(LayerPlan(), state)
    (tmp_path / name).write_bytes(content)
    again = CommitLog(tmp_path)
    assert len(again) == whole
    # What comes after it does not come back.
    again.begin(np.arange(5), STATES[0])
    for state in STATES[1 + whole : 3]:
        again.commit(LayerPlan(dropped=True), state)
    assert [plan.dropped for plan in CommitLog(tmp_path).plans] == [False] * whole + [True] * (2 - whole)
