"""Models, data and outputs at s3:// addresses, on a local store: fetched, uploaded and resumed."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from orchestrator.builtin import MODEL_DIR
from orchestrator.data import DataError, TextOptions, load_tokens
from orchestrator.pipeline import PruneResult
from orchestrator.sources import storage
from orchestrator.sources.models import resolve_model
from orchestrator.sources.storage.digests import PART_BYTES
from slimllm_ops.checkpoint.reading import Checkpoint
from tests.conftest import content
from tests.orchestrator.sources.storage_commands import OUTPUT, assert_no_secret, run, waiting
from tests.orchestrator.stores import BUCKET, Store

PruneModel = Callable[..., PruneResult]


def test_a_run_by_uris_uploads_what_a_local_run_writes(
    remote_run: dict[str, object], store: Store, uris: dict[str, str], prune_model: PruneModel
) -> None:
    held_out = (uris["held_out"], uris["by_password"])
    local = prune_model(uris["model"], rendered=True, calibration=uris["calibration"], evaluate=held_out)
    there = store.content("pruned/tiny")
    assert there == content(Path(local.output))
    assert remote_run["output"] == OUTPUT
    assert [model["output"] for model in remote_run["models"]] == [OUTPUT]
    assert not waiting()
    # The marker of what is whole came last.
    put = [path for method, path in store.asked if method == "PUT" and path.startswith(f"/{BUCKET}/pruned/tiny/")]
    assert put.index(f"/{BUCKET}/pruned/tiny/complete.json") == len(put) - 1
    plan = json.loads(there["pruning/plan.json"])
    assert (plan["params"]["model"], plan["params"]["calibration"]) == (uris["model"], uris["calibration"])


def test_what_was_uploaded_loads(remote_run: dict[str, object], tmp_path: Path) -> None:
    directory = storage.fetch_directory(OUTPUT)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_mlflow_has_the_uri_and_no_secret(remote_run: dict[str, object], store: Store, tracking_uri: str) -> None:
    found = MlflowClient(tracking_uri).get_run(str(remote_run["run_id"]))
    assert found.data.params["output"] == OUTPUT
    events = store.read("pruned/tiny/pruning/metrics.jsonl")
    # The whole journal, to its end.
    assert json.loads(events.splitlines()[-1])["event"] == "logged"
    assert_no_secret(events, "the journal")
    for name, each in store.content("pruned/tiny").items():
        assert_no_secret(each, name)
    with sqlite3.connect(tracking_uri.removeprefix("sqlite:///")) as database:
        assert_no_secret("\n".join(database.iterdump()).encode(), "MLflow")


def test_a_finished_output_says_so(remote_run: dict[str, object], store: Store, asked: list[str]) -> None:
    store.asked.clear()
    result = run([*asked, "--resume"])
    assert f"{OUTPUT} is finished: there is nothing to resume" in result.stdout
    # Nor were the model and the data fetched again.
    assert {method for method, path in store.asked if path.endswith((".safetensors", "tokens.parquet"))} <= {"HEAD"}
    assert "PUT" not in {method for method, path in store.asked}
    other = run([*asked, "--resume", "--sparsity", ".4"], code=2)
    assert f"output {OUTPUT} had other settings (sparsity [0.33] there" in other.stderr


def test_what_is_there_is_not_overwritten_unasked(
    remote_run: dict[str, object], store: Store, asked: list[str]
) -> None:
    before = store.content("pruned/tiny")
    result = run(asked, code=2)
    assert result.stderr.splitlines()[-1] == (
        f"slimllm: output {OUTPUT} is not empty ({len(before) + 2} files): "
        f"choose another --output, or pass --overwrite to replace it"
    )
    assert store.content("pruned/tiny") == before
    assert not waiting()


def test_an_upload_that_fails_goes_on_and_nothing_is_computed_again(store: Store, asked_here: list[str]) -> None:
    command = [*asked_here, f"s3://{BUCKET}/pruned/again"]
    store.fails = lambda method, path: "refuse" if method == "PUT" and path.endswith(".safetensors") else ""
    failed = run(command, code=1)
    (here,) = waiting()
    said = failed.stderr.splitlines()[-1]
    assert said.startswith(f"slimllm: s3://{BUCKET}/pruned/again: the store refused (PermissionError")
    assert said.endswith(f"the complete output is in {here}/again: run the same command with --resume to upload it")
    expected = content(here / "again")
    assert {"config.json", "pruning/asked.json", "complete.json"} < expected.keys()
    # What says that it is whole is not there.
    assert "complete.json" not in store.content("pruned/again")
    store.fails = lambda method, path: ""
    unasked = run(command, code=2)
    assert "was finished but not uploaded, and is in" in unasked.stderr
    resumed = run([*command, "--resume"])
    assert "uploading" in resumed.stderr
    assert "pruning: layer" not in resumed.stderr
    assert store.content("pruned/again") == expected
    assert not waiting()


def test_a_resumed_upload_sends_only_what_is_missing_or_has_changed(store: Store, tmp_path: Path) -> None:
    for name in ("asked.json", "changed.json", "folder/same.json", "longer.json", "missing.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"before, {name}")
    # It goes in three parts.
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(b"large")
        file.truncate(2 * PART_BYTES + 1)
    uri = f"s3://{BUCKET}/resumed"
    store.fails = lambda method, path: "refuse" if path.endswith("/missing.json") else ""
    with pytest.raises(storage.StorageError, match="the store refused"):
        storage.upload_directory(uri, tmp_path, "asked.json", overwrite=False)
    store.fails = lambda method, path: ""
    assert {"changed.json", "folder/same.json", "large.safetensors"} < store.content("resumed").keys()
    (tmp_path / "changed.json").write_text("beyond, changed.json")
    (tmp_path / "longer.json").write_text("before and after")
    store.asked.clear()
    assert storage.upload_directory(uri, tmp_path, "asked.json", overwrite=False) == 2
    sent = {path.removeprefix(f"/{BUCKET}/resumed/") for method, path in store.asked if method in ("PUT", "POST")}
    assert sent == {"asked.json", "changed.json", "longer.json", "missing.json"}
    assert store.content("resumed") == content(tmp_path)
    with (tmp_path / "large.safetensors").open("r+b") as file:
        file.write(b"other")
    assert storage.upload_directory(uri, tmp_path, "asked.json", overwrite=False) == 4
    assert store.read("resumed/large.safetensors").startswith(b"other")


def test_overwriting_removes_what_is_not_of_the_output_and_a_lost_server_is_told_later(
    store: Store, asked_here: list[str], tracking_uri: str
) -> None:
    place = f"s3://{BUCKET}/pruned/other"
    store.put(MODEL_DIR, "pruned/other/old")
    store.client.put_object(Bucket=BUCKET, Key="pruned/other/pruning/asked.json", Body=b"{}")
    store.client.put_object(Bucket=BUCKET, Key="pruned/other-than-that", Body=b"stays")
    result = run([*asked_here[:-2], "http://127.0.0.1:9", "--output", place, "--overwrite"])
    names = store.content("pruned/other").keys()
    assert {"config.json", "pruning/asked.json", "pruning/plan.json"} < names
    assert not [name for name in names if name.startswith("old/")]
    assert store.read("pruned/other-than-that") == b"stays"
    assert result.stdout.splitlines()[-1] == f"slimllm log {place} --tracking-uri http://127.0.0.1:9"
    logged = run(["log", place, "--tracking-uri", tracking_uri])
    assert logged.stdout.startswith(f"{place} is logged as MLflow run ")
    again = run(["log", place, "--tracking-uri", tracking_uri])
    assert again.stdout.startswith(f"{place} is logged already as MLflow run ")


def test_moments_are_kept_in_a_store_and_taken_from_there(
    store: Store, gqa_model: Path, token_file: Path, prune_model: PruneModel
) -> None:
    moments = f"s3://{BUCKET}/moments"
    result = run(["calibrate", str(gqa_model), "--calibration", str(token_file), "--local", "--output", moments])
    assert f"--moments {moments}" in result.stdout
    pruned = prune_model(gqa_model, method="gram", moments=moments)
    assert pruned.totals.sparsity == pytest.approx(0.33, abs=0.01)
    # Nothing was passed through the model.
    assert "calibrating" not in pruned.totals.seconds


def test_only_what_changed_is_fetched_again_and_what_was_fetched_stays(store: Store) -> None:
    uri = store.put(MODEL_DIR, "models/builtin")
    directory = resolve_model(uri).directory
    assert Checkpoint.open(directory).digest() == Checkpoint.open(MODEL_DIR).digest()
    store.client.put_object(Bucket=BUCKET, Key="models/builtin/generation_config.json", Body=b"{}")
    store.client.put_object(Bucket=BUCKET, Key="models/builtin/pytorch_model.bin", Body=b"no part of a model")
    store.asked.clear()
    changed = resolve_model(uri).directory
    assert [
        path for method, path in store.asked if method == "GET" and path.endswith((".json", ".safetensors", ".bin"))
    ] == [f"/{BUCKET}/models/builtin/generation_config.json"]
    assert (changed / "generation_config.json").read_bytes() == b"{}"
    assert (directory / "generation_config.json").read_bytes() != b"{}"
    assert not (changed / "pytorch_model.bin").exists()


def test_text_by_a_uri_gives_the_tokens_of_the_file_and_errors_that_name_it(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"once upon a time there were {number}"}) + "\n" for number in range(50))
    )
    settings = {"model_dir": MODEL_DIR, "vocab_size": 1024, "max_length": 256}
    options = TextOptions(samples=4, sequence_length=16)
    blocks = load_tokens(store.put(path, "text"), **settings, options=options)
    assert (blocks.spec, blocks.digest) == (
        f"s3://{BUCKET}/text/text.jsonl",
        load_tokens(str(path), **settings, options=options).digest,
    )
    path.write_text('{"text": 1}\n')
    with pytest.raises(
        DataError, match=rf"^s3://{BUCKET}/text/text.jsonl: line 1: 'text' is of type int: give a string"
    ):
        load_tokens(store.put(path, "text"), **settings, options=options)
    with pytest.raises(DataError, match=r"text.tab: unknown file type '.tab'"):
        load_tokens(f"s3://{BUCKET}/text/text.tab", **settings, options=options)
