"""A sweep on a real `mlflow server` as a team runs it, with a database and proxied artifacts."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import mlflow
import psutil
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.cli import cli
from mlflow.entities import Run as StoredRun

from orchestrator.cli import main
from slimllm_ops.decide.plan import Plan
from tests.elsewhere import Elsewhere
from tests.orchestrator.tracked import files_of, steps_of

PAGE = Path(__file__).parents[3] / "docs" / "mlflow.md"
SPARSITIES = {"sparsity-0.20": "0.2", "sparsity-0.40": "0.4"}
# Written on after they are uploaded, or only when all is done.
LATER = {"metrics.jsonl", "pruning/metrics.jsonl", "asked.json", "pruning/asked.json"}


@dataclass(frozen=True)
class Sweep:
    """A sweep's output, what the command printed, and its runs in MLflow by name."""

    output: Path
    printed: str
    client: MlflowClient
    parent: StoredRun
    children: dict[str, StoredRun]


@pytest.fixture(scope="module")
def server(first_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server, which ends with all that it started."""
    folder = tmp_path_factory.mktemp("server")
    # Migrated already: that takes seconds.
    shutil.copyfile(first_run[0] / "copy.db", folder / "mlflow.db")
    store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    store += ["--artifacts-destination", str(folder / "artifacts")]
    with served(folder, "server", "--host", "127.0.0.1", *store) as address:
        yield address


@contextmanager
def served(folder: Path, *words: str) -> Iterator[str]:
    """Run an mlflow command that serves, in a folder and by one worker; the address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", *words, "--workers", "1", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    # Two more processes, for evaluations of chats and agents.
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=60)
        for left in psutil.wait_procs(started, timeout=20)[1]:
            left.kill()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no answer from {url}: {log.read_text()}")


