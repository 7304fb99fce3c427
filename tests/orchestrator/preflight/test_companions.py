"""A run says before it computes anything what stands beside the weights and cannot come along."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from orchestrator import PruneConfig, prune
from orchestrator.pipeline import PruneResult
from orchestrator.preflight.dry_run import plan_pruning
from orchestrator.progress import Reporter
from slimllm_ops.checkpoint import tokenizer
from slimllm_ops.checkpoint.companions import Companions
from slimllm_ops.errors import CheckpointError, ReadBackError
from tests.conftest import content
from tests.elsewhere import Elsewhere

PruneModel = Callable[..., PruneResult]


@pytest.fixture
def model(gqa_model: Path, shared: Path, tmp_path: Path) -> Path:
    """A model with a tokenizer and a folder of licences."""
    directory = shutil.copytree(gqa_model, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "models/stories260k-gqa" / name, directory / name)
    (directory / "LICENSES").mkdir()
    (directory / "LICENSES/Apache-2.0.txt").write_text("free")
    return directory


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
def test_a_pipe_is_refused_before_anything_is_written(
    model: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry: bool
) -> None:
    os.mkfifo(model / "NOTICE")
    asked = PruneConfig(
        model=str(model), output=str(tmp_path / "out" / "pruned"), calibration=str(token_file), sparsity=(0.3,),
        local=True, tracking_uri="none",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="NOTICE stands beside the weights and cannot be copied"):
        (plan_pruning if dry else prune)(asked, Reporter(Console(file=io.StringIO())))
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_one_line(model: Path, token_file: Path, tmp_path: Path) -> None:
    (model / "onnx").mkdir()
    (model / "onnx/model.onnx").touch()
    (model / "tokenization_mine.py").touch()
    printed = io.StringIO()
    asked = PruneConfig(
        model=str(model), output=str(tmp_path / "pruned"), calibration=str(token_file), sparsity=(0.3,), local=True,
        tracking_uri="none",
    )  # fmt: skip
    plan_pruning(asked, Reporter(Console(file=printed)))
    line = f"not copied from {model}: tokenization_mine.py (code), onnx/ (dense weights)"
    assert printed.getvalue().splitlines().count(line) == 1


@pytest.mark.parametrize("refine", [False, True])
def test_a_run_writes_the_sources_tokenizer_and_its_licences(
    model: Path, prune_model: PruneModel, elsewhere: Elsewhere, tmp_path: Path, refine: bool
) -> None:
    # As hub files do; the model's type makes transformers take another class.
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizer"}))
    output = Path(prune_model(model, method="gram", refine=refine).output)
    assert (output / "LICENSES/Apache-2.0.txt").read_text() == "free"
    text = "Once upon a time, in 2023,  there was\n"
    expected = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(output)(text)["input_ids"] == expected
    program = "from transformers import AutoTokenizer\n"
    program += f"print(AutoTokenizer.from_pretrained({str(output)!r}, trust_remote_code=False)({text!r})['input_ids'])"
    ended = elsewhere.run(program, tmp_path)
    assert ended.stdout.strip() == str(expected), ended.stderr


def test_another_tokenizer_than_the_sources_ends_the_run(
    model: Path, prune_model: PruneModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = tokenizer.settle

    def settle_badly(source: Path, written: Path) -> None:
        settle(source, written)
        rules = (written / "tokenizer.json").read_text()
        (written / "tokenizer.json").write_text(rules.replace('"byte_fallback": true', '"byte_fallback": false'))

    monkeypatch.setattr(tokenizer, "settle", settle_badly)
    with pytest.raises(ReadBackError, match=r"the tokenizer as written in .* differs from that in"):
        prune_model(model, output=str(tmp_path / "pruned"))
    assert not (tmp_path / "pruned").exists()


def test_a_run_resumes_after_its_files_are_mended(
    model: Path, prune_model: PruneModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "pruned"

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Companions, "copy", fail)
        patch.setattr(tokenizer, "rehearse", lambda *_: None)
        with pytest.raises(OSError, match="No space left"):
            prune_model(model, output=str(output))
    (model / "NOTICE").symlink_to("nothing")
    with pytest.raises(CheckpointError, match="NOTICE stands beside"):
        prune_model(model, output=str(output), resume=True)
    (model / "NOTICE").unlink()
    (model / "NOTICE").write_text("see")
    prune_model(model, output=str(output), resume=True)
    assert content(output) == content(Path(prune_model(model).output))
    assert (output / "NOTICE").read_text() == "see"


@pytest.mark.parametrize(
    ("config", "saved"),
    [
        ({}, None),
        ({}, {"temperature": 0.3, "do_sample": True, "eos_token_id": [2, 5], "max_new_tokens": 9}),
        ({"temperature": 0.7, "top_p": 0.9, "do_sample": True, "max_length": 30}, None),
        ({"eos_token_id": [2, 3], "num_beams": 2, "repetition_penalty": 1.2, "forced_eos_token_id": 3}, None),
        ({"temperature": 0.7, "do_sample": True}, {"top_k": 7, "do_sample": True}),
    ],
)
def test_generation_settings_are_those_of_the_source(
    model: Path, prune_model: PruneModel, config: dict[str, object], saved: dict[str, object] | None
) -> None:
    (model / "generation_config.json").unlink(missing_ok=True)
    described = json.loads((model / "config.json").read_text()) | config
    (model / "config.json").write_text(json.dumps(described))
    if saved is not None:
        (model / "generation_config.json").write_text(json.dumps(saved))
    output = prune_model(model).output
    source, pruned = (AutoModelForCausalLM.from_pretrained(one).generation_config for one in (model, output))
    # The others are the model's settings, which transformers does not generate by.
    names = GenerationConfig().to_dict().keys() - {"_from_model_config", "transformers_version"}
    assert {name: getattr(pruned, name) for name in names} == {name: getattr(source, name) for name in names}
    assert all(source.to_dict()[name] == value for name, value in (saved or config).items())
