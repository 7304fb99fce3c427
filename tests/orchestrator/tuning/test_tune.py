"""Tuning from start to end: what each method writes, and what becomes of a training that helps nobody."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator.pruning.targets import Draft
from orchestrator.tuning.tune import TuneResult
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.training.local import LocalSession
from tests.conftest import content
from tests.elsewhere import Elsewhere
from tests.orchestrator.conftest import PruneModel
from tests.orchestrator.tuning.conftest import Tune

METHODS: dict[str, dict[str, Any]] = {
    "distil": {"method": "distil"},
    "distil --full": {"method": "distil", "full": True},
    "full": {"method": "full"},
    "blocks": {"method": "blocks", "epochs": 2},
}


@pytest.fixture(scope="module", params=METHODS)
def tuned(request: pytest.FixtureRequest, tune_model: Tune, held_out_file: Path) -> TuneResult:
    """The checkpoint tuned by a method, evaluated on other tokens; no method tells the random model's tokens apart."""
    return tune_model(**METHODS[request.param], evaluate=(str(held_out_file),), keep_worse=True)


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in sorted(directory.glob("*.safetensors")) for name, one in load_file(path).items()}


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def loss_of(directory: Path, blocks_BT: np.ndarray) -> float:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.from_numpy(blocks_BT.astype(np.int64))
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_the_tuned_checkpoint_has_the_same_tensors_with_other_values(tuned: TuneResult, pruned: Path) -> None:
    assert isinstance(tuned.output, Path)
    before, after = weights_of(pruned), weights_of(tuned.output)
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape and before[name].dtype == after[name].dtype for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert config_of(tuned.output) == config_of(pruned)


def test_the_perplexities_are_those_of_transformers(
    tuned: TuneResult, pruned: Path, gqa_model: Path, held_out_file: Path, held_out_blocks: np.ndarray
) -> None:
    totals = tuned.totals
    assert totals is not None
    assert isinstance(tuned.output, Path)
    found = totals.perplexity[str(held_out_file)]
    expected = [math.exp(loss_of(one, held_out_blocks)) for one in (gqa_model, pruned, tuned.output)]
    assert list(found) == pytest.approx(expected, rel=1e-4)


def test_the_record_says_what_was_done(tuned: TuneResult, pruned: Path) -> None:
    assert isinstance(tuned.output, Path)
    assert tuned.totals is not None
    before, after = (json.loads((one / "pruning" / "plan.json").read_text()) for one in (pruned, tuned.output))
    (done,) = after.pop("tuned")
    assert after == before
    assert done["params"]["checkpoint"] == str(pruned)
    assert done["totals"]["loss_after"] == tuned.totals.loss_after
    card = (tuned.output / "README.md").read_text()
    assert card.startswith((pruned / "README.md").read_text().rstrip())
    assert "## Tuned" in card
    assert f"{tuned.totals.loss_after:.4f}" in card
    assert (tuned.output / "pruning" / "importance.parquet").is_file()


def test_a_tuned_checkpoint_loads_where_slimllm_is_not_installed(
    tune_model: Tune, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    output = tune_model(keep_worse=True).output
    program = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(output)!r}, trust_remote_code=True)
print(type(model).__name__)
"""
    ended = elsewhere.run(program, tmp_path)
    assert (ended.code, ended.stdout.strip()) == (0, "PrunedLlamaForCausalLM"), ended.stderr


def test_training_on_text_lowers_its_loss(tune_model: Tune, token_file: Path) -> None:
    """A random model can be taught the very tokens that it is measured on."""
    asked = {"validation": str(token_file), "steps": 20}
    totals = tune_model(method="full", **asked).totals
    assert totals is not None
    assert (totals.kept, totals.best_step) == (True, 20)
    assert totals.loss_after < totals.loss_before - 0.2


@pytest.fixture(scope="module")
def calm(make_llama: Callable[..., Path], prune_model: PruneModel) -> Path:
    """A pruned model that knows nothing of random tokens, and whose every change makes it worse."""
    output = prune_model(make_llama(initializer_range=0.01)).output
    assert isinstance(output, Path)
    return output


def test_a_training_that_makes_nothing_better_keeps_the_weights(tune_model: Tune, calm: Path) -> None:
    told = io.StringIO()
    result = tune_model(calm, told=told, method="full", learning_rate=0.5)
    assert isinstance(result.output, Path)
    assert result.totals is not None
    assert not result.totals.kept
    assert "no step made the held-out loss less" in told.getvalue()
    assert "--keep-worse" in told.getvalue()
    before, after = weights_of(calm), weights_of(result.output)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "weights are those from before" in (result.output / "README.md").read_text()


def test_a_training_that_diverges_is_refused(tune_model: Tune, calm: Path) -> None:
    said = r"not finite at step \d+ with learning rate 1e\+30.*pass a lower --learning-rate"
    with pytest.raises(NonFiniteError, match=said):
        tune_model(calm, method="full", learning_rate=1e30)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_is_resumed_to_the_same_bytes(
    method: str, tune_model: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**METHODS[method], "keep_worse": True}
    whole, again = tune_model(**asked).output, {**asked, "output": str(tmp_path / "out"), "resume": True}
    with monkeypatch.context() as patch:
        interrupt_after(2, LocalSession, "save", patch)
        interrupt_after(2, Draft, "commit_tensors", patch)
        with pytest.raises(KeyboardInterrupt):
            tune_model(**again)
    resumed = tune_model(**again).output
    assert isinstance(whole, Path)
    assert isinstance(resumed, Path)
    assert content(resumed) == content(whole)


def interrupt_after(calls: int, kind: type, name: str, patch: pytest.MonkeyPatch) -> None:
    """Let a call of a method be followed by Ctrl-C."""
    method, made = getattr(kind, name), []

    def call(*arguments: Any, **named: Any) -> Any:
        done = method(*arguments, **named)
        made.append(name)
        if len(made) == calls:
            raise KeyboardInterrupt
        return done

    patch.setattr(kind, name, call)


def test_the_same_training_writes_the_same_bytes(tune_model: Tune) -> None:
    first, second = (tune_model(keep_worse=True).output for _ in range(2))
    assert isinstance(first, Path)
    assert isinstance(second, Path)
    assert content(first) == content(second)


def test_a_model_that_was_not_pruned_is_tuned_whole(tune_model: Tune, gqa_model: Path, token_file: Path) -> None:
    told = io.StringIO()
    result = tune_model(gqa_model, told=told, method="full", data=str(token_file), keep_worse=True)
    assert isinstance(result.output, Path)
    assert "is not a model that slimllm pruned" in told.getvalue()
    assert weights_of(result.output).keys() == weights_of(gqa_model).keys()
    assert type(AutoModelForCausalLM.from_pretrained(result.output)).__name__ == "LlamaForCausalLM"
    assert "## Tuned" in (result.output / "README.md").read_text()
