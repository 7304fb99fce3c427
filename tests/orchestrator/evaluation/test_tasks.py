"""Tasks of lm-eval: the results are those that lm-eval finds by hand, and a task that cannot be asked is one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.builtin import MODEL_DIR
from orchestrator.data import DataError
from orchestrator.evaluation import tasks as tasks_module
from orchestrator.evaluation.config import PAPER_TASKS, EvaluateConfig
from orchestrator.evaluation.results import TaskResult
from orchestrator.evaluation.tasks import require_tasks
from tests.orchestrator.conftest import PruneModel
from tests.orchestrator.evaluation.conftest import Evaluate

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval, which `make install` installs")

SHARED = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
target_delimiter: ""
"""
CHOICES = """
task: choices
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: rolling
output_type: loglikelihood_rolling
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
CONTINUED = """
task: continued
output_type: generate_until
doc_to_target: "{{target}}"
generation_kwargs: {max_gen_toks: 4, until: ["."]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    words = ["list", "string", "number", "file", "class", "module", "value", "key"]
    questions = [
        {
            "text": f"Return the {word} of a",
            "choices": [f" {one}" for one in words[:4]],
            "answer": number % 4,
            "target": "",
        }
        for number, word in enumerate(words * 3)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    shared = SHARED.format(file=folder / "questions.jsonl")
    for name, task in (("choices", CHOICES), ("rolling", ROLLING), ("continued", CONTINUED)):
        (folder / f"{name}.yaml").write_text(task + shared)
    return folder


@pytest.fixture(scope="module")
def pruned_builtin(prune_model: PruneModel) -> Path:
    output = prune_model(MODEL_DIR, calibration="builtin:calibration", samples=4, sequence_length=64).output
    assert isinstance(output, Path)
    return output


def by_hand(directory: Path, folder: Path) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(directory), "dtype": "float32"},
        tasks=["choices", "rolling", "continued"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
    )
    results: dict[str, Any] = found["results"]
    return results


def figure(results: tuple[TaskResult, ...], task: str, metric: str) -> TaskResult:
    (found,) = [one for one in results if (one.task, one.metric) == (task, metric)]
    return found


@pytest.mark.usefixtures("local_ray")
def test_workers_find_what_lm_eval_finds_by_hand(
    evaluate_models: Evaluate, folder: Path, pruned_builtin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers get several pieces of the requests.
    monkeypatch.setattr(tasks_module, "PIECE", 7)
    tasks = {"tasks": ("choices", "rolling", "continued"), "task_folder": str(folder)}
    models = evaluate_models(MODEL_DIR, pruned_builtin, **tasks, local=False, workers=2, batch_size=5).models
    for directory, model in zip((MODEL_DIR, pruned_builtin), models, strict=True):
        expected = by_hand(directory, folder)
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


def test_fewer_questions_are_asked_if_told(evaluate_models: Evaluate, folder: Path) -> None:
    (model,) = evaluate_models(MODEL_DIR, tasks=("choices",), task_folder=str(folder), limit=6).models
    assert figure(model.tasks, "choices", "acc").questions == 6
    assert model.texts == ()


def test_a_task_that_cannot_be_asked_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    for name, words in (
        ("nonesuch", r"task 'nonesuch' is unknown to lm-eval"),
        ("lost", r"data of task lost cannot be"),
    ):
        (tmp_path / "lost.yaml").write_text(
            CHOICES.replace("task: choices", "task: lost") + SHARED.format(file="/none")
        )
        with pytest.raises(DataError, match=words) as caught:
            require_tasks(EvaluateConfig(models=("x",), tasks=(name,), task_folder=str(tmp_path)))
        assert "\n" not in str(caught.value)


def test_the_paper_s_tasks_have_one_name() -> None:
    assert EvaluateConfig(models=("x",), tasks=("paper", "boolq", "mmlu")).task_names == (*PAPER_TASKS, "mmlu")
