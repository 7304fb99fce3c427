"""No Python file of the working directory runs, and no folder there is taken for a package."""

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

BIN = Path(sys.executable).parent
# Names of what the driver, Ray's processes and workers import; `cluster` is a folder that may be anybody's.
NAMES = (
    *("actors", "slimllm_ops", "yaml", "torch", "numpy", "click", "json", "tempfile", "psutil", "mlflow"),
    *("sitecustomize", "usercustomize", "colorama", "grpc"),
)
HOSTILE = """
from pathlib import Path
with Path({ran!r}).open("a") as file:
    print(__file__, file=file)
raise ImportError("this must not run")
"""


def fill(folder: Path, ran: Path, names: Iterable[str] = NAMES) -> None:
    """Put modules into a folder that tell a file when they run, and innocent folders."""
    for name in names:
        (folder / f"{name}.py").write_text(HOSTILE.format(ran=str(ran)))
    for name in ("cluster", "orchestrator"):
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("innocent")


def test_a_run_on_ray_imports_nothing_of_the_model_that_it_runs_in(
    whole_processes: None, gqa_model: Path, token_file: Path, tmp_path: Path
) -> None:
    model, ran, output = tmp_path / "model", tmp_path / "ran", tmp_path / "out"
    shutil.copytree(gqa_model, model)
    fill(model, ran)
    words = ["prune", ".", "--calibration", token_file, "--evaluate", token_file, "--workers", "1"]
    command = [BIN / "slimllm", *words, "--tracking-uri", "none", "--output", output]
    done = subprocess.run(list(map(str, command)), cwd=model, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not ran.exists(), ran.read_text()
    assert (output / "complete.json").exists()


def test_the_module_imports_nothing_of_the_folder_that_it_is_run_in(tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    fill(folder, ran)
    # A namespace package of that name would be found before the program is.
    shutil.rmtree(folder / "orchestrator")
    command = [sys.executable, "-m", "orchestrator", "families"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not ran.exists(), ran.read_text()
