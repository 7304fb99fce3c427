"""Runs that lose workers or end early, on the session's Ray: what comes of them is what an undisturbed run gives."""

import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from orchestrator import PruneConfig
from orchestrator.pipeline import PruneResult, prune
from orchestrator.progress import Reporter

METHODS: dict[str, dict[str, Any]] = {
    "slimllm": {"sparsity": (0.2, 0.4)},
    "gram": {"method": "gram", "sparsity": (0.2, 0.4)},
    "refine": {"method": "gram", "refine": True, "sparsity": 0.3},
}
# A stage of each method, and the layer that it has reached when something happens.
MOMENTS = [
    ("slimllm", "layer similarities", 1),
    ("slimllm", "pruning", 0),
    ("slimllm", "pruning", 2),
    ("gram", "calibrating", 1),
    ("gram", "calibrating", 3),
    ("gram", "deciding", 1),
    ("refine", "refining", 0),
    ("refine", "refining", 2),
    ("refine", "perplexity, pruned", 1),
]

Run = Callable[..., PruneResult]


class Disturbed(Reporter):
    """Tells nobody, and lets something happen, once, when a stage has reached a layer."""

    def __init__(self, stage: str, layer: int, happen: Callable[[], None]) -> None:
        self.told = io.StringIO()
        super().__init__(Console(file=self.told, width=400))
        self._stage, self._layer, self._happen = stage, layer, happen
        self.happened = 0

    def layers(self, stage: str, num_layers: int, tokens: int, first: int = 0) -> Iterator[int]:
        for layer in super().layers(stage, num_layers, tokens, first):
            if (stage, layer, self.happened) == (self._stage, self._layer, 0):
                self.happened += 1
                self._happen()
            yield layer


def interrupt() -> None:
    raise KeyboardInterrupt


def kill_a_worker() -> None:
    shards = [p for p in psutil.Process().children(recursive=True) if "ray::Shard" in " ".join(p.cmdline())]
    os.kill(shards[0].pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Path:
    return make_llama(num_key_value_heads=2, num_hidden_layers=4)


@pytest.fixture(scope="module")
def run(
    model: Path, local_ray: None, tracking_uri: str, token_file: Path, held_out_file: Path
) -> Callable[..., PruneResult]:
    def prune_to(output: Path, method: str, reporter: Reporter | None = None, **settings: Any) -> PruneResult:
        data = {"calibration": str(token_file), "evaluate": (str(held_out_file),), "tracking_uri": tracking_uri}
        config = {"model": str(model), "output": str(output), "workers": 2} | data | METHODS[method] | settings
        return prune(PruneConfig(**config), reporter or Disturbed("", 0, interrupt))

    return prune_to


@pytest.fixture(scope="module")
def undisturbed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    outputs = {method: tmp_path_factory.mktemp("undisturbed") / "out" for method in METHODS}
    for method, output in outputs.items():
        run(output, method)
    return {method: content(output) for method, output in outputs.items()}


def content(output: Path) -> dict[str, bytes]:
    """Every file of an output, but for the journals: those tell when everything happened."""
    files = [path for path in output.rglob("*") if path.is_file() and path.name != "metrics.jsonl"]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


@pytest.mark.parametrize(("method", "stage", "layer"), MOMENTS)
def test_a_run_that_is_interrupted_and_resumed_gives_the_same_bytes(
    run: Run, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path, method: str, stage: str, layer: int
) -> None:
    output = tmp_path / "a" / "out"
    disturbed = Disturbed(stage, layer, interrupt)
    with pytest.raises(KeyboardInterrupt) as raised:
        run(output, method, disturbed)
    assert disturbed.happened
    assert not output.exists()
    solved = (stage, layer) not in (("layer similarities", 1), ("calibrating", 0))
    assert (output.parent / ".out.partial").is_dir() == solved
    assert ("--resume" in "".join(getattr(raised.value, "__notes__", []))) == solved

    run(output, method, resume=True)
    assert not differing(content(output), undisturbed[method])
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize(("method", "stage", "layer"), MOMENTS)
def test_a_run_that_loses_a_worker_gives_the_same_bytes(
    run: Run, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path, method: str, stage: str, layer: int
) -> None:
    disturbed = Disturbed(stage, layer, kill_a_worker)
    run(tmp_path / "out", method, disturbed)
    assert disturbed.happened
    # A worker that has nothing to do any more may be gone unnoticed.
    assert "a worker died" in disturbed.told.getvalue() or stage == "deciding"
    assert not differing(content(tmp_path / "out"), undisturbed[method])