@pytest.fixture(scope="module")
def sweep(
    server: str,
    gqa_model: Path,
    token_file: Path,
    held_out_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Sweep:
    """Two sparsities, registered, on a server alone."""
    output = tmp_path_factory.mktemp("sweep") / "pruned"
    data = ["--calibration", token_file, "--evaluate", held_out_file, "--local"]
    # Not in the experiment that a local run has made in this store: its files would not go through the server.
    places = ["--output", output, "--experiment", "served"]
    printed = run_line("prune", {"MODEL": gqa_model, "NAME": "tiny"}, server, *data, *places)
    client = MlflowClient(server)
    found = client.search_runs([client.get_experiment_by_name("served").experiment_id])
    runs = {run.info.run_name: client.get_run(run.info.run_id) for run in found}
    parent = runs.pop(f"{gqa_model.name}-gram-0.2-0.4")
    return Sweep(output, printed, client, parent, runs)


def page_lines(program: str) -> list[list[str]]:
    """The words of the page's shell lines that run a program."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(f".venv/bin/{program} ")]


def run_line(command: str, meant: dict[str, object], server: str, *more: object) -> str:
    """Run the page's line of a slimllm command on a server, with other words for the example's; what it prints."""
    (words,) = [words for words in page_lines("slimllm") if words[0] == command]
    words = [str(meant.get(word, word)) for word in words]
    # MLflow's own client takes it from there too.
    environment = {"MLFLOW_TRACKING_URI": server}
    done = CliRunner().invoke(main, [*words, *map(str, more)], env=environment, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_sweep_is_a_parent_with_a_child_for_every_sparsity(sweep: Sweep, gqa_model: Path) -> None:
    assert sweep.children.keys() == SPARSITIES.keys()
    assert sweep.parent.info.status == "FINISHED"
    assert sweep.parent.data.params["sparsity"] == "0.2, 0.4"
    for name, child in sweep.children.items():
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == sweep.parent.info.run_id
        # MLflow compares what a run has itself, not what its parent has.
        asked = {"method": "gram", "model": str(gqa_model), "sparsity": SPARSITIES[name], "samples": "128"}
        assert asked.items() <= child.data.params.items()
    for run in (sweep.parent, *sweep.children.values()):
        contexts = [one.tags[0].value for one in run.inputs.dataset_inputs]
        assert sorted(contexts) == ["calibration", "evaluation"]


def test_every_model_has_its_totals_and_a_point_for_each_layer(sweep: Sweep) -> None:
    for name, child in sweep.children.items():
        plan = Plan.read(sweep.output / name / "pruning" / "plan.json")
        metrics, totals = child.data.metrics, plan.header["totals"]
        assert metrics["sparsity"] == totals["sparsity"]
        assert metrics["parameters_after"] == totals["parameters_after"]
        ((before, after),) = totals["perplexity"].values()
        assert (metrics["perplexity_before"], metrics["perplexity_after"]) == (before, after)
        kept = [48 if layer.mlp is None else len(layer.mlp.kept) for layer in plan.layers]
        assert steps_of(sweep.client, child.info.run_id, "channels_kept") == list(enumerate(kept))


def test_the_parent_shows_the_models_beside_each_other(sweep: Sweep) -> None:
    note = sweep.parent.data.tags["mlflow.note.content"].splitlines()
    table = (sweep.output / "pruning" / "sweep.csv").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in note] == ["model", "---", "dense", *SPARSITIES]
    assert [line.split(",")[0] for line in table] == ["model", "dense", *SPARSITIES]
    for name, child in sweep.children.items():
        perplexity = child.data.metrics["perplexity_after"]
        (line,) = [line for line in note if name in line]
        assert f"{child.data.metrics['sparsity']:.2%}" in line
        assert f"| {perplexity:,.3f} |" in line
        assert f",{perplexity}" in next(line for line in table if name in line)
        assert f"perplexity {perplexity:.2f} (dense " in child.data.tags["mlflow.note.content"]
        # The end of the run on the terminal has the same table.
        assert f"{perplexity:,.3f}" in sweep.printed
    assert (sweep.output / "pruning" / "figures" / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_artifacts_come_back_through_the_server_byte_for_byte(sweep: Sweep, tmp_path: Path) -> None:
    places = {"": sweep.parent} | sweep.children
    for name, run in places.items():
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/"), "no client sees the server's own folder"
        downloaded = Path(sweep.client.download_artifacts(run.info.run_id, "pruning", str(tmp_path)))
        found, expected = files_of(downloaded), files_of(sweep.output / name / "pruning")
        assert {"sweep.csv", "figures/perplexity.png"} <= found.keys() or {"plan.json"} <= found.keys()
        assert same(found, expected)
        shutil.rmtree(downloaded)


def test_every_version_says_which_it_is_and_is_loaded_by_its_alias(
    sweep: Sweep, server: str, tmp_path: Path, gqa_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a model by its name, MLflow heeds no other address.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    aliases = {name: name.replace(".", "-") for name in SPARSITIES}
    assert sweep.client.get_registered_model("tiny").aliases.keys() == set(aliases.values())
    for name, alias in aliases.items():
        version, run = sweep.client.get_model_version_by_alias("tiny", alias), sweep.children[name]
        assert version.run_id == run.info.run_id
        assert version.description == run.data.tags["mlflow.note.content"]
        told = {"method": "gram", "sparsity": SPARSITIES[name], "model": str(gqa_model)}
        told |= {"model_digest": run.data.params["model_digest"]}
        told |= {"perplexity_after": str(round(run.data.metrics["perplexity_after"], 4))}
        assert told.items() <= version.tags.items()
        (output,) = run.outputs.model_outputs
        assert sweep.client.get_logged_model(output.model_id).status == "READY"
        place = mlflow.artifacts.download_artifacts(f"models:/tiny@{alias}", dst_path=str(tmp_path / alias))
        assert same(files_of(Path(place)), files_of(sweep.output / name))


def test_what_the_server_has_is_not_logged_again(sweep: Sweep, server: str) -> None:
    meant = {"pruned/model-0.2-0.4": sweep.output, "http://mlflow.example.com:5000": server}
    assert f"is logged already as MLflow run {sweep.parent.info.run_id}" in run_line("log", meant, server)
    assert len(sweep.client.search_model_versions("name = 'tiny'")) == len(SPARSITIES)


def readme_words() -> list[str]:
    """The words of the README's command that opens MLflow's page."""
    readme = (PAGE.parents[1] / "README.md").read_text()
    (line,) = re.findall(r"^\.venv/bin/mlflow (.*?)(?:  #.*)?$", readme, flags=re.MULTILINE)
    return shlex.split(line)


def assert_page(address: str) -> None:
    with urllib.request.urlopen(f"{address}/", timeout=60) as page:
        assert b"MLflow" in page.read()


def test_the_page_that_the_readme_opens_is_there(server: str) -> None:
    words, serve = readme_words(), cli.commands["server"]
    assert cli.get_command(click.Context(cli), words[0]) is serve, "the same to MLflow"
    assert serve.make_context(words[0], words[1:]).params["backend_store_uri"] == "sqlite:///mlflow.db"
    assert_page(server)


@pytest.mark.slow
def test_the_readmes_own_command_opens_the_page(tmp_path: Path) -> None:
    with served(tmp_path, *readme_words()) as address:
        assert_page(address)


def test_the_page_names_no_option_that_is_not_there() -> None:
    serve = cli.commands["server"]
    for words in page_lines("mlflow"):
        assert words[0] in ("ui", "server"), "the same to MLflow"
        assert serve.make_context(words[0], words[1:]).params["backend_store_uri"]
    commands = (serve, *main.commands.values())
    known = {option for command in commands for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE.read_text()))
    assert {"--register", "--allowed-hosts"} <= named
    assert named - known == set()


def same(found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Whether files are the same, and as many, but for those that are written on after they are uploaded."""
    differ = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
    return bool(found) and differ <= LATER


def test_the_pages_example_loads_a_version_in_plain_transformers(
    sweep: Sweep, server: str, tmp_path: Path, elsewhere: Elsewhere
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert "models:/NAME@sparsity-0-40" in example
    shown = "\nprint(sum(parameter.numel() for parameter in model.parameters()))"
    program = example.replace("models:/NAME", "models:/tiny") + shown
    ended = elsewhere.run(program, tmp_path, MLFLOW_TRACKING_URI=server)
    assert ended.code == 0, ended.stderr
    assert int(ended.stdout.split()[-1]) == sweep.children["sparsity-0.40"].data.metrics["parameters_after"]
