"""Runs that lose workers or stop early, on the session's Ray, give the result of an undisturbed run."""

import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from orchestrator import PruneConfig
from orchestrator.config import ConfigError
from orchestrator.pipeline import PruneResult, calibrate, prune
from orchestrator.progress import Reporter
from tests.conftest import content, files_of_at_most, shard_processes

Run = Callable[..., PruneResult]
# What happens when a stage has reached a layer.
Event = tuple[str, int, Callable[[], None]]

# Of two workers one is left to take over the other's data, of one a new one does.
METHODS: dict[str, dict[str, Any]] = {
    "slimllm": {"workers": 2, "sparsity": (0.2, 0.4)},
    "gram": {"workers": 1, "method": "gram", "sparsity": (0.2, 0.4)},
    "refine": {"workers": 1, "method": "gram", "refine": True, "sparsity": 0.3},
}


def interrupt() -> None:
    raise KeyboardInterrupt


def kill_a_worker() -> None:
    os.kill(shard_processes()[0].pid, signal.SIGKILL)


# What happens in each attempt at a run; all but the last are interrupted.
ATTEMPTS: dict[str, list[list[Event]]] = {
    "slimllm": [
        [("layer similarities", 1, kill_a_worker), ("pruning", 2, interrupt)],
        [("pruning", 3, kill_a_worker), ("perplexity, pruned", 1, interrupt)],
        [],
    ],
    "gram": [
        [("calibrating", 1, interrupt)],
        [("calibrating", 3, kill_a_worker), ("deciding", 1, interrupt)],
        [],
    ],
    "refine": [
        [("deciding", 2, kill_a_worker), ("refining", 1, interrupt)],
        [("refining", 2, kill_a_worker), ("perplexity, pruned", 2, kill_a_worker)],
    ],
}


class Disturbed(Reporter):
    """Tells a string, and lets events happen in their order."""

    def __init__(self, events: list[Event]) -> None:
        self.told = io.StringIO()
        super().__init__(Console(file=self.told, width=400))
        self.to_come = list(events)

    def layers(self, stage: str, num_layers: int, tokens: int, first: int = 0) -> Iterator[int]:
        for layer in super().layers(stage, num_layers, tokens, first):
            if self.to_come and self.to_come[0][:2] == (stage, layer):
                self.to_come.pop(0)[2]()
            yield layer


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Path:
    return make_llama(num_key_value_heads=2, num_hidden_layers=4)


@pytest.fixture(scope="module")
def run(model: Path, local_ray: None, tracking_uri: str, token_file: Path, held_out_file: Path) -> Run:
    def prune_to(output: Path, method: str, reporter: Reporter | None = None, **settings: Any) -> PruneResult:
        data = {"calibration": str(token_file), "evaluate": (str(held_out_file),), "tracking_uri": tracking_uri}
        config = {"model": str(model), "output": str(output)} | data | METHODS[method] | settings
        return prune(PruneConfig(**config), reporter or Disturbed([]))

    return prune_to


def partial_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@pytest.mark.parametrize(
    "method", ["gram", *(pytest.param(method, marks=pytest.mark.slow) for method in ("slimllm", "refine"))]
)
def test_whatever_happens_to_a_run_it_gives_the_same_bytes_and_one_run_in_mlflow(
    run: Run, cpus_of_ray: None, tmp_path: Path, method: str, tracking_uri: str
) -> None:
    # Nothing happens to this one on Ray either: what a worker does, this process does (test_backends.py).
    run(tmp_path / "undisturbed", method, local=True)
    expected = content(tmp_path / "undisturbed")
    output, name = tmp_path / "a" / "out", f"disturbed {method}"
    for number, events in enumerate(ATTEMPTS[method]):
        disturbed = Disturbed(events)
        settings = {"resume": number > 0, "run_name": name}
        if any(happen is interrupt for *_, happen in events):
            with pytest.raises(KeyboardInterrupt) as raised:
                run(output, method, disturbed, **settings)
            assert "--resume" in raised.value.__notes__[0]
            assert [path.name for path in output.parent.iterdir()] == [".out.partial"]
        else:
            run(output, method, disturbed, **settings)
        assert not disturbed.to_come
        told = disturbed.told.getvalue()
        assert told.count("a worker died") == sum(happen is kill_a_worker for *_, happen in events)
        assert told.count("continuing from earlier results") == (number > 0)
    found = content(output)
    assert sorted(found) == sorted(expected)
    assert [file for file in found if found[file] != expected[file]] == []
    assert list(output.parent.iterdir()) == [output]
    require_one_run(tracking_uri, name, len(METHODS[method]["sparsity"]) if method != "refine" else 1)

    again = run(output, method, resume=True)
    assert again.models == ()
    assert content(output) == found
    with pytest.raises(ConfigError, match="keep_lowest"):
        run(output, method, resume=True, keep_lowest=0.02)


def require_one_run(uri: str, name: str, num_models: int) -> None:
    """Require that MLflow has a run once, finished, with each layer's metrics once for each model."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("slimllm").experiment_id
    (found,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{found.info.run_id}'")
    assert len(children) == (num_models if num_models > 1 else 0)
    for one in [*children, found]:
        assert one.info.status == "FINISHED"
    for one in children or [found]:
        steps = [metric.step for metric in client.get_metric_history(one.info.run_id, "channels_kept")]
        assert sorted(steps) == [0, 1, 2, 3]
    assert len(found.inputs.dataset_inputs) == 2


def test_what_was_asked_must_be_asked_again(run: Run, tmp_path: Path, gqa_model: Path, held_out_file: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(output, "gram", Disturbed([("calibrating", 2, interrupt)]), local=True)
    for settings, named in (
        ({"sparsity": 0.3}, "sparsity"),
        ({"model": str(gqa_model)}, "model_digest"),
        ({"calibration": str(held_out_file)}, "calibration_digest"),
        ({"workers": 3}, "workers"),
    ):
        with pytest.raises(ConfigError, match=rf"had other settings \(.*{named}"):
            run(output, "gram", resume=True, local=True, **settings)
    assert (partial_of(output) / ".work" / "solved" / "moments" / "layer-00001.safetensors").exists()


@pytest.mark.parametrize(
    ("workers", "killed"),
    [
        ({"local": True}, []),
        # As a run by gram loses a worker above.
        pytest.param({"workers": 1}, [("calibrating", 1, kill_a_worker)], marks=pytest.mark.slow),
    ],
    ids=["local", "on Ray"],
)
def test_calibration_goes_on_too(
    model: Path, token_file: Path, local_ray: None, tmp_path: Path, workers: dict[str, Any], killed: list[Event]
) -> None:
    def moments(name: str, *events: Event, **settings: Any) -> Path:
        config = {"model": str(model), "calibration": str(token_file), "output": str(tmp_path / name)} | workers
        return calibrate(PruneConfig(**config | settings), Disturbed(list(events)))

    expected = content(moments("undisturbed"))
    with pytest.raises(KeyboardInterrupt):
        moments("out", *killed, ("calibrating", 3, interrupt))
    assert content(moments("out", resume=True)) == expected
    assert content(moments("out", resume=True)) == expected


def test_a_disk_that_is_full_keeps_what_is_solved(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings: dict[str, Any] = {"method": "slimllm", "sparsity": 0.2, "local": True}
    with pytest.raises(OSError, match="File too large") as raised, files_of_at_most(20_000):
        run(output, **settings)
    assert "--resume" in raised.value.__notes__[0]
    assert not output.exists()
    run(output, resume=True, **settings)
    run(tmp_path / "undisturbed", **settings)
    assert content(output) == content(tmp_path / "undisturbed")
