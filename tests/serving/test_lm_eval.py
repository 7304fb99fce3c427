"""lm-eval measures a pruned model as it measures any other: what it finds is what transformers gives by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    {"text": "The cat sat on the", "choices": [" mat", " moon", " tree"], "answer": 0},
    {"text": "Once upon a", "choices": [" dog", " time", " red"], "answer": 1},
    {"text": "She was very", "choices": [" the", " and", " happy"], "answer": 2},
]
TASK = """
task: three_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


@torch.inference_mode()
def log_likelihood(model: Any, tokenizer: Any, text: str, choice: str) -> float:
    before, whole = (tokenizer(one, return_tensors="pt")["input_ids"] for one in (text, text + choice))
    logits = model(whole).logits[0, :-1].log_softmax(dim=-1)
    first = before.shape[1] - 1
    return float(logits.gather(1, whole[0, 1:, None])[first:].sum())


@pytest.mark.slow
def test_what_lm_eval_finds_is_what_transformers_gives(directory: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`: `make serve-test` installs it")
    from lm_eval.tasks import TaskManager

    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "task.yaml").write_text(TASK.format(questions=questions))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(directory), "trust_remote_code": True, "dtype": "float32"},
        tasks=["three_questions"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    right = 0
    for question, sample in zip(QUESTIONS, found["samples"]["three_questions"], strict=True):
        expected = [log_likelihood(loaded, tokenizer, question["text"], choice) for choice in question["choices"]]
        assert [float(answer[0]) for answer in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
        right += max(range(3), key=expected.__getitem__) == question["answer"]
    assert found["results"]["three_questions"]["acc,none"] == pytest.approx(right / 3)
