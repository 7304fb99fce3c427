"""Evaluations from start to end: the figures are those of a plain loop over transformers, for any architecture."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator import ReportConfig, report
from orchestrator.builtin import MODEL_DIR
from orchestrator.data import DataError
from orchestrator.evaluation.evaluate import Evaluation
from orchestrator.evaluation.results import TextResult
from tests.orchestrator.evaluation.conftest import Evaluate


@pytest.fixture(scope="module")
def evaluation(evaluate_models: Evaluate, gqa_model: Path, pruned: Path, gpt2: Path, token_file: Path) -> Evaluation:
    return evaluate_models(gqa_model, pruned, gpt2, data=(str(token_file),))


def loss_of(directory: Path, blocks_BT: np.ndarray) -> float:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.from_numpy(blocks_BT.astype(np.int64))
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def text_of(evaluation: Evaluation, number: int) -> TextResult:
    (text,) = evaluation.models[number].texts
    return text


def test_perplexity_is_that_of_a_plain_loop(
    evaluation: Evaluation, gqa_model: Path, pruned: Path, gpt2: Path, token_blocks: np.ndarray
) -> None:
    for number, directory in enumerate((gqa_model, pruned, gpt2)):
        text = text_of(evaluation, number)
        assert text.loss == pytest.approx(loss_of(directory, token_blocks), abs=1e-5)
        assert text.perplexity == pytest.approx(math.exp(text.loss))
        assert text.tokens == token_blocks[:, 1:].size
        assert text.bits_per_byte is None


def test_others_are_compared_with_the_first(evaluation: Evaluation) -> None:
    first, pruned, gpt2 = (text_of(evaluation, number) for number in range(3))
    assert first.distance is None
    for one in (pruned, gpt2):
        assert one.distance is not None
        assert one.distance.loss.mean == pytest.approx(one.loss - first.loss, abs=1e-6)
        assert one.distance.mean > 0
        assert sorted(one.distance.percentiles.values()) == list(one.distance.percentiles.values())
        assert 0 <= one.distance.agreement < 1


def test_any_number_of_workers_finds_the_same(
    evaluation: Evaluation, evaluate_models: Evaluate, gqa_model: Path, pruned: Path, token_file: Path
) -> None:
    again = evaluate_models(gqa_model, pruned, data=(str(token_file),), workers=3)
    for number in range(2):
        one, other = text_of(evaluation, number), text_of(again, number)
        assert other.loss == pytest.approx(one.loss, abs=1e-6)
        assert (other.distance and other.distance.mean) == pytest.approx(one.distance and one.distance.mean, abs=1e-6)


@pytest.mark.usefixtures("local_ray")
def test_workers_on_ray_find_the_same(
    evaluation: Evaluation, evaluate_models: Evaluate, gqa_model: Path, pruned: Path, token_file: Path
) -> None:
    again = evaluate_models(gqa_model, pruned, data=(str(token_file),), local=False, workers=2)
    assert text_of(again, 1).loss == pytest.approx(text_of(evaluation, 1).loss, abs=1e-6)


def test_text_is_measured_in_windows_and_in_bits_per_byte(evaluate_models: Evaluate, tmp_path: Path) -> None:
    words = "The tokenizer cuts é and 東京 into bytes. " * 40
    path = tmp_path / "text.txt"
    path.write_text(words)
    settings = {"data": (str(path),), "length": (32, 64), "stride": 16}
    short, long = evaluate_models(MODEL_DIR, **settings).models[0].texts
    ids = AutoTokenizer.from_pretrained(MODEL_DIR)(words)["input_ids"]
    assert (short.length, long.length, short.stride) == (32, 64, 16)
    assert long.loss == pytest.approx(strided_loss(ids, 64, 16), abs=1e-5)
    # All of the text counts but its first token, and what is left of the last window.
    num_bytes = len(words.encode()) * long.tokens / (len(ids) - 1)
    assert long.bits_per_byte == pytest.approx(long.loss * long.tokens / math.log(2) / num_bytes, rel=0.02)


def strided_loss(ids: list[int], length: int, stride: int) -> float:
    """The mean loss by the definition: the last tokens of each window count, and all of the first window."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    whole = torch.tensor(ids[: len(ids) // length * length])
    losses: list[torch.Tensor] = []
    for start in range(0, len(whole) - length + 1, stride):
        window = whole[start : start + length]
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0, :-1]
        lost = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        losses.append(lost if start == 0 else lost[-stride:])
    return float(torch.cat(losses).double().mean())


def test_another_vocabulary_is_told_and_not_compared(
    evaluate_models: Evaluate, gqa_model: Path, make_llama: object, token_file: Path
) -> None:
    assert callable(make_llama)
    told = io.StringIO()
    evaluation = evaluate_models(gqa_model, make_llama(vocab_size=128), told=told, data=(str(token_file),))
    assert text_of(evaluation, 1).distance is None
    assert "has another vocabulary" in told.getvalue()


def test_tables_have_all_figures(evaluation: Evaluation) -> None:
    document = json.loads((evaluation.output / "evaluation.json").read_text())
    first, pruned, _ = document["models"]
    assert first["perplexity"][0]["value"] == text_of(evaluation, 0).perplexity
    assert pruned["perplexity"][0]["distance"]["agreement"] == evaluation.models[1].texts[0].distance.agreement
    assert pruned["perplexity"][0]["kl"] == evaluation.models[1].texts[0].distance.mean
    assert document["params"]["model_digests"].split(", ")[1] == pruned["digest"]
    rows = list(csv.DictReader((evaluation.output / "evaluation.csv").open()))
    found = {(row["model"], row["metric"]): float(row["value"]) for row in rows}
    name = f"perplexity/tokens.parquet/{text_of(evaluation, 0).length}"
    assert found[first["model"], name] == text_of(evaluation, 0).perplexity
    markdown = (evaluation.output / "evaluation.md").read_text()
    assert f"{text_of(evaluation, 1).distance.mean:.4f}" in markdown


def test_a_report_shows_it(evaluation: Evaluation, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert report(ReportConfig(runs=(str(evaluation.output),), output=str(page))).evaluations == 3
    assert f"{evaluation.models[1].texts[0].distance.mean:.4f}" in page.read_text()


def test_a_stride_is_for_running_text(evaluate_models: Evaluate, gqa_model: Path, token_file: Path) -> None:
    with pytest.raises(DataError, match=r"has rows of tokens, and a stride is for running text"):
        evaluate_models(gqa_model, data=(str(token_file),), stride=4)
