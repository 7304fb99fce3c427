"""User errors end with one line that says what is wrong and what to do, with exit code 2, and leave nothing behind.

Commands run in the tests' own process, with its Ray. Errors that can be found before Ray starts are tested with Ray
made unusable.
"""

import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cluster.session
from tests.orchestrator.cli.broken_inputs import BROKEN_DATA, Cli, table


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
@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-this-name/x.txt"])
def test_paths_that_cannot_be_looked_at(cli: Cli, model: Path, token_file: Path, path: str) -> None:
    cli.fails("not a readable path .*: check it", path, "--calibration", token_file)
    cli.fails("not a readable path .*: check it", model, "--calibration", path)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sparsity", "0"], "sparsity is 0.0: it must lie between 0 and 1"),
        (["--sparsity", "1.2"], "sparsity is 1.2"),
        (["--sparsity", "nan"], "sparsity is nan"),
        (["--sparsity", "0.9"], "sparsity 0.9 is not reachable: with the fewest heads .* ask for less"),
        (["--sparsity", "0.2", "--ratio", "0.2"], "give one of them"),
        (["--sparsity", "1e-9"], "sparsity 1e-09 removes nothing: .* ask for at least that"),
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
        web_server: "is not a Ray that we can use .*check --address",
    }.items():
        cli.fails(said, model, "--calibration", token_file, "--address", address)


@pytest.mark.usefixtures("no_ray")
def test_blocks_of_one_token_measure_nothing(cli: Cli, model: Path, token_file: Path, tmp_path: Path) -> None:
    table(input_ids=[[1], [2]])(tmp_path / "one.parquet")
    said = "one.parquet has blocks of one token: .* needs at least two"
    cli.fails(said, model, "--calibration", token_file, "--evaluate", tmp_path / "one.parquet")


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
