"""Helpers for tests of cluster/deploy: the paths of its files, and the slimllm commands in them."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import yaml

from orchestrator.cli import main
from orchestrator.config import PruneConfig

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "cluster" / "deploy"
IMAGE = "registry.example.com/slimllm:0.1.0"


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    (version,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    return version


def settings_of(command: str) -> PruneConfig:
    """What a `slimllm prune` command asks for, as the command line itself reads it; an unknown option raises."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("slimllm", "prune")
    # Within the program, as it is run: click keeps what a command takes for help from the first time it is asked.
    program_context = click.Context(main, **main.context_settings)
    read = main.commands[name].make_context(name, words, parent=program_context).params
    settings = {field.name for field in fields(PruneConfig)} & read.keys()
    return PruneConfig(**{name: read[name] for name in settings if read[name] not in (None, ())})


def documents(path: Path) -> list[dict[str, Any]]:
    """The YAML documents of a file."""
    return list(yaml.safe_load_all(path.read_text()))


def schema() -> dict[str, Any]:
    """KubeRay's own description of a RayJob, and in it of a RayCluster."""
    return json.loads((Path(__file__).parent / "kuberay" / "schema.json").read_text())
