"""A run in this process gives the same result as a run on Ray, and needs neither Ray nor MLflow."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.pipeline import PruneResult
from tests.conftest import content
from tests.forked_workers.server import FORKED

# `slimllm` where neither can be imported.
WITHOUT = """
import sys
for package in ("ray", "mlflow"):
    sys.modules[package] = None
from orchestrator.cli import main
main()
"""


@pytest.mark.parametrize(
    ("settings", "workers"),
    [
        ({"method": "slimllm"}, 2),
        # Pruning by gram comes first.
        ({"method": "gram", "refine": True}, 2),
        pytest.param({"method": "gram"}, 2, marks=pytest.mark.slow),
        *(
            pytest.param(settings, 1, marks=pytest.mark.slow)
            for settings in ({"method": "slimllm"}, {"method": "gram"}, {"method": "gram", "refine": True})
        ),
    ],
    ids=str,
)
def test_the_same_bytes_as_on_ray_with_as_many_shards(
    prune_model: Callable[..., PruneResult],
    prune_on_ray: Callable[..., PruneResult],
    gqa_model: Path,
    held_out_file: Path,
    settings: dict[str, object],
    workers: int,
    cpus_of_ray: None,
) -> None:
    asked = settings | {"workers": workers, "rendered": True, "evaluate": (str(held_out_file),)}
    local, on_ray = (content(run(gqa_model, **asked).output) for run in (prune_model, prune_on_ray))
    assert local.keys() == on_ray.keys()
    assert [name for name in local if local[name] != on_ray[name]] == []


def test_neither_ray_nor_mlflow_is_needed(gqa_model: Path, token_file: Path, tmp_path: Path) -> None:
    words = ["prune", gqa_model, "--local", "--tracking-uri", "none", "--calibration", token_file, "--method", "gram"]
    command = [sys.executable, "-c", WITHOUT, *map(str, words), "--output", str(tmp_path / "pruned")]
    done = subprocess.run(command, env=os.environ | FORKED, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "pruned" / "config.json").exists()
