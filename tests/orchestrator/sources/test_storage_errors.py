"""A store that refuses, drops and hangs: one line says why, and nothing is left half done."""

import socket
import time
from pathlib import Path

import pytest

from orchestrator import CompareConfig
from orchestrator.builtin import MODEL_DIR
from orchestrator.config import ConfigError
from orchestrator.data import DataError, TextOptions, load_tokens
from orchestrator.output.destination import DeliveryError, Destination, deliver_output
from orchestrator.sources import storage, watched_process
from orchestrator.sources.models import resolve_model
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import CheckpointError
from tests.orchestrator.sources.storage_commands import SECRETS, assert_one_line, run, waiting
from tests.orchestrator.stores import BUCKET, Store

NOWHERE = f"s3://{BUCKET}/nowhere"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["s3://none/m"], "model s3://none/m: not found (FileNotFoundError: The specified bucket"),
        ([NOWHERE], f"model {NOWHERE}: nothing found: check the URI"),
        (["s3://"], "model s3:// names nothing: pass the URI of a directory or a file in it"),
        (["no-such://a/b"], "model no-such://a/b: unknown store type no-such: use s3://, gs://, hf://"),
        (["--evaluate", f"{NOWHERE}.txt"], f"{NOWHERE}.txt: not found"),
        (["--output", "s3://none/x"], "s3://none/x: not found (FileNotFoundError: The specified"),
        (["--method", "gram", "--moments", NOWHERE], f"moments {NOWHERE}: nothing found: check the URI"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_in_one_line(store: Store, arguments: list[str], says: str) -> None:
    assert_one_line(run(["prune", *arguments, "--samples", "1", "--sequence-length", "16"], code=2), says)


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
    install = f"pip install -e '.[{scheme}]' in slimllm's checkout"
    says = f"model {scheme}://b/x: {scheme}:// needs a package that is not installed: {install}"
    assert_one_line(run(["prune", f"{scheme}://b/x"], code=2), says)


def test_a_hub_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert_one_line(
        run(["prune", "hf://me/tiny"], code=2), "model hf://me/tiny: the hub could not provide it (ConnectError"
    )


@pytest.mark.parametrize("fails", ["hang", "half"])
def test_a_store_that_stalls_or_drops(store: Store, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    uri = store.put(MODEL_DIR, f"models/{fails}")
    store.fails = lambda method, path: fails if path.endswith("model.safetensors") else ""
    start = time.monotonic()
    why = "nothing came for 2 s" if fails == "hang" else r"the store refused \(.*"
    with monkeypatch.context() as patch:
        patch.setattr(storage, "STALLED_SECONDS", 2.0 if fails == "hang" else 5.0)
        with pytest.raises(CheckpointError, match=rf"^model {uri}: {why}.*: check the .*network"):
            resolve_model(uri)
    assert time.monotonic() - start < 25
    # Of what came in part nothing is used: the same command fetches it when the store answers again.
    store.fails = lambda method, path: ""
    assert Checkpoint.open(resolve_model(uri).directory).digest() == Checkpoint.open(MODEL_DIR).digest()


def test_a_server_that_accepts_and_says_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "STALLED_SECONDS", 2.0)
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(DataError, match=rf"^{NOWHERE}.txt: nothing came for 2 s: check the network and the store"):
            load_tokens(f"{NOWHERE}.txt", model_dir=MODEL_DIR, vocab_size=9, max_length=9, options=TextOptions())
    assert time.monotonic() - start < 25


@pytest.mark.parametrize("name", ["../../../out.json", "/etc/out.json", "a/./out.json", "a//out.json"])
def test_names_that_leave_the_directory(store: Store, name: str) -> None:
    folder = f"names/{abs(hash(name))}"
    store.client.put_object(Bucket=BUCKET, Key=f"{folder}/config.json", Body=b"{}")
    store.client.put_object(Bucket=BUCKET, Key=f"{folder}/{name}", Body=b"{}")
    with pytest.raises(CheckpointError, match=rf"the name '{name}' leads outside the directory: rename or remove it"):
        resolve_model(f"s3://{BUCKET}/{folder}")
    assert not list(storage.cache_directory().rglob("out.json"))


def test_what_cannot_go_to_a_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a URI, but a comparison needs a directory: pass one"):
        CompareConfig(output="s3://bucket/comparison")
    for arguments in (["s3://bucket/x"], [str(tmp_path), "--output", "s3://bucket/x.gguf"]):
        result = run(["export", *arguments, "--to", "gguf"], code=2)
        assert "exports are written on this machine, not to s3://bucket/x" in result.stderr


def test_two_runs_on_one_machine_do_not_write_the_same(store: Store) -> None:
    output = Destination.of(f"s3://{BUCKET}/pruned/twice")

    def begin() -> None:
        with deliver_output(output, False, print):
            pytest.fail("it began")

    def interrupt() -> None:
        with deliver_output(output, False, print):
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
        with deliver_output(output, False, print) as directory:
            directory.mkdir(parents=True)
            (directory / "complete.json").write_text('{"by": "this"}')
            store.client.put_object(Bucket=BUCKET, Key="pruned/raced/complete.json", Body=b'{"by": "another"}')

    with pytest.raises(DeliveryError, match=r"is not empty \(1 files\).*the complete output is in"):
        make()
    assert store.content("pruned/raced") == {"complete.json": b'{"by": "another"}'}
    assert (output.directory / "complete.json").is_file()
    with deliver_output(output, True, print):
        pass
    assert store.content("pruned/raced") == {"complete.json": b'{"by": "this"}'}
    assert not waiting()


def test_no_command_line_of_a_process_shows_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    popen = watched_process.subprocess.Popen

    def noted(*arguments: object, **settings: object) -> object:
        process = popen(*arguments, **settings)
        # For a moment after it has begun, the system shows no line.
        shown = (Path(f"/proc/{process.pid}/cmdline").read_text() or time.sleep(0.01) for _ in range(500))
        seen.append(next(filter(None, shown)))
        return process

    monkeypatch.setattr(watched_process.subprocess, "Popen", noted)
    with pytest.raises(storage.StorageError, match=r"^nonsense://\*\*\*@host/model: unknown store type"):
        storage.fetch_directory("nonsense://user:u-Zt58@host/model")
    (line,) = seen
    assert "storage.process" in line
    assert "host" not in line


def test_a_secret_is_masked_before_a_long_reason_is_cut() -> None:
    reason = ValueError(f"{'x' * 180} http://user:{'u-Zt58' * 9}@host")
    assert "u-Zt58" not in watched_process.error_line(reason)
