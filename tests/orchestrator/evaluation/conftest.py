"""Fixtures for evaluations: a pruned model, a model of another architecture, and a call that evaluates."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from orchestrator.builtin import MODEL_DIR
from orchestrator.evaluation.config import EvaluateConfig
from orchestrator.evaluation.evaluate import Evaluation, evaluate
from orchestrator.evaluation.results import TaskResult
from orchestrator.progress import Reporter
from tests.orchestrator.conftest import PruneModel

Evaluate = Callable[..., Evaluation]

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


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


@pytest.fixture(scope="session")
def pruned_builtin(prune_model: PruneModel) -> Path:
    output = prune_model(MODEL_DIR, calibration="builtin:calibration", samples=4, sequence_length=64).output
    assert isinstance(output, Path)
    return output


@pytest.fixture(scope="session")
def pruned(prune_model: PruneModel, gqa_model: Path) -> Path:
    output = prune_model(gqa_model).output
    assert isinstance(output, Path)
    return output


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that slimllm does not prune, with the vocabulary of the random models."""
    directory = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def evaluate_models(tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """Evaluate models in this process, with a journal and no MLflow, unless told otherwise."""

    def run(*models: Path, told: io.StringIO | None = None, **settings: Any) -> Evaluation:
        output = tmp_path_factory.mktemp("evaluation") / "out"
        defaults = {"tracking_uri": "none", "local": True, "output": str(output)}
        config = EvaluateConfig(models=tuple(map(str, models)), **{**defaults, **settings})
        return evaluate(config, Reporter(Console(file=told or io.StringIO(), width=400)))

    return run


def figure(results: tuple[TaskResult, ...], task: str, metric: str) -> TaskResult:
    (found,) = [one for one in results if (one.task, one.metric) == (task, metric)]
    return found
