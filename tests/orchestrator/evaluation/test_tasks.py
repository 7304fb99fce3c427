"""Tasks of lm-eval: the results are those that lm-eval finds by hand, and a task that cannot be asked is one line."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.builtin import MODEL_DIR
from orchestrator.data import DataError
from orchestrator.evaluation import tasks as tasks_module
from orchestrator.evaluation.asking import PAPER_TASKS, TaskOptions, task_names
from orchestrator.evaluation.tasks import require_tasks
from tests.orchestrator.evaluation.conftest import CHOICES, SHARED, Evaluate, figure

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval, which `make install` installs")


def by_hand(directory: Path, task_folder: Path) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(directory), "dtype": "float32"},
        tasks=["choices", "rolling", "continued"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(task_folder), include_defaults=False),
        device="cpu",
    )
    results: dict[str, Any] = found["results"]
    return results


@pytest.mark.usefixtures("local_ray")
def test_workers_find_what_lm_eval_finds_by_hand(
    evaluate_models: Evaluate, task_folder: Path, pruned_builtin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers get several pieces of the requests.
    monkeypatch.setattr(tasks_module, "PIECE", 7)
    tasks = {"tasks": ("choices", "rolling", "continued"), "task_folder": str(task_folder)}
    models = evaluate_models(MODEL_DIR, pruned_builtin, **tasks, local=False, workers=2, batch_size=5).models
    for directory, model in zip((MODEL_DIR, pruned_builtin), models, strict=True):
        expected = by_hand(directory, task_folder)
        for task, metric in (("choices", "acc"), ("choices", "acc_norm"), ("continued", "exact_match")):
            found = figure(model.tasks, task, metric)
            assert found.value == pytest.approx(expected[task][f"{metric},none"])
            assert found.stderr == pytest.approx(expected[task][f"{metric}_stderr,none"])
            assert found.questions == 24
        rolling = figure(model.tasks, "rolling", "bits_per_byte")
        assert rolling.value == pytest.approx(expected["rolling"]["bits_per_byte,none"], rel=1e-5)
        assert rolling.difference is None
    first, other = (figure(one.tasks, "choices", "acc") for one in models)
    assert first.difference is None
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(other.value - first.value)


def test_fewer_questions_are_asked_if_told(evaluate_models: Evaluate, task_folder: Path) -> None:
    (model,) = evaluate_models(MODEL_DIR, tasks=("choices",), task_folder=str(task_folder), limit=6).models
    assert figure(model.tasks, "choices", "acc").questions == 6
    assert model.texts == ()


def test_a_task_that_cannot_be_asked_is_told_in_one_line(task_folder: Path, tmp_path: Path) -> None:
    for name, words in (
        ("nonesuch", r"task 'nonesuch' is unknown to lm-eval"),
        ("lost", r"data of task lost cannot be"),
    ):
        (tmp_path / "lost.yaml").write_text(
            CHOICES.replace("task: choices", "task: lost") + SHARED.format(file="/none")
        )
        with pytest.raises(DataError, match=words) as caught:
            require_tasks(TaskOptions(names=(name,), folder=str(tmp_path), limit=None))
        assert "\n" not in str(caught.value)


def test_the_paper_s_tasks_have_one_name() -> None:
    assert task_names(("paper", "boolq", "mmlu")) == (*PAPER_TASKS, "mmlu")
