"""A fork sees what the process that it replaces would see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked_workers.server import FOLDER, forked_workers
from tests.orchestrator.job_server import THEN_ASK_FOR_A_FORK, WITHOUT_SLIMLLM

WORKER = """
import importlib.util, sys
print("torch" in sys.modules, importlib.util.find_spec("orchestrator"))
"""


def test_a_worker_of_a_cluster_without_slimllm_has_torch_and_not_slimllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.mkdir()
    (python / "sitecustomize.py").write_text(WITHOUT_SLIMLLM + THEN_ASK_FOR_A_FORK)
    worker = tmp_path / "default_worker.py"
    worker.write_text(WORKER)
    # As in a process of xdist, whose server has imported our own sitecustomize when it started.
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    with forked_workers() as variables:
        environment = os.environ | variables | {"PYTHONPATH": str(python)}
        command = [sys.executable, str(worker)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True None\n", done.stderr
