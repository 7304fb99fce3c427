"""The sdist and the wheel contain what users need, and the wheel works without a checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from orchestrator.version import DISTRIBUTION, VERSION

ROOT = Path(__file__).parents[1]
PACKAGES = ("actors", "cluster", "orchestrator", "slimllm_ops")
NAME = f"{DISTRIBUTION.replace('-', '_')}-{VERSION}"
# A checkout has more than git does: the environment and caches anywhere, outputs of builds and runs at the top.
CACHES = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
OUTPUTS = {"build", "dist", "mlruns", "mlflow.db", "pruned", "comparisons"}
METADATA = """
from importlib.metadata import metadata, requires, version
from orchestrator.version import DISTRIBUTION
from packaging.requirements import Requirement

needs = [Requirement(line) for line in requires(DISTRIBUTION)]
needs = [one for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
assert len(needs) > 10
wrong = [str(one) for one in needs if not one.specifier.contains(version(one.name), prereleases=True)]
assert not wrong, wrong
print(metadata(DISTRIBUTION)["License-Expression"])
"""

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    # PYTHONPATH may name the checkout.
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=plain, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def not_source(folder: str, names: list[str]) -> set[str]:
    """Return the names in a folder of the checkout that a build does not need."""
    return CACHES(folder, names) | (OUTPUTS if Path(folder) == ROOT else set())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of a copy of the checkout, and the wheel made from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    # A build writes into the folder that it builds, and takes up files that an earlier build left there.
    shutil.copytree(ROOT, folder / "source", ignore=not_source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return built / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, where dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # Python reads no .pth files in a folder that a .pth file names, so an editable install there stays out of it.
    (packages,) = folder.glob("lib/python*/site-packages")
    outer = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "dependencies.pth").write_text("\n".join(outer))
    return folder


def members(archive: Path) -> set[str]:
    """Return the files of a wheel or an sdist, by their paths in it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return set(file.namelist())
    with tarfile.open(archive) as file:
        return {member.name.removeprefix(f"{NAME}/") for member in file.getmembers() if member.isfile()}


def sources() -> set[str]:
    """Return the packages' files as the checkout has them, but for what is only read from a checkout."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.parent.name != "__pycache__"}
    return {name for name in names if not name.startswith("cluster/deploy/")}


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    held = members(wheel)
    information = {name for name in held if name.startswith(f"{NAME}.dist-info/")}
    assert held - information == sources()
    assert f"{NAME}.dist-info/licenses/LICENSE" in information
    # Types, the built-in model, and the files that travel with every checkpoint.
    assert {f"{package}/py.typed" for package in PACKAGES} < held
    assert "orchestrator/builtin/model/model.safetensors" in held
    assert any(name.startswith("slimllm_ops/") and name.endswith("/pruned_llama.py") for name in held)


def test_the_sdist_holds_what_a_build_needs(built: Path) -> None:
    held = members(built / f"{NAME}.tar.gz")
    assert {*sources(), "pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md"} < held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/", "cluster/deploy/"))]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_are_imported_from_the_environment(package: str, environment: Path, tmp_path: Path) -> None:
    found = run(environment / "bin" / "python", "-c", f"import {package}; print({package}.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(environment)


def test_the_command_runs(environment: Path, tmp_path: Path) -> None:
    command = environment / "bin" / "slimllm"
    assert run(command, "--version", cwd=tmp_path).strip().endswith(f"version {VERSION}")
    assert "Structured pruning of large language models" in run(command, "--help", cwd=tmp_path)
    # The table of the families imports the mathematics and transformers.
    assert "llama" in run(command, "families", cwd=tmp_path)


def test_the_metadata_name_the_licence_and_requirements_that_are_met(environment: Path, tmp_path: Path) -> None:
    assert run(environment / "bin" / "python", "-c", METADATA, cwd=tmp_path).strip() == "Apache-2.0"
