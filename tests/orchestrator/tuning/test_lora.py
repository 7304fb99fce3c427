"""LoRA on instructions: only responses count, adapters are merged, rows may be packed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.builtin import MODEL_DIR
from orchestrator.data import DataError
from orchestrator.tuning.config import TuneConfig
from orchestrator.tuning.inputs import load_tune_inputs
from tests.orchestrator.conftest import PruneModel
from tests.orchestrator.tuning.conftest import Tune

ROWS = [{"instruction": f"Add {n} and {n}.", "input": "", "output": f"The sum is {2 * n}."} for n in range(40)]


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture(scope="module")
def speaking(make_llama: Callable[..., Path], prune_model: PruneModel, instructions: Path) -> Path:
    """A pruned random model with the built-in model's tokenizer."""
    settings = json.loads((MODEL_DIR / "config.json").read_text())
    named = {name: settings[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    model = make_llama(**named, max_position_embeddings=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, model)
    output = prune_model(model, method="gram", calibration=str(instructions), sequence_length=32, samples=8).output
    assert isinstance(output, Path)
    return output


def test_responses_are_learnt_and_the_adapters_merged(speaking: Path, instructions: Path, tune_model: Tune) -> None:
    asked = {"data": str(instructions), "validation": str(instructions), "steps": 30, "rank": 4}
    result = tune_model(speaking, method="lora", batch_size=8, **asked)
    assert isinstance(result.output, Path)
    assert result.totals is not None
    assert result.totals.kept
    assert result.totals.loss_after < result.totals.loss_before - 0.5
    assert not list(result.output.glob("adapter*"))
    assert "LoRA of rank 4" in (result.output / "README.md").read_text()


def test_rows_are_packed_if_asked(speaking: Path, instructions: Path) -> None:
    config = {"checkpoint": str(speaking), "method": "lora", "data": str(instructions)}
    apart = load_tune_inputs(TuneConfig(**config), lambda text: None).data
    packed = load_tune_inputs(TuneConfig(**config, pack=True), lambda text: None).data
    assert len(packed.input_ids_BT) < len(apart.input_ids_BT)


def test_data_without_responses_are_refused(speaking: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "no instruction"}\n')
    config = TuneConfig(checkpoint=str(speaking), method="lora", data=str(tmp_path / "text.jsonl"))
    with pytest.raises(DataError):
        load_tune_inputs(config, lambda text: None)
