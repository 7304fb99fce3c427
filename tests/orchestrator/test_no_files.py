"""A pipe, a socket, a device, a folder or a file without end in the place of any file that is read ends in an error."""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.builtin import MODEL_DIR
from orchestrator.config import ConfigError, PruneConfig, read_config_file
from orchestrator.data import DataError
from orchestrator.inputs import load_inputs
from orchestrator.output.notes import read_settings
from orchestrator.record.figures import require_plain_style
from orchestrator.tracking import TrackingError
from orchestrator.tracking.journal import Journal
from slimllm_ops.checkpoint import generation
from slimllm_ops.checkpoint.commit_log import CommitLog
from slimllm_ops.checkpoint.moment_store import MANIFEST, MomentStore
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.tokenizer import load_tokenizer, rehearse
from slimllm_ops.decide.plan import Plan
from slimllm_ops.errors import CheckpointError, InputError
from tests.no_files import NO_FILES, replaced, within

# Whatever transformers or slimllm looks for in a model's directory.
OF_A_MODEL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    *("model.safetensors", "model.safetensors.index.json", "preprocessor_config.json", "processor_config.json"),
    *("additional_chat_templates/a.jinja", "adapter_config.json", "quant_config.json", "README.md", "LICENSE"),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the built-in model, which has a tokenizer."""
    return shutil.copytree(MODEL_DIR, tmp_path / "model")


@pytest.mark.parametrize("kind", ["pipe", "device", "terabyte"])
@pytest.mark.parametrize("name", OF_A_MODEL)
def test_nothing_of_a_model_is_waited_for_or_read_without_end(model: Path, kind: str, name: str) -> None:
    replaced(model / name, kind)
    text = model.parent / "text.txt"
    text.write_text("some words of text\n" * 200)
    config = PruneConfig(model=str(model), calibration=str(text), sequence_length=16, samples=4)
    with within(60), suppress(CheckpointError, InputError, DataError):
        inputs = load_inputs(config, lambda warning: None)
        generation.settle(inputs.source.directory, model.parent)
    # The commands that do not look at all files first.
    with within(60), suppress(CheckpointError):
        Checkpoint.open(model)


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json"])
def test_a_tokenizer_of_something_else_than_files_names_it(model: Path, kind: str, name: str) -> None:
    if kind == "directory" and name != "tokenizer_config.json":
        pytest.skip("transformers passes over it, or says so")
    replaced(model / name, kind)
    with within(10), pytest.raises(CheckpointError, match=rf"{name} cannot be read \(it (is|has)"):
        load_tokenizer(model)


def test_a_tokenizer_is_read_from_no_other_file(model: Path, tmp_path: Path) -> None:
    replaced(tmp_path / "pipe", "pipe")
    (model / "tokenizer_config.json").write_text(f'{{"gguf_file": "{tmp_path / "pipe"}"}}')
    with within(10), pytest.raises(CheckpointError, match=r"tokenizer_config\.json names a gguf_file"):
        load_tokenizer(model)


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_settings_file_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    replaced(tmp_path / "run.toml", kind)
    with within(10), pytest.raises(ConfigError, match=r"run.toml cannot be read: it (is|has)"):
        read_config_file(tmp_path / "run.toml")


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_journal_that_is_no_file_is_neither_read_nor_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "metrics.jsonl"
    replaced(path, kind)
    for use in (Journal(path).events, lambda: Journal(path).append({"event": "note"})):
        with within(10), pytest.raises(TrackingError, match=r"metrics.jsonl is no journal \(it (is|has)"):
            use()


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_record_that_is_no_file_is_no_record(tmp_path: Path, kind: str) -> None:
    replaced(tmp_path / "asked.json", kind)
    with within(10), pytest.raises(ConfigError, match=r"asked\.json is damaged"):
        read_settings(tmp_path / "asked.json")
    replaced(tmp_path / "plan.json", kind)
    with within(10), pytest.raises(OSError, match=r"it (is|has)"):
        Plan.read(tmp_path / "plan.json")
    replaced(tmp_path / "log" / "start.npz", kind)
    with within(10):
        assert not len(CommitLog(tmp_path / "log"))


@pytest.mark.parametrize("kind", NO_FILES)
def test_moments_that_are_no_files_are_refused(tmp_path: Path, kind: str) -> None:
    replaced(tmp_path / "layer-00000.safetensors", kind)
    replaced(tmp_path / MANIFEST, kind)
    store = MomentStore(tmp_path)
    for use in (store.manifest, lambda: store.load_paths(0), lambda: store.load_moments(0, "mlp")):
        with within(10), pytest.raises(InputError):
            use()


@pytest.mark.parametrize("kind", [kind for kind in NO_FILES if kind != "terabyte"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".txt.gz", ".jsonl.zst", ".parquet", ".arrow"])
def test_data_that_are_no_file_are_refused(model: Path, kind: str, suffix: str) -> None:
    path = model.parent / f"data{suffix}"
    replaced(path, kind)
    config = PruneConfig(model=str(model), calibration=str(path))
    with within(30), pytest.raises(DataError, match=r"cannot be read: it is|is a directory"):
        load_inputs(config, lambda warning: None)


@pytest.mark.parametrize("kind", [kind for kind in NO_FILES if kind != "terabyte"])
@pytest.mark.parametrize("name", ["state.json", "data-00000-of-00001.arrow"])
def test_a_saved_dataset_without_files_is_refused(model: Path, kind: str, name: str) -> None:
    folder = model.parent / "saved"
    folder.mkdir()
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    replaced(folder / name, kind)
    config = PruneConfig(model=str(model), calibration=str(folder))
    with within(30), pytest.raises(DataError):
        load_inputs(config, lambda warning: None)


def test_the_rehearsal_of_a_tokenizer_says_what_is_no_file(model: Path) -> None:
    from slimllm_ops.checkpoint.companions import plan_companions

    companions = plan_companions(model)
    replaced(model / "tokenizer_config.json", "pipe")
    with within(10), pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read"):
        rehearse(companions, {})


def test_the_settings_of_figures_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_plain_style()
    replaced(tmp_path / "matplotlibrc", "pipe")
    with within(10), pytest.raises(CheckpointError, match="matplotlibrc cannot be read"):
        require_plain_style()
