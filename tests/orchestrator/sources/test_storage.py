"""Models, data and outputs by s3://, on a store of this machine that answers, refuses, drops and hangs."""

import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from orchestrator import CompareConfig
from orchestrator.builtin import MODEL_DIR
from orchestrator.cli import main
from orchestrator.config import ConfigError
from orchestrator.data import DataError, TextOptions, load_tokens
from orchestrator.inputs import resolve_model
from orchestrator.output.destination import DeliveryError, Destination, delivered
from orchestrator.pipeline import PruneResult
from orchestrator.sources import storage
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import CheckpointError
from tests.conftest import content
from tests.orchestrator.stores import BUCKET, Store, serving_store

PruneModel = Callable[..., PruneResult]
SECRETS = {"AWS_SECRET_ACCESS_KEY": "k-Wq71", "AWS_SESSION_TOKEN": "t-Xk93"}
IN_URI = "u-Zt58"
OUTPUT = f"s3://{BUCKET}/pruned/tiny"
SMALL = ["--sparsity", ".33", "--workers", "1"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The store, which the environment names, and a cache of the module's own."""
    with pytest.MonkeyPatch.context() as patch, serving_store(Store()) as store:
        for name in [name for name in os.environ if name.lower().startswith(("aws_", "http_proxy", "https_proxy"))]:
            patch.delenv(name)
        settings = {"AWS_ENDPOINT_URL": f"http://{store.address}", "AWS_ACCESS_KEY_ID": "me", **SECRETS}
        settings |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        store.client.create_bucket(Bucket=BUCKET)
        yield store


@pytest.fixture
def store(served: Store) -> Iterator[Store]:
    """The store, in order before and after a test."""
    yield served
    served.fails = lambda method, path: ""


@pytest.fixture(scope="module")
def uris(served: Store, gqa_model: Path, token_file: Path, held_out_file: Path) -> dict[str, str]:
    """Where a run's inputs are: in the store, and some of the data at an address that has a password."""
    served.plain["/plain/held-out.parquet"] = held_out_file.read_bytes()
    return {
        "model": served.put(gqa_model, "models/tiny"),
        "calibration": served.put(token_file, "data"),
        "held_out": served.put(held_out_file, "data"),
        "by_password": f"http://me:{IN_URI}@{served.address}/plain/held-out.parquet",
    }


@pytest.fixture(scope="module")
def asked(uris: dict[str, str], tracking_uri: str) -> list[str]:
    """A command that has everything by URI."""
    inputs = [uris["model"], "--calibration", uris["calibration"]]
    held_out = ["--evaluate", uris["held_out"], "--evaluate", uris["by_password"]]
    return ["prune", *inputs, *held_out, *SMALL, "--tracking-uri", tracking_uri, "--output", OUTPUT]


@pytest.fixture(scope="module")
def asked_here(gqa_model: Path, token_file: Path) -> list[str]:
    """A command whose output alone goes to the store."""
    inputs = [str(gqa_model), "--calibration", str(token_file)]
    return ["prune", *inputs, *SMALL, "--tracking-uri", "none", "--output"]


def run(command: list[str], code: int = 0) -> Result:
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert_no_secret(result.output.encode(), command[0])
    return result


def assert_no_secret(text: bytes, where: object) -> None:
    for secret in (*SECRETS.values(), IN_URI):
        assert secret.encode() not in text, f"{secret} is in {where}"


def waiting() -> list[Path]:
    """What is on its way to a store, or was left of it."""
    return list((storage.cache_directory() / "outputs").glob("*"))


@pytest.fixture(scope="module")
def remote_run(served: Store, asked: list[str], local_ray: None) -> dict[str, object]:
    """What a whole run to the store says of itself."""
    return json.loads(run([*asked, "--json"]).stdout)


def test_a_run_by_uris_uploads_what_a_local_run_writes(
    remote_run: dict[str, object], store: Store, uris: dict[str, str], prune_model: PruneModel
) -> None:
    held_out = (uris["held_out"], uris["by_password"])
    local = prune_model(uris["model"], calibration=uris["calibration"], evaluate=held_out)
    there = store.content("pruned/tiny")
    assert there == content(Path(local.output))
    assert remote_run["output"] == OUTPUT
    assert [model["output"] for model in remote_run["models"]] == [OUTPUT]
    assert not waiting()
    # The marker of what is whole came last.
    put = [path for method, path in store.asked if method == "PUT" and path.startswith(f"/{BUCKET}/pruned/tiny/")]
    assert put.index(f"/{BUCKET}/pruned/tiny/pruning/asked.json") == len(put) - 1
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
    assert f"output {OUTPUT} was asked for something else (sparsity [0.33] there" in other.stderr


def test_what_is_there_is_not_overwritten_unasked(
    remote_run: dict[str, object], store: Store, asked: list[str]
) -> None:
    before = store.content("pruned/tiny")
    result = run(asked, code=2)
    assert result.stderr.splitlines()[-1] == (
        f"slimllm: output {OUTPUT} is not empty ({len(before) + 1} files): "
        f"choose another --output, or pass --overwrite to replace it"
    )
    assert store.content("pruned/tiny") == before
    assert not waiting()


def test_an_upload_that_fails_goes_on_and_nothing_is_computed_again(
    store: Store, asked_here: list[str], local_ray: None
) -> None:
    command = [*asked_here, f"s3://{BUCKET}/pruned/again"]
    store.fails = lambda method, path: "refuse" if method == "PUT" and path.endswith(".safetensors") else ""
    failed = run(command, code=1)
    (here,) = waiting()
    said = failed.stderr.splitlines()[-1]
    assert said.startswith(f"slimllm: s3://{BUCKET}/pruned/again: the store refused (PermissionError")
    assert said.endswith(f"the output is whole in {here}/again: the same command with --resume uploads it")
    expected = content(here / "again")
    assert {"config.json", "pruning/asked.json"} < expected.keys()
    # What says that it is whole is not there.
    assert "pruning/asked.json" not in store.content("pruned/again")
    store.fails = lambda method, path: ""
    unasked = run(command, code=2)
    assert "was finished and not uploaded, and is in" in unasked.stderr
    resumed = run([*command, "--resume"])
    assert "uploading" in resumed.stderr
    assert "pruning: layer" not in resumed.stderr
    assert store.content("pruned/again") == expected
    assert not waiting()


def test_overwriting_removes_what_is_not_of_the_output_and_a_lost_server_is_told_later(
    store: Store, asked_here: list[str], tracking_uri: str, local_ray: None
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
    store: Store, gqa_model: Path, token_file: Path, prune_model: PruneModel, local_ray: None
) -> None:
    moments = f"s3://{BUCKET}/moments"
    result = run(["calibrate", str(gqa_model), "--calibration", str(token_file), "--workers", "1", "--output", moments])
    assert f"--moments {moments}" in result.stdout
    pruned = prune_model(gqa_model, method="gram", moments=moments)
    assert pruned.totals.sparsity == pytest.approx(0.33, abs=0.01)
    # Nothing was passed through the model.
    assert "calibrating" not in pruned.totals.seconds


def test_only_what_changed_is_fetched_again_and_what_was_fetched_stays(store: Store) -> None:
    uri = store.put(MODEL_DIR, "models/builtin")
    directory = resolve_model(uri)
    assert Checkpoint.open(directory).digest() == Checkpoint.open(MODEL_DIR).digest()
    store.client.put_object(Bucket=BUCKET, Key="models/builtin/generation_config.json", Body=b"{}")
    store.client.put_object(Bucket=BUCKET, Key="models/builtin/pytorch_model.bin", Body=b"no part of a model")
    store.asked.clear()
    changed = resolve_model(uri)
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
    with pytest.raises(DataError, match=r"text.csv: files of type '.csv' are not known"):
        load_tokens(f"s3://{BUCKET}/text/text.csv", **settings, options=options)


NOWHERE = f"s3://{BUCKET}/nowhere"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["s3://none/m"], "model s3://none/m: there is nothing of this name (FileNotFoundError: The specified bucket"),
        ([NOWHERE], f"model {NOWHERE}: there is nothing: check the URI"),
        (["s3://"], "model s3:// names nothing: pass the URI of a directory or a file in it"),
        (["no-such://a/b"], "model no-such://a/b: no store is of type no-such: use s3://, gs://, hf://"),
        (["--evaluate", f"{NOWHERE}.txt"], f"{NOWHERE}.txt: there is nothing of this name"),
        (["--output", "s3://none/x"], "s3://none/x: there is nothing of this name (FileNotFoundError: The specified"),
        (["--method", "gram", "--moments", NOWHERE], f"moments {NOWHERE}: there is nothing: check the URI"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_in_one_line(store: Store, arguments: list[str], says: str) -> None:
    assert_one_line(run(["prune", *arguments, "--samples", "1", "--sequence-length", "16"], code=2), says)


def assert_one_line(result: Result, says: str) -> None:
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"slimllm: {says}"), line
    assert not waiting()


