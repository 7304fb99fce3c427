"""What a user gets wrong: one line that says what and what to do, exit code 2, and nothing left behind.

In the process of the tests, with their Ray; what is known before Ray starts is checked with Ray made unusable.
"""

import http.server
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import cluster.session
from orchestrator import pipeline
from orchestrator.cli import main

# What plain lines of progress begin with.
STAGES = ("estimate: ", "layer similarities: ", "pruning: ", "perplexity, ")
Broken = Callable[[Path], None]


def config_with(**changes: Any) -> Broken:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights_with(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Broken:
    """Replace one tensor of a model; by None, leave it out."""

    def write(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        changed = change(tensors.pop(name))
        save_file(tensors | ({name: changed} if changed is not None else {}), model / "model.safetensors")

    return write


def spoilt(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return spoil


def truncated(name: str, length: int) -> Broken:
    def truncate(model: Path) -> None:
        (model / name).write_bytes((model / name).read_bytes()[:-length])

    return truncate


def removed(name: str) -> Broken:
    return lambda model: (model / name).unlink()


def pickle_only(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def written(name: str, content: bytes) -> Broken:
    return lambda model: (model / name).write_bytes(content) and None


def lengthened(name: str, length: int) -> Broken:
    """Give a file a length that takes no room on the disk."""

    def lengthen(model: Path) -> None:
        with (model / name).open("ab") as file:
            file.truncate(length)

    return lengthen


def indexed(weight_map: object) -> Broken:
    return written("model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())


# What is wrong with the model, and what must be said of it; all known before Ray starts.
BROKEN_MODELS: dict[str, tuple[Broken, str]] = {
    "gone": (shutil.rmtree, "does not exist: pass a directory or a hub id"),
    "no config": (removed("config.json"), "has no config.json"),
    "config is no JSON": (written("config.json", b"{nope"), "config.json is not valid JSON"),
    "config of wrong types": (config_with(num_hidden_layers="three"), "its config.json is wrong"),
    "truncated": (truncated("model.safetensors", 1000), "shard model.safetensors .* truncated or broken"),
    "no weights": (removed("model.safetensors"), "holds no weights"),
    "pickle only": (pickle_only, "only the pickle pytorch_model.bin: convert it to safetensors"),
    "other family": (config_with(model_type="gpt2"), "'gpt2' are not supported; supported: llama"),
    "unknown family": (config_with(model_type="wombat"), "'wombat' are not supported; supported: llama"),
    "more layers in the config": (config_with(num_hidden_layers=5), "no tensors of layer 3.* incomplete"),
    "a tensor is missing": (
        weights_with("model.layers.1.mlp.up_proj.weight", lambda tensor: None),
        "layer 1 of .* has no mlp.up_proj.weight",
    ),
    "other shapes in the config": (config_with(intermediate_size=64), "layer 0 of .* does not fit its config.json"),
    "layers without end": (config_with(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected .* 4,096"),
    "a huge width": (config_with(hidden_size=10**12), "hidden_size is 1000000000000, expected a whole number"),
    "a huge vocabulary": (config_with(vocab_size=10**12), "vocab_size is 1000000000000"),
    "no heads": (config_with(num_attention_heads=0), "num_attention_heads is 0, expected a whole number from 1"),
    "negative heads": (config_with(num_key_value_heads=-2), "num_key_value_heads is -2"),
    "no number": (config_with(hidden_size=float("nan")), "hidden_size is nan"),
    "a table of labels": (config_with(num_labels=10**10), "num_labels is 10000000000"),
    "quantised": (config_with(quantization_config={"bits": 4}), "quantised: pass the model in bfloat16"),
    "a config nested too deeply": (written("config.json", b"[" * 10**6), "config.json is nested too deeply"),
    "a config of a terabyte": (
        lengthened("config.json", 1 << 40),
        "config.json has 1,099,511,627,776 bytes, more than",
    ),
    "a header of a terabyte": (
        written("model.safetensors", (10**12).to_bytes(8, "little") + b"{}"),
        "shard model.safetensors .* truncated or broken .*: download it again",
    ),
    "integer weights": (
        weights_with("model.layers.0.mlp.up_proj.weight", lambda tensor: tensor.to(torch.int8)),
        "layer 0 of .* holds mlp.up_proj.weight as I8: pass the model in bfloat16",
    ),
    "a tensor of another model": (
        lambda model: save_file(
            load_file(model / "model.safetensors") | {"v_head.summary.weight": torch.ones(3)},
            model / "model.safetensors",
        ),
        "holds tensors of v_head.summary, which a llama model has not: save it anew",
    ),
    "an index that leaves the directory": (
        indexed({"model.norm.weight": "../other/model.safetensors"}),
        "model.norm.weight is in '../other/model.safetensors', which is no name of a safetensors file",
    ),
    "an index of pickles": (
        indexed({"model.norm.weight": "pytorch_model.bin"}),
        "in 'pytorch_model.bin', which is no name of a safetensors file",
    ),
    "an index of nothing": (indexed([]), "model.safetensors.index.json is truncated or broken"),
}
# A tokenizer that cannot be used, where the calibration data are a text.
BROKEN_TOKENIZERS: dict[str, tuple[Broken, str]] = {
    "no tokenizer": (removed("tokenizer.json"), "has no (tokenizer that loads|vocabulary).*: add its files"),
    "empty": (written("tokenizer.json", b""), "has no tokenizer that loads .*: add its files, or give token blocks"),
    "of another kind": (written("tokenizer.json", b"[1]"), "has no tokenizer that loads .*: add its files"),
    "with code": (
        written("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'),
        "has no tokenizer that loads .*: add its files",
    ),
}
# The same, found by the workers.
DAMAGED_MODELS: dict[str, tuple[Broken, str]] = {
    "logits overflow": (
        weights_with("lm_head.weight", lambda tensor: torch.full_like(tensor, 3e38)),
        "perplexity, dense: the logits on .* NaN or infinity",
    ),
    "nan in a layer": (
        weights_with("model.layers.1.mlp.up_proj.weight", spoilt(float("nan"))),
        "layer 1 of .* NaN or infinity in mlp.up_proj.weight",
    ),
    "infinity in the embedding": (
        weights_with("model.embed_tokens.weight", spoilt(float("inf"))),
        "model.embed_tokens of .* NaN or infinity",
    ),
    "activations overflow": (
        weights_with("model.layers.2.self_attn.v_proj.weight", lambda tensor: tensor * 1e38),
        "layer 2: the activations of .* NaN or infinity",
    ),
}


def table(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


ROW = [1] * 16
BROKEN_DATA: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("x.parquet", lambda path: None, "no such file: check the path"),
    "empty": ("x.txt", text(""), "the file is empty"),
    "no rows": ("x.parquet", table(input_ids=pa.array([], pa.list_(pa.int32()))), "has no rows"),
    "shorter than a block": ("x.txt", text("one two three"), "3 tokens found, and one block needs 64: give more text"),
    "no column": ("x.parquet", table(words=[ROW]), "neither 'text' nor 'input_ids' among the columns .words."),
    "outside the vocabulary": ("x.parquet", table(input_ids=[ROW, [97] * 16]), "token id 97 in row 1, .* has 97"),
    "negative": ("x.parquet", table(input_ids=[ROW, [-1] * 16]), "token id -1 in row 1"),
    "ragged": ("x.parquet", table(input_ids=[ROW, [1] * 5]), "row 0 has 16 tokens and row 1 has 5"),
    "longer than the model takes": ("x.parquet", table(input_ids=[[1] * 65]), "65 tokens, the model takes 64"),
    "truncated": ("x.parquet", text("PAR1"), "not readable as a whole parquet file"),
    "no arrow": ("x.arrow", text("these are words"), "not readable as a whole arrow file"),
    "another kind": ("x.csv", text("text"), "files of type '.csv' are not known: use .txt"),
    "no JSON": ("x.jsonl", text('{"text": \n'), "line 1 is not JSON"),
    "nested too deeply": ("x.jsonl", text('{"text": ' + "[" * 10**5), "line 1 is nested too deeply: drop it"),
    "no object": ("x.jsonl", text("[1]"), "line 1 is not an object"),
    "no text": ("x.jsonl", text('{"body": "one"}'), r"no 'text' among the columns \(body\)"),
    "null": ("x.jsonl", text('{"text": null}'), "'text' is null: give a string"),
    "no UTF-8": ("x.txt", lambda path: path.write_bytes(b"caf\xe9") and None, "not readable as UTF-8 text"),
    "fractions": ("x.parquet", table(input_ids=[[0.5] * 16]), "'input_ids' holds list<.*: store lists of integers"),
}


class Cli:
    """Runs `slimllm prune` in a directory of its own and checks how it failed."""

    def __init__(self, directory: Path, tracking_uri: str) -> None:
        self.output, self.tracking_uri = directory / "parent" / "out", tracking_uri

    def run(self, *arguments: object) -> Result:
        command = ["prune", "--output", self.output, "--tracking-uri", self.tracking_uri, *arguments]
        return CliRunner().invoke(main, [str(argument) for argument in command])

    def fails(self, said: str, *arguments: object, with_progress: bool = False) -> None:
        """Check a run's exit code, its one line (below lines of progress, where workers found it), and what is left."""
        result = self.run(*arguments)
        assert isinstance(result.exception, SystemExit), result.output
        *progress, line = result.stderr.splitlines()
        assert result.exit_code == 2, line
        assert all(with_progress and shown.startswith(STAGES) for shown in progress), progress
        assert not result.stdout
        assert line.startswith("slimllm: ")
        assert re.search(said, line), line
        # Neither this process's traceback nor a worker's.
        assert "Traceback" not in result.output
        assert "ray::" not in line
        assert not self.output.parent.exists()


@pytest.fixture
def cli(tmp_path: Path, tracking_uri: str) -> Cli:
    return Cli(tmp_path, tracking_uri)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes as far as Ray fails with something else than a line for the user."""

    def session(*arguments: object) -> None:
        raise AssertionError("Ray was reached")

    monkeypatch.setattr(pipeline, "session", session)


@pytest.fixture
def model(gqa_model: Path, tmp_path: Path) -> Path:
    """A copy of the model with a tokenizer of words, to break."""
    copy = tmp_path / "model"
    shutil.copytree(gqa_model, copy)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2, "three": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(copy)
    return copy


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("broken", BROKEN_MODELS)
def test_a_broken_model_is_known_before_ray_starts(cli: Cli, model: Path, token_file: Path, broken: str) -> None:
    spoil, said = BROKEN_MODELS[broken]
    spoil(model)
    cli.fails(said, model, "--calibration", token_file)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(("shard", "said"), [("gone", "is missing"), ("truncated", "truncated or broken")])
def test_a_shard_that_is_missing_or_truncated(
    cli: Cli, make_llama: Callable[..., Path], token_file: Path, shard: str, said: str
) -> None:
    model = make_llama(max_shard_size="20KB")
    second = sorted(model.glob("*.safetensors"))[1]
    (removed if shard == "gone" else lambda name: truncated(name, 10))(second.name)(model)
    cli.fails(f"shard {second.name} of .* {said}.*: download it again", model, "--calibration", token_file)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("broken", BROKEN_DATA)
def test_broken_data_are_known_before_ray_starts(
    cli: Cli, model: Path, token_file: Path, tmp_path: Path, broken: str
) -> None:
    name, write, said = BROKEN_DATA[broken]
    write(tmp_path / name)
    cli.fails(said, model, "--calibration", tmp_path / name)
    cli.fails(said, model, "--calibration", token_file, "--evaluate", tmp_path / name)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("broken", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_known_before_ray_starts(cli: Cli, model: Path, tmp_path: Path, broken: str) -> None:
    spoil, said = BROKEN_TOKENIZERS[broken]
    spoil(model)
    (model / "evil.py").write_text("raise SystemExit('was run')\n")
    text("one two three " * 100)(tmp_path / "x.txt")
    cli.fails(said, model, "--calibration", tmp_path / "x.txt")


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-this-name/x.txt"])
def test_paths_that_cannot_be_looked_at(cli: Cli, model: Path, token_file: Path, path: str) -> None:
    cli.fails("no path that can be read .*: check it", path, "--calibration", token_file)
    cli.fails("no path that can be read .*: check it", model, "--calibration", path)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sparsity", "0"], "sparsity is 0.0: it must lie between 0 and 1"),
        (["--sparsity", "1.2"], "sparsity is 1.2"),
        (["--sparsity", "nan"], "sparsity is nan"),
        (["--sparsity", "0.9"], "sparsity 0.9 is not reachable: with one head .* ask for less"),
        (["--sparsity", "0.2", "--ratio", "0.2"], "give one of them"),
        (["--sparsity", "1e-9"], "sparsity 1e-09 removes nothing: .* ask for that at least"),
        (["--ratio", "2"], "ratio is 2.0"),
        (["--ratio", "0.2", "--alpha", "nan"], "alpha is nan: it must be a number"),
        (["--keep-lowest", "1"], "keep_lowest is 1.0"),
        (["--seed", "-1"], "seed is -1: it must be at least 0"),
        (["--samples", "0"], "samples is 0: it must be at least 1"),
        (["--sequence-length", "1"], "a block must have two tokens"),
        (["--workers", "0"], "workers is 0: it must be at least 1"),
        (["--gpus-per-worker", "2"], "one GPU at most"),
        (["--refine"], "refine belongs to --method gram"),
        (["--method", "gram", "--alpha", "1"], "alpha belongs to --method slimllm"),
        (["--method", "gram", "--moments", "none"], "none holds no moments .* run `slimllm calibrate`"),
        (["--config", "/dev/null/x.toml"], "config file .* cannot be read"),
        (["--config", "none.toml"], "config file none.toml does not exist"),
        (["--register", "a/b"], "the registered model's name is 'a/b'"),
        (["--experiment", ""], "the experiment's name is empty"),
    ],
)
def test_settings_out_of_range(cli: Cli, model: Path, token_file: Path, flags: list[str], said: str) -> None:
    cli.fails(said, model, "--calibration", token_file, *flags)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("kind", ["model", "data"])
def test_a_hub_name_without_a_network(cli: Cli, model: Path, token_file: Path, kind: str) -> None:
    arguments = ["some-org/some-name", "--calibration", token_file]
    cli.fails(
        "some-org/some-name.*(pass the directory|give a local file)",
        *(arguments if kind == "model" else [model, "--calibration", "some-org/some-name"]),
    )


@pytest.mark.usefixtures("no_ray")
def test_an_output_that_cannot_be_written_or_is_taken(cli: Cli, model: Path, token_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full" / "inside").mkdir(parents=True)
    places = {"file": "is a file", "file/out": "cannot be written", "full": "is not empty: .* pass --overwrite"}
    for place, said in places.items():
        cli.fails(said, model, "--calibration", token_file, "--output", tmp_path / place)
    cli.fails("cannot be written", model, "--calibration", token_file, "--output", "/proc/none/out")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["inside"]


@pytest.fixture
def not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run believe that the tests' own Ray is not there, so that it looks at the address."""
    monkeypatch.setattr(cluster.session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.session, "HEALTH_SECONDS", 2.0)


@pytest.fixture
def web_server() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *arguments: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.usefixtures("not_connected")
def test_a_ray_address_that_does_not_answer(cli: Cli, model: Path, token_file: Path, web_server: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = f"127.0.0.1:{taken.getsockname()[1]}"
    for address, said in {
        free: "no Ray answers at .* start one there",
        "nonsense": "is not host:port",
        web_server: "is no Ray for us .*check --address",
    }.items():
        cli.fails(said, model, "--calibration", token_file, "--address", address)


@pytest.mark.usefixtures("no_ray")
def test_blocks_of_one_token_measure_nothing(cli: Cli, model: Path, token_file: Path, tmp_path: Path) -> None:
    table(input_ids=[[1], [2]])(tmp_path / "one.parquet")
    said = "one.parquet has blocks of one token: .* needs two"
    cli.fails(said, model, "--calibration", token_file, "--evaluate", tmp_path / "one.parquet")


# ---- With Ray


@pytest.fixture
def last_run(tracking_uri: str) -> Callable[[], Any]:
    def find() -> Any:
        client = MlflowClient(tracking_uri)
        experiment = client.get_experiment_by_name("slimllm")
        return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])[0]

    return find


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("damage", DAMAGED_MODELS)
def test_a_damaged_model_is_found_by_the_workers(
    cli: Cli, model: Path, token_file: Path, last_run: Callable[[], Any], damage: str
) -> None:
    spoil, said = DAMAGED_MODELS[damage]
    spoil(model)
    data = ["--calibration", token_file, *(["--evaluate", token_file] if damage == "logits overflow" else [])]
    cli.fails(said, model, *data, "--workers", 1, "--run-name", damage, with_progress=True)
    assert (last_run().info.run_name, last_run().info.status) == (damage, "FAILED")


@pytest.mark.usefixtures("local_ray")
def test_more_workers_than_the_cluster_has(
    cli: Cli, model: Path, token_file: Path, last_run: Callable[[], Any]
) -> None:
    cli.fails(
        "9 workers of 0 GPUs were asked for, the cluster has room for 8: .*lower --workers",
        *(model, "--calibration", token_file, "--workers", 9, "--run-name", "too many"),
    )
    assert (last_run().info.run_name, last_run().info.status) == ("too many", "FAILED")
    cli.fails("1 workers of 1 GPUs .* room for 0", model, "--calibration", token_file, "--gpus-per-worker", 1)


@pytest.mark.usefixtures("local_ray")
def test_another_ray_than_the_one_that_is_connected(cli: Cli, model: Path, token_file: Path) -> None:
    cli.fails(
        "already connected to .*: leave the address out",
        model,
        "--calibration",
        token_file,
        "--address",
        "10.0.0.1:6379",
    )
