"""The command line: how it reads options, and runs in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from orchestrator.cli import main, runs
from orchestrator.config import PruneConfig
from orchestrator.pipeline import PruneResult
from slimllm_ops.decide.plan import Plan
from tests.conftest import content, shard_processes
from tests.forks import Forks, slimllm
from tests.ports import free_ports
from tests.ray_head import ray_head

# A cluster without authentication is reached by clients without it, whatever token lies in the home folder.
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("RAY_ADDRESS", None)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PruneConfig]:
    """What `slimllm prune` would run with."""
    seen: list[PruneConfig] = []
    monkeypatch.setattr(runs, "_prune", lambda config, **telling: seen.append(config))

    def run(*arguments: object) -> PruneConfig:
        result = CliRunner().invoke(main, ["prune", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return seen[-1]

    return run


def test_without_options_everything_is_the_default(configured: Callable[..., PruneConfig]) -> None:
    assert configured() == PruneConfig()


def test_every_option_is_a_setting(configured: Callable[..., PruneConfig]) -> None:
    config = configured(
        *("model", "--output", "o", "--overwrite", "--ratio", ".3", "--pruned-layers", 3, "--alpha", 7),
        *("--keep-lowest", 0, "--calibration", "c", "--samples", 5, "--sequence-length", 64, "--seed", 1),
        *("--evaluate", "a", "--evaluate", "b", "--workers", 2, "--gpus-per-worker", ".5", "--address", "h:1"),
        *("--experiment", "e", "--tracking-uri", "u", "--run-name", "r", "--register", "n", "--method", "slimllm"),
    )
    assert config == PruneConfig(
        **{"model": "model", "output": "o", "overwrite": True, "ratio": 0.3, "pruned_layers": 3, "alpha": 7},
        **{"keep_lowest": 0, "calibration": "c", "samples": 5, "sequence_length": 64, "seed": 1},
        **{"evaluate": ("a", "b"), "workers": 2, "gpus_per_worker": 0.5, "address": "h:1"},
        **{"experiment": "e", "tracking_uri": "u", "run_name": "r", "register": "n", "method": "slimllm"},
    )


def test_flags_win_over_a_file(configured: Callable[..., PruneConfig], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "m"\nsparsity = 0.3\nworkers = 3\nevaluate = ["a"]\n')
    config = configured("--config", file, "--sparsity", 0.4, "--evaluate", "b")
    assert config == PruneConfig(model="m", sparsity=0.4, workers=3, evaluate=("b",))
    assert configured("--config", file) == PruneConfig(model="m", sparsity=0.3, workers=3, evaluate=("a",))


# Prints help's parts, and JSON as `slimllm jobs list --json` does.
QUICK = """
import sys
import orchestrator.cli
from orchestrator.cli.exit_codes import print_json
print_json([])
sys.exit(", ".join({"torch", "ray", "mlflow", "datasets"} & sys.modules.keys()) or 0)
"""


def test_help_and_json_are_quick_since_they_import_neither_torch_nor_ray() -> None:
    done = subprocess.run([sys.executable, "-c", QUICK], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


# ---- Processes of its own


def run_status(uri: str, name: str) -> str:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("slimllm")
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return run.info.status


@pytest.fixture(scope="module")
def deep_model(make_llama: Callable[..., Path]) -> Path:
    """A model of some layers, so that there is time for something to happen."""
    return make_llama(num_hidden_layers=14, hidden_size=16, intermediate_size=32)


def told(stderr: str) -> list[str]:
    """What was said but for progress."""
    progress = ("estimate: ", "no perplexity is measured: ", "layer similarities: ", "pruning: ", "replaying: ")
    return [line for line in stderr.splitlines() if not line.startswith(progress)]


@dataclass(frozen=True)
class Story:
    """One run, ended by signals one after the other and resumed after each.

    Attributes:
        arguments: What every attempt is asked.
        output: Where it writes.
        uri: Where it is logged, as `name`.
    """

    arguments: tuple[object, ...]
    output: Path
    uri: str
    name: str
    forks: Forks

    def command(self, *more: object) -> str:
        places = ["--tracking-uri", self.uri, "--run-name", self.name, "--output", self.output]
        return slimllm("prune", *self.arguments, *places, *more)

    @property
    def partial(self) -> Path:
        return self.output.with_name(f".{self.output.name}.partial")

    def end_by(self, sent: signal.Signals, layer: int, *more: object) -> tuple[int, str]:
        """Make an attempt that a signal ends once a layer is solved; return its code, and what it said.

        No process of it is left, and its output is unfinished.
        """
        attempt = self.forks.start(self.command(*more))
        process = attempt.process
        while not (self.partial / ".work" / "solved" / "pruned.log" / f"layer-{layer:05d}.json").exists():
            assert process.is_running(), attempt.printed()
            time.sleep(0.01)
        shards = shard_processes()
        assert shards
        started = [*process.children(recursive=True), *shards]
        # Ray's agents, which do nothing but tell of a node, notice only after a minute that a driver was killed.
        agents = [child for child in started if "Agent" in child.name() and sent == signal.SIGKILL]
        # The kill program's manners: to the process. A terminal's: to all of its group.
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)
        ended = attempt.wait(seconds=60)
        _, alive = psutil.wait_procs([one for one in started if one not in agents], timeout=20)
        assert not alive
        assert list(self.output.parent.iterdir()) == [self.partial]
        return ended.code, ended.stderr

    def finish(self) -> None:
        """Resume it without Ray, to its end."""
        ended = self.forks.run(self.command("--resume", "--local"))
        assert ended.code == 0, ended.stderr
        assert "\ncontinuing from earlier results" in ended.stderr
        assert list(self.output.parent.iterdir()) == [self.output]


@pytest.fixture
def story(deep_model: Path, token_file: Path, tracking_uri: str, tmp_path: Path, forks: Forks) -> Story:
    asked = (deep_model, "--calibration", token_file)
    return Story(asked, tmp_path / "a" / "out", tracking_uri, tmp_path.name, forks)


@pytest.fixture(scope="module")
def undisturbed(prune_model: Callable[..., PruneResult], deep_model: Path) -> Path:
    """The same without Ray, which gives the same bytes (test_backends.py)."""
    return prune_model(deep_model, sparsity=(), rendered=True).output


def test_a_run_that_signals_end_leaves_no_process_and_is_resumed(
    story: Story, undisturbed: Path, tmp_path: Path
) -> None:
    code, stderr = story.end_by(signal.SIGINT, layer=3)
    said = [line.partition(str(tmp_path))[0] for line in told(stderr)]
    assert (code, said) == (130, ["slimllm: interrupted; no checkpoint was written; what was solved is in "])
    assert not list(story.partial.rglob("*.partial"))
    assert run_status(story.uri, story.name) == "KILLED"
    code, stderr = story.end_by(signal.SIGKILL, 8, "--resume")
    assert (code, [line.partition(" (")[0] for line in told(stderr)]) == (-9, ["continuing from earlier results"])
    assert run_status(story.uri, story.name) == "RUNNING"
    story.finish()
    assert run_status(story.uri, story.name) == "FINISHED"
    assert content(story.output) == content(undisturbed)


# A job that is stopped is ended by it (test_submit.py).
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code", "what"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "the terminal is gone")]
)
def test_a_run_that_another_signal_ends_leaves_no_process_and_is_resumed(
    story: Story, undisturbed: Path, tmp_path: Path, sent: signal.Signals, code: int, what: str
) -> None:
    ended, stderr = story.end_by(sent, layer=3)
    said = [line.partition(str(tmp_path))[0] for line in told(stderr)]
    assert (ended, said) == (code, [f"slimllm: {what}; no checkpoint was written; what was solved is in "])
    assert run_status(story.uri, story.name) == "KILLED"
    story.finish()
    assert content(story.output) == content(undisturbed)


@pytest.fixture(scope="module")
def other_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray that somebody else started on this machine, in processes of its own."""
    (port,) = free_ports(1)
    options = (f"--port={port}", "--num-cpus=3", "--include-dashboard=false")
    with ray_head(*options, folder=tmp_path_factory.mktemp("other"), environment=ENVIRONMENT):
        yield f"127.0.0.1:{port}"