@pytest.mark.parametrize("arguments", [[NOWHERE], ["--output", NOWHERE]])
def test_no_credentials(store: Store, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    for name in ("AWS_ACCESS_KEY_ID", *SECRETS):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    result = run(["prune", *arguments, "--samples", "1", "--sequence-length", "16"], code=2)
    said = "the store refused (NoCredentialsError: Unable to locate credentials): check the URI, the credentials"
    assert f"{NOWHERE}: {said}" in result.stderr


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_package_that_is_not_installed(
    scheme: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    says = f"model {scheme}://b/x: {scheme}:// needs a package that is not installed: pip install 'slimllm[{scheme}]'"
    assert_one_line(run(["prune", f"{scheme}://b/x"], code=2), says)


def test_a_hub_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert_one_line(run(["prune", "hf://me/tiny"], code=2), "model hf://me/tiny: the store refused (ConnectError")


@pytest.mark.parametrize("fails", ["hang", "half"])
def test_a_store_that_stalls_or_drops(store: Store, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    uri = store.put(MODEL_DIR, f"models/{fails}")
    store.fails = lambda method, path: fails if path.endswith("model.safetensors") else ""
    monkeypatch.setattr(storage, "STALLED_SECONDS", 5.0)
    start = time.monotonic()
    why = "nothing came for 5 s" if fails == "hang" else r"the store refused \(.*"
    with pytest.raises(CheckpointError, match=rf"^model {uri}: {why}.*: check the .*network"):
        resolve_model(uri)
    assert time.monotonic() - start < 25
    # Of what came in part nothing is used: the same command fetches it when the store answers again.
    store.fails = lambda method, path: ""
    assert Checkpoint.open(resolve_model(uri)).digest() == Checkpoint.open(MODEL_DIR).digest()


def test_a_server_that_accepts_and_says_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "STALLED_SECONDS", 4.0)
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(DataError, match=rf"^{NOWHERE}.txt: nothing came for 4 s: check the network and the store"):
            load_tokens(f"{NOWHERE}.txt", model_dir=MODEL_DIR, vocab_size=9, max_length=9, options=TextOptions())
    assert time.monotonic() - start < 25


@pytest.mark.parametrize("name", ["../../../out.json", "/etc/out.json", "a/./out.json", "a//out.json"])
def test_names_that_leave_the_directory(store: Store, name: str) -> None:
    folder = f"names/{abs(hash(name))}"
    store.client.put_object(Bucket=BUCKET, Key=f"{folder}/config.json", Body=b"{}")
    store.client.put_object(Bucket=BUCKET, Key=f"{folder}/{name}", Body=b"{}")
    with pytest.raises(CheckpointError, match=rf"the name of '{name}' in it leaves the directory: rename or remove it"):
        resolve_model(f"s3://{BUCKET}/{folder}")
    assert not list(storage.cache_directory().rglob("out.json"))


def test_what_cannot_go_to_a_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a URI, and a comparison is written to a directory: pass one"):
        CompareConfig(output="s3://bucket/comparison")
    for arguments in (["s3://bucket/x"], [str(tmp_path), "--output", "s3://bucket/x.gguf"]):
        result = run(["export", *arguments, "--to", "gguf"], code=2)
        assert "what is exported is written on this machine, not to s3://bucket/x" in result.stderr


def test_two_runs_on_one_machine_do_not_write_the_same(store: Store) -> None:
    output = Destination.of(f"s3://{BUCKET}/pruned/twice")

    def begin() -> None:
        with delivered(output, False, print):
            pytest.fail("it began")

    def interrupt() -> None:
        with delivered(output, False, print):
            with pytest.raises(ConfigError, match="pruned/twice is being written by another run"):
                begin()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not waiting()
    assert not store.content("pruned/twice")


def test_an_upload_over_another_machines_output_is_refused(store: Store) -> None:
    output = Destination.of(f"s3://{BUCKET}/pruned/raced")

    def make() -> None:
        with delivered(output, False, print) as directory:
            (directory / "pruning").mkdir(parents=True)
            (directory / "pruning" / "asked.json").write_text('{"by": "this"}')
            store.client.put_object(Bucket=BUCKET, Key="pruned/raced/pruning/asked.json", Body=b'{"by": "another"}')

    with pytest.raises(DeliveryError, match=r"is not empty \(1 files\).*the output is whole in"):
        make()
    assert store.content("pruned/raced") == {"pruning/asked.json": b'{"by": "another"}'}
    assert (output.directory / "pruning" / "asked.json").is_file()
    with delivered(output, True, print):
        pass
    assert store.content("pruned/raced") == {"pruning/asked.json": b'{"by": "this"}'}
    assert not waiting()
