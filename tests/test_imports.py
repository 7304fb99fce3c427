"""Which package may import which: the house of the design, checked on the sources."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIBLINGS = {
    "orchestrator": {"actors", "slimllm_ops", "cluster"},
    "actors": {"slimllm_ops"},
    "slimllm_ops": set(),
    "cluster": set(),
}
MATHEMATICS = {"torch", "transformers", "safetensors", "accelerate", "numpy", "wrapt"}


def imported(package: str) -> Iterator[tuple[str, str]]:
    """Every import in a package, wherever in a file it stands: the file, and the top-level name it imports."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no sources in {package}"
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if not node.level else [package]
            yield from ((str(file.relative_to(ROOT)), name.partition(".")[0]) for name in names)


@pytest.mark.parametrize("package", SIBLINGS)
def test_packages_import_only_the_siblings_below_them(package: str) -> None:
    allowed = SIBLINGS[package] | {package}
    wrong = {(file, name) for file, name in imported(package) if name in SIBLINGS and name not in allowed}
    assert not wrong


def test_the_mathematics_knows_of_no_ray_and_no_mlflow() -> None:
    allowed = MATHEMATICS | {"slimllm_ops"} | sys.stdlib_module_names
    wrong = {(file, name) for file, name in imported("slimllm_ops") if name not in allowed}
    assert not wrong


def test_nothing_unpickles_or_runs_a_models_code() -> None:
    """A model directory is data: whatever loads a part of it says that no code of its own is to be run."""
    for path in (path for folder in SIBLINGS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            assert not names & {"pickle", "cloudpickle", "joblib", "dill"}, path
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func)
            assert called != "torch.load", path
            # NumPy's own `load` unpickles only where it is told to.
            assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, path
            if called.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                assert "trust_remote_code=False" in ast.unparse(node), f"{path}: {ast.unparse(node)}"