def test_two_runs_on_another_cluster_from_a_file_and_from_flags_both_give_what_each_would_alone(
    gqa_model: Path, token_file: Path, tracking_uri: str, tmp_path: Path, other_cluster: str, forks: Forks
) -> None:
    settings: dict[str, Any] = {
        "model": str(gqa_model),
        "calibration": str(token_file),
    }
    file = tmp_path / "run.toml"
    file.write_text("".join(f'{name} = "{value}"\n' for name, value in settings.items()) + "sparsity = 0.9\n")
    alike = ["--sparsity", "0.4", "--workers", "1"]
    given = [gqa_model, "--calibration", token_file, "--address", other_cluster, "--tracking-uri", "none"]
    places = ["--output", tmp_path / "file", "--address", other_cluster, "--tracking-uri", tracking_uri]
    places += ["--run-name", "from a file"]
    asked = [("--config", file, *alike, *places), (*given, *alike, "--output", tmp_path / "flags")]
    runs = [forks.start(slimllm("prune", *words)) for words in asked]
    ended = [run.wait(seconds=300) for run in runs]
    assert [run.code for run in ended] == [0, 0], ended
    assert content(tmp_path / "file") == content(tmp_path / "flags")

    stdout, stderr = ended[0].stdout, ended[0].stderr
    # Each takes the whole cluster, and so one of them waits for the other.
    lines = [line.split(":")[0] for line in stderr.splitlines() if not line.startswith("waiting for up to ")]
    assert lines == ["estimate", "no perplexity is measured", "layer similarities", "pruning"], stderr
    assert f"checkpoint: {tmp_path / 'file'}" in stdout
    assert f"mlflow ui --backend-store-uri {tracking_uri}" in stdout
    assert "parameters" in stdout
    header = Plan.read(tmp_path / "file" / "pruning" / "plan.json").header
    asked = {name: header["params"][name] for name in ("sparsity", "num_workers", "cpus_per_worker")}
    assert asked == {"sparsity": 0.4, "num_workers": 1, "cpus_per_worker": 3}
    assert run_status(tracking_uri, "from a file") == "FINISHED"
