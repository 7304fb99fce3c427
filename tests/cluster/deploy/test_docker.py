"""The Dockerfile is valid, the files that it copies exist, and it installs the pinned packages."""

import fnmatch
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

from tests.cluster.deploy.commands import DEPLOY, ROOT, documents, pinned

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"


@pytest.fixture
def instructions(tmp_path: Path) -> list[tuple[str, str]]:
    """The name and the words of each instruction."""
    # The parser would write where it reads.
    copy = tmp_path / "Dockerfile"
    copy.write_text(DOCKERFILE.read_text())
    return [(one["instruction"], one["value"]) for one in DockerfileParser(str(copy)).structure]


def valued(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [value for instruction, value in instructions if instruction == name]


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sysconfig.get_path("scripts")) / "hadolint", "--failure-threshold", "info", path]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_finds_nothing() -> None:
    done = hadolint(DOCKERFILE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text().replace("COPY actors actors", "COPI actors actors"))
    assert hadolint(wrong).returncode != 0


def test_what_is_copied_is_there_and_docker_sees_it(instructions: list[tuple[str, str]]) -> None:
    rules = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split("\n")
    copied = [source for value in valued(instructions, "COPY") for source in value.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
        # The last rule that fits a path decides; what is kept has a rule of its own.
        fitting = [rule for rule in rules if fnmatch.fnmatch(source, rule.removeprefix("!"))]
        assert fitting[-1] == f"!{source}", f"{source}: {fitting}"
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert packages | files == set(copied)


def test_it_installs_what_is_pinned_for_the_python_that_all_nodes_have(instructions: list[tuple[str, str]]) -> None:
    (install,) = [value for value in valued(instructions, "RUN") if value.startswith("pip install")]
    assert install == "pip install --no-cache-dir --constraint constraints.txt '.[s3,gs]'"
    # Of PyPI, where this version's build is the one with CUDA: no local version, no other index.
    assert "+" not in pinned("torch")
    assert "index-url" not in DOCKERFILE.read_text()
    (base,) = valued(instructions, "FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim@sha256:[0-9a-f]{64}", base)
    # The launcher's head installs the one package that the image lacks, with the versions that the image has.
    (launcher,) = documents(DEPLOY / "launcher" / "aws.yaml")
    place = valued(instructions, "WORKDIR")[0]
    install = f"pip install --user --constraint {place}/constraints.txt boto3"
    assert launcher["head_setup_commands"] == [install]
    assert pinned("boto3") == pinned("botocore")


def test_it_runs_as_the_user_that_the_pods_and_the_launcher_count_on(instructions: list[tuple[str, str]]) -> None:
    (user,) = valued(instructions, "USER")
    manifests = [one for path in (DEPLOY / "kuberay").glob("*.yaml") for one in documents(path)]
    assert set(found_in(manifests, "runAsUser")) == set(found_in(manifests, "fsGroup")) == {int(user)}
    (environment,) = valued(instructions, "ENV")
    home = dict(word.split("=") for word in environment.split())["HOME"]
    (launcher,) = documents(DEPLOY / "launcher" / "aws.yaml")
    assert all(remote.startswith(f"{home}/") for remote in launcher["file_mounts"])


def found_in(node: object, key: str) -> list[object]:
    """Every value of a key, however deep."""
    if isinstance(node, list):
        return [found for item in node for found in found_in(item, key)]
    if isinstance(node, dict):
        deeper = [found for value in node.values() for found in found_in(value, key)]
        return [*deeper, node[key]] if key in node else deeper
    return []


def test_the_packages_of_a_wheel_are_those_with_code() -> None:
    """What is deployed is no package: it is read from a checkout."""
    program = "from setuptools import Distribution; d = Distribution(); d.parse_config_files(); print(*d.packages)"
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    packages = done.stdout.split()
    assert "cluster" in packages
    assert not [name for name in packages if name.startswith("cluster.deploy")]
