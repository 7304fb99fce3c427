"""What `tune` reads: the right dense model, data and plan, or one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import DataError
from orchestrator.tuning.config import TuneConfig
from orchestrator.tuning.inputs import TuneInputs, load_tune_inputs
from slimllm_ops.errors import InputError


def ignore(warning: str) -> None:
    pass


def load(checkpoint: Path, warn: Callable[[str], None] = ignore, **settings: Any) -> TuneInputs:
    return load_tune_inputs(TuneConfig(**{"checkpoint": str(checkpoint), **settings}), warn)


@pytest.fixture
def copied(pruned: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the pruned checkpoint, with other parameters in its plan."""

    def copy(**params: Any) -> Path:
        directory = tmp_path / "copied"
        shutil.copytree(pruned, directory)
        plan = directory / "pruning" / "plan.json"
        content = json.loads(plan.read_text())
        content["params"] |= params
        plan.write_text(json.dumps(content))
        return directory

    return copy


def test_the_plan_names_the_dense_model_and_the_text(pruned: Path, gqa_model: Path, token_file: Path) -> None:
    inputs = load(pruned)
    assert inputs.teacher is not None
    assert inputs.teacher.directory == gqa_model
    assert inputs.data.spec == str(token_file)
    # There are 24 blocks; a twentieth is held out.
    assert (len(inputs.data.input_ids_BT), len(inputs.validation.input_ids_BT)) == (23, 1)


def test_text_that_the_pruning_was_calibrated_on_is_told(pruned: Path, token_file: Path, held_out_file: Path) -> None:
    warnings: list[str] = []
    load(pruned, warnings.append)
    assert len(warnings) == 1
    assert warnings[0].startswith(f"the training reads {token_file}, which the pruning was calibrated on")
    load(pruned, warnings.append, data=str(held_out_file))
    assert len(warnings) == 1


def test_held_out_data_may_be_named(pruned: Path, held_out_file: Path) -> None:
    inputs = load(pruned, validation=str(held_out_file))
    assert (len(inputs.data.input_ids_BT), len(inputs.validation.input_ids_BT)) == (24, 10)


def test_a_dense_model_with_other_weights_is_refused(copied: Callable[..., Path]) -> None:
    with pytest.raises(
        InputError, match=r"has the weights .* was pruned from 00000000: pass the model that was pruned"
    ):
        load(copied(model_digest="00000000"))


def test_a_dense_model_that_is_gone_is_told(copied: Callable[..., Path], gqa_model: Path) -> None:
    checkpoint = copied(model="/no/such/model")
    with pytest.raises(InputError, match=r"the dense model /no/such/model cannot be read.*--teacher MODEL"):
        load(checkpoint)
    assert load(checkpoint, teacher=str(gqa_model)).teacher is not None


def test_what_has_no_teacher_is_measured_beside_the_dense_model_if_that_can_be_read(
    pruned: Path, copied: Callable[..., Path], gqa_model: Path, token_file: Path
) -> None:
    asked = {"method": "full", "evaluate": (str(token_file),)}
    inputs = load(pruned, **asked)
    assert inputs.teacher is None
    assert inputs.dense is not None
    assert inputs.dense.directory == gqa_model
    assert load(pruned, method="full").dense is None

    warnings: list[str] = []
    gone = copied(model="/no/such/model")
    assert load(gone, warnings.append, **asked).dense is None
    assert warnings[0].startswith("how much of the loss comes back will not be known: the dense model /no/such/model")
    assert load(gone, teacher=str(gqa_model), **asked).dense is not None


def test_a_teacher_with_another_vocabulary_is_refused(pruned: Path, make_llama: Callable[..., Path]) -> None:
    other = make_llama(vocab_size=98)
    with pytest.raises(InputError, match=r"another vocabulary \(98 tokens\).*\(97\)"):
        load(pruned, teacher=str(other))


def test_any_teacher_with_the_same_vocabulary_will_do(pruned: Path, mha_model: Path) -> None:
    teacher = load(pruned, teacher=str(mha_model)).teacher
    assert teacher is not None
    assert teacher.directory == mha_model
    with pytest.raises(InputError, match="pass the model that was pruned"):
        load(pruned, teacher=str(mha_model), method="blocks")


def test_text_that_the_model_sampled_has_to_be_replaced(copied: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"calibrated on self:8, which the dense model sampled: pass text as --data"):
        load(copied(calibration="self:8"))


def test_instructions_have_to_be_named(pruned: Path) -> None:
    with pytest.raises(DataError, match="no data are named: pass instructions to train on as --data SPEC"):
        load(pruned, method="lora")


@pytest.mark.parametrize("method", ["lora", "blocks"])
def test_a_model_that_was_not_pruned_is_refused_by_what_trains_pruned_modules(method: str, gqa_model: Path) -> None:
    with pytest.raises(InputError, match=f"not a model that slimllm pruned, and --method {method}"):
        load(gqa_model, method=method, data="x")


def test_a_plan_that_is_missing_is_told(copied: Callable[..., Path]) -> None:
    checkpoint = copied()
    (checkpoint / "pruning" / "plan.json").unlink()
    with pytest.raises(InputError, match=r"plan.json cannot be read .* pass the whole directory"):
        load(checkpoint)
