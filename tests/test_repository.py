"""The repository's files agree on the name, the version, and the checks before a commit."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from orchestrator.version import DISTRIBUTION, VERSION

ROOT = Path(__file__).parents[1]
CHECKS = ROOT / ".ci" / "run"
# Where people are told what to install.
FOLDERS = ("actors", "benchmarks", "cluster", "docs", "orchestrator", "slimllm_ops")
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "README.md", "pyproject.toml")


def texts() -> Iterator[tuple[Path, str]]:
    """Yield every text file that users read, with its path."""
    paths = [ROOT / page for page in PAGES]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in paths:
        if path.suffix not in (".png", ".pyc", ".safetensors"):
            yield path.relative_to(ROOT), path.read_text()


def test_the_name_and_the_version_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (project["name"], project["license"]) == (DISTRIBUTION, citation["license"])
    assert citation["version"] == VERSION
    assert f"\n## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_requirement_has_a_version_that_fits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in map(Requirement, asked):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} and {version}"


def test_nobody_is_told_to_install_a_strangers_package() -> None:
    """PyPI's `slimllm` is another project."""
    strangers = re.compile(r"pip install [^\n]*(?<!/opt/)\bslimllm\b(?!-prune|'s checkout)|['\"`]slimllm\[")
    found = [f"{path}: {match[0]}" for path, text in texts() for match in strangers.finditer(text)]
    assert not found


def test_every_optional_requirement_that_is_told_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    told = [match[1] for _, text in texts() for match in re.finditer(r"'\.\[([\w,-]+)\]'", text)]
    names = {name for one in told for name in one.split(",")}
    assert "gguf" in names
    assert names <= set(extras)


def test_what_is_checked_before_a_commit_and_on_github_is_what_ci_checks() -> None:
    checks = CHECKS.read_text().splitlines()
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"] for hook in local["hooks"]]
    assert hooks == ["make lint", "make types"]
    assert set(hooks) < set(checks)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert steps == [f"bash {CHECKS.relative_to(ROOT)}"]


def test_git_ignores_no_file_of_the_repository() -> None:
    # Ruff skips what git ignores, and `git add` leaves out a new file beside it.
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ignored.returncode:
        pytest.skip(f"needs a checkout of git: {ignored.stderr.strip()}")
    assert ignored.stdout == ""
