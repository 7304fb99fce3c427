"""Tasks that a pruning or a comparison asks: the results are those of `evaluate`, and every record has them."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from actors.group import ShardGroup
from orchestrator import CompareConfig, PruneConfig, compare
from orchestrator.builtin import MODEL_DIR
from orchestrator.config import ConfigError
from orchestrator.evaluation.results import TaskResult
from orchestrator.pruning import finish
from tests.orchestrator.conftest import PruneModel
from tests.orchestrator.evaluation.conftest import Evaluate, figure

pytest.importorskip("lm_eval", reason="needs lm-eval, which `make install` installs")

SMALL = {"calibration": "builtin:calibration", "samples": 4, "sequence_length": 64}


@pytest.fixture
def asked(task_folder: Path) -> dict[str, Any]:
    return {"tasks": ("choices",), "task_folder": str(task_folder), "limit": 12}


def values_of(results: tuple[TaskResult, ...]) -> dict[str, float]:
    return {one.name: one.value for one in results}


def test_a_pruning_asks_the_dense_and_the_pruned_model(
    prune_model: PruneModel, evaluate_models: Evaluate, asked: dict[str, Any]
) -> None:
    result = prune_model(MODEL_DIR, **SMALL, **asked)
    models = evaluate_models(MODEL_DIR, Path(result.output), **asked).models
    dense, pruned = zip(*result.totals.tasks, strict=True)
    assert (dense, pruned) == (models[0].tasks, models[1].tasks)
    accuracy = figure(pruned, "choices", "acc")
    assert accuracy.questions == 12
    assert accuracy.difference is not None
    pruning = Path(result.output) / "pruning"
    written = json.loads((pruning / "plan.json").read_text())["totals"]["tasks"]
    assert [pair[1]["value"] for pair in written] == [one.value for one in pruned]
    assert result.totals.metrics()["choices/acc_after"] == accuracy.value
    assert f"| choices, acc | {dense[0].value:.4f} |" in (Path(result.output) / "README.md").read_text()
    assert "choices, acc_norm" in (pruning / "report.html").read_text()


def test_a_sweep_has_a_column_for_each_metric(prune_model: PruneModel, asked: dict[str, Any]) -> None:
    result = prune_model(MODEL_DIR, method="gram", sparsity=(0.2, 0.6), **SMALL, **asked)
    with (Path(result.output) / "pruning" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [
        values_of(results) for results in (tuple(one for one, _ in result.totals.tasks), *map(pruned_of, result.models))
    ]
    assert [{name: float(row[name]) for name in ("choices, acc", "choices, acc_norm")} for row in rows] == expected


def pruned_of(model: Any) -> tuple[TaskResult, ...]:
    return tuple(after for _, after in model.totals.tasks)


def test_a_resumed_run_asks_only_what_was_not_answered(
    prune_model: PruneModel, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    opening = ShardGroup.open_answering

    def count(self: ShardGroup, name: str, *rest: Any) -> int:
        opened.append(name)
        return opening(self, name, *rest)

    def lost(*_: object) -> None:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(ShardGroup, "open_answering", count)
    settings = {**SMALL, **asked, "output": str(tmp_path / "out")}
    with monkeypatch.context() as patched:
        patched.setattr(finish, "count_totals", lost)
        with pytest.raises(RuntimeError, match="gone"):
            prune_model(MODEL_DIR, **settings)
    assert [name.partition(",")[0] for name in opened] == ["dense", "."]
    assert len(prune_model(MODEL_DIR, **settings, resume=True).totals.tasks) == 2
    assert len(opened) == 2


def test_a_comparison_asks_every_model(evaluate_models: Evaluate, asked: dict[str, Any], tmp_path: Path) -> None:
    config = CompareConfig(
        sparsity=(0.3,),
        methods=("gram",),
        evaluate=("builtin:heldout",),
        evaluate_tokens=256,
        keep_checkpoints=True,
        local=True,
        tracking_uri="none",
        output=str(tmp_path / "out"),
        **SMALL,
        **asked,
    )
    comparison = compare(config)
    checkpoints = sorted((comparison.output / "checkpoints").iterdir(), reverse=True)
    models = evaluate_models(MODEL_DIR, *checkpoints, **asked).models
    assert [one.method for one in comparison.tasks] == ["dense", "slimllm", "gram"]
    assert [one.results for one in comparison.tasks] == [one.tasks for one in models]
    rows = json.loads((comparison.output / "comparison.json").read_text())["tasks"]
    assert [row["value"] for row in rows] == [one.value for model in models for one in model.tasks]
    assert "## choices: acc, 12 questions" in (comparison.output / "comparison.md").read_text()
    assert "choices" in (comparison.output / "report.html").read_text()


@pytest.mark.parametrize("kind", [PruneConfig, CompareConfig])
def test_settings_of_tasks_need_tasks(kind: type[PruneConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit is for tasks, and none is named"):
        kind(limit=3)
    with pytest.raises(ConfigError, match="is not a folder"):
        kind(tasks=("mine",), task_folder=str(tmp_path / "lost"))
