"""What comes from the hub is of one commit, which the record names and `--resume` requires."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from cluster import WorkerPlan
from orchestrator.builtin import MODEL_DIR
from orchestrator.config import ConfigError, PruneConfig
from orchestrator.data import DataError, TextOptions, TokenBlocks, load_tokens
from orchestrator.inputs import load_inputs
from orchestrator.record.params import run_params, what_is_asked
from orchestrator.record.run_toml import write_run_file
from orchestrator.sources.models import resolve_model
from slimllm_ops.errors import CheckpointError, InputError
from tests.orchestrator.sources.hubs import DOCUMENT, Hub

FIRST, LATER = "a" * 40, "b" * 40
# What a later commit changes: no weight, but how the pruned model writes.
GENERATION = b'{"temperature": 0.125, "do_sample": true}'
OTHER_TEXT = DOCUMENT.replace("once", "twice").encode() * 50


def slow(*values: object) -> ParameterSet:
    """A case that another one is much like."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def moved(server: Hub) -> Hub:
    """A hub whose main branch has moved on from what it has as v1."""
    server.commit("v1", FIRST)
    server.commit("main", LATER, generation_config__json=GENERATION, train__jsonl=OTHER_TEXT)
    return server


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], TokenBlocks]:
    """Load a text for the built-in model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = TextOptions(samples=4, sequence_length=8)
    return lambda spec: load_tokens(spec, model_dir=MODEL_DIR, vocab_size=4096, max_length=64, options=options)


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, LATER), ("v1", FIRST), slow("main", LATER), slow(FIRST, FIRST)]
)
def test_a_hub_id_gives_the_files_of_one_commit(moved: Hub, revision: str | None, commit: str) -> None:
    model = resolve_model("me/tiny", revision)
    assert (model.revision, model.settings) == (commit, {"revision": commit})
    written = (model.directory / "generation_config.json").read_bytes()
    assert (written == GENERATION) == (commit == LATER)


@pytest.mark.parametrize(
    ("uri", "pinned"),
    [
        ("hf://me/tiny", f"hf://me/tiny@{LATER}"),
        ("hf://me/tiny@v1", f"hf://me/tiny@{FIRST}"),
        slow(f"hf://me/tiny@{FIRST}", f"hf://me/tiny@{FIRST}"),
        slow("hf://datasets/me/tiny@v1", f"hf://datasets/me/tiny@{FIRST}"),
    ],
)
def test_a_uri_of_the_hub_gives_the_files_of_one_commit(
    moved: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, pinned: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = resolve_model(uri)
    assert (model.revision, model.settings) == (pinned.rpartition("@")[2], {"model": pinned})
    written = (model.directory / "generation_config.json").read_bytes()
    assert (written == GENERATION) == (model.revision == LATER)
    # The pinned one is the same, whatever the branches do meanwhile.
    moved.commit("main", "c" * 40)
    moved.commit("v1", "c" * 40)
    assert resolve_model(pinned) == model


@pytest.mark.parametrize(
    ("spec", "pinned"),
    [
        slow("me/tiny", f"me/tiny@{LATER}"),
        slow("me/tiny@v1", f"me/tiny@{FIRST}"),
        slow("me/tiny@v1:default", f"me/tiny@{FIRST}:default"),
        slow(f"me/tiny@{FIRST}:default:train", f"me/tiny@{FIRST}:default:train"),
        slow("hf://datasets/me/tiny/train.jsonl", f"hf://datasets/me/tiny@{LATER}/train.jsonl"),
        ("hf://datasets/me/tiny@v1/train.jsonl", f"hf://datasets/me/tiny@{FIRST}/train.jsonl"),
    ],
)
def test_data_of_the_hub_are_of_one_commit(
    moved: Hub, tmp_path: Path, text: Callable[[str], TokenBlocks], spec: str, pinned: str
) -> None:
    blocks = text(spec)
    assert (blocks.spec, blocks.pinned) == (spec, pinned)
    here = tmp_path / "here.jsonl"
    here.write_bytes(OTHER_TEXT if LATER in pinned else DOCUMENT.encode() * 50)
    assert blocks.digest == text(str(here)).digest
    assert text(str(here)).pinned is None


@pytest.mark.parametrize("spec", ["me/tiny@v7:default", "hf://datasets/me/tiny@v7/train.jsonl"])
def test_a_revision_that_the_data_do_not_have(moved: Hub, text: Callable[[str], TokenBlocks], spec: str) -> None:
    with pytest.raises(DataError, match=rf"^{spec}: .*hub did not provide .*(Revision|revision).*\): ") as raised:
        text(spec)
    assert "\n" not in str(raised.value)


def test_a_revision_that_the_model_does_not_have(moved: Hub) -> None:
    why = r"^me/tiny is not a local .*RevisionNotFoundError.*check the name, the revision v7 and the network"
    with pytest.raises(CheckpointError, match=why):
        resolve_model("me/tiny", "v7")
    with pytest.raises(
        CheckpointError, match=r"^model hf://me/tiny@v7: the hub could not provide it \(.*check the URI"
    ):
        resolve_model("hf://me/tiny@v7")


def test_a_revision_of_what_has_none_is_refused(tmp_path: Path) -> None:
    for model, kind in ((str(tmp_path), "a path"), ("s3://bucket/m", "a URI"), ("hf://me/tiny", "a URI")):
        with pytest.raises(InputError, match=f"^revision v1 is of a model that is named by its hub id.* is {kind}"):
            resolve_model(model, "v1")
    with pytest.raises(ConfigError, match=r"^revision 'v1' is of a hub model, and none is named: pass MODEL"):
        PruneConfig(revision="v1")


def test_a_revision_is_known_when_the_hub_is_away(moved: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resolve_model("me/tiny", "v1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model("me/tiny", "v1") == before
    with pytest.raises(CheckpointError, match="the revision main"):
        resolve_model("me/tiny", "main")


def test_a_record_names_the_commits_and_resume_compares_them(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def read(revision: str | None, spec: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        config = PruneConfig(model="me/tiny", revision=revision, calibration=spec, evaluate=(spec,), sequence_length=8)
        inputs, workers = load_inputs(config, print), WorkerPlan(1, 1, 0.0, weights_travel=False)
        write_run_file(tmp_path / "run.toml", "prune", config, inputs, workers)
        written = tomllib.loads((tmp_path / "run.toml").read_text())
        return what_is_asked(config, inputs), run_params(config, inputs, workers), written

    spec, first = "hf://datasets/me/tiny/train.jsonl", f"hf://datasets/me/tiny@{FIRST}/train.jsonl"
    asked, params, written = read(None, spec)
    named = {"revision": FIRST, "calibration_pinned": first, "evaluate_pinned": first}
    assert named.items() <= asked.items()
    assert named.items() <= params.items()
    assert (written["model"], written["revision"]) == ("me/tiny", FIRST)
    assert (written["calibration"], written["evaluate"]) == (first, [first])
    # Not a weight and not a token changes.
    server.commit("main", LATER, generation_config__json=GENERATION)
    moved, _, _ = read(None, spec)
    assert {name for name in asked if asked[name] != moved[name]} == named.keys()
    # What the record names is the same run still.
    again, _, repeated = read(written["revision"], written["calibration"])
    assert (again, repeated) == (asked, written)
